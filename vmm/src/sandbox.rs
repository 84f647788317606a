//! Confinement of the process.
//!
//! Every thread is started, and every file opened, before [`confine`]. It is
//! called on the event loop, as the last step before the vCPUs are resumed.

pub mod directories;
mod landlock;
mod privileges;

use std::error::Error;
use std::io;

use self::directories::Directories;
use crate::config::{Sandbox, User};

/// Error of a step of the confinement: one line for the user.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot confine the process: {step} is not possible; `--sandbox off` runs the machine without \
     confinement"
)]
pub struct SandboxError {
    /// The step, as a gerund with its object.
    step: &'static str,
    source: Box<dyn Error + Send + Sync>,
}

impl SandboxError {
    /// Wraps the error of `step`, such as "entering the seccomp filter".
    pub(crate) fn of<E>(step: &'static str) -> impl FnOnce(E) -> Self
    where
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        move |source| Self {
            step,
            source: source.into(),
        }
    }
}

/// Takes from the event loop's thread what running the machine does not need:
/// the file system except for `directories`, capabilities and user, then system
/// calls. Other threads have done the same as their first act.
///
/// Afterwards the machine opens nothing by path: every file, device, tap, vhost
/// file and image is in [`HostResources`](crate::resources::HostResources).
///
/// # Errors
/// The first step that the host refuses. The process is then partly confined.
pub fn confine(
    mode: Sandbox,
    user: Option<User>,
    directories: &Directories,
) -> Result<(), SandboxError> {
    // Denied access to a file cannot be logged and let pass.
    if mode == Sandbox::On {
        let abi = landlock::restrict(directories);
        let abi = abi.map_err(SandboxError::of("denying access by landlock"))?;
        log::info!("landlock denies what the kernel's ABI {abi} has rights for");
    }
    drop_privileges(mode, user)
}

/// Denies a thread other than the event loop every file, and takes its
/// privileges. Its first act.
///
/// # Errors
/// The first step that the host refuses.
pub fn confine_thread(mode: Sandbox, user: Option<User>) -> Result<(), SandboxError> {
    if mode == Sandbox::On {
        landlock::deny_all().map_err(SandboxError::of("denying access by landlock"))?;
    }
    drop_privileges(mode, user)
}

/// Changes the calling thread to `user`, in every mode, and drops its
/// capabilities.
fn drop_privileges(mode: Sandbox, user: Option<User>) -> Result<(), SandboxError> {
    if let Some(user) = user {
        let step = "changing to the user of --user, which needs root,";
        privileges::change_user(user).map_err(SandboxError::of::<io::Error>(step))?;
    }
    if mode != Sandbox::Off {
        let step = "dropping the capabilities";
        privileges::drop_capabilities().map_err(SandboxError::of::<io::Error>(step))?;
    }
    Ok(())
}
