//! The stage between acquiring a machine's resources and assembling it.

use std::io;

/// Takes from the process what assembling and running a machine does not need.
/// It takes nothing yet.
///
/// After it the machine opens nothing by path: every file, device, tap, vhost
/// file and image is in [`HostResources`](crate::resources::HostResources).
/// The vCPU threads, `msi` and `queries` start later.
///
/// # Errors
/// The host refuses the restriction.
pub fn confine() -> io::Result<()> {
    Ok(())
}
