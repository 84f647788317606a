//! The stage between acquiring a machine's resources and assembling it.

use std::io;

/// Drops privileges that assembling and running a machine does not need. It
/// drops none yet.
///
/// Afterwards the machine opens nothing by path: every file, device, tap, vhost
/// file and image is in [`HostResources`](crate::resources::HostResources). The
/// vCPU threads, `msi` and `queries` start later.
///
/// # Errors
/// The host refuses the restriction.
pub fn confine() -> io::Result<()> {
    Ok(())
}
