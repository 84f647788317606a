//! Confinement of the process.
//!
//! Every thread is started, and every file opened, before [`confine`]. It is
//! called on the event loop, as the last step before the vCPUs are resumed.

pub mod directories;
mod landlock;
mod privileges;
mod seccomp;
mod start;

use std::error::Error;
use std::io;

use devices::thread::{self, ThreadKind};

use self::directories::Directories;
pub use self::seccomp::EXIT_STATUS;
pub use self::start::{harden, named_descriptors};
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

/// Prepares the confinement of the process: threads that are started from now
/// on confine themselves, and inherit an empty bounding set. Only the first call
/// has an effect on them. Call it before another thread exists.
///
/// # Errors
/// Forbidden system calls cannot be reported, or the bounding set not emptied.
pub fn prepare(mode: Sandbox, user: Option<User>) -> Result<(), SandboxError> {
    if mode != Sandbox::Off || user.is_some() {
        let step = "emptying the bounding set of capabilities";
        privileges::clear_bounding_set().map_err(SandboxError::of::<io::Error>(step))?;
    }
    let step = "handling forbidden system calls";
    seccomp::prepare(mode).map_err(SandboxError::of::<io::Error>(step))?;
    thread::set_entry(move |kind| confine_thread(kind, mode, user).map_err(io::Error::other));
    Ok(())
}

/// Takes from the event loop's thread what running the machine does not need:
/// the file system except for `directories`, capabilities and user, then system
/// calls. Other threads have done the same as their first act.
///
/// Afterwards the machine opens nothing by path: every file, device, tap, vhost
/// file and image is in `resources::HostResources`.
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
    drop_privileges(mode, user)?;
    filter_calls(ThreadKind::EventLoop, mode)
}

/// Denies a thread other than the event loop every file, and takes its
/// privileges and the system calls that its kind does not make. Its first act.
///
/// # Errors
/// The first step that the host refuses.
fn confine_thread(kind: ThreadKind, mode: Sandbox, user: Option<User>) -> Result<(), SandboxError> {
    if mode == Sandbox::On {
        landlock::deny_all().map_err(SandboxError::of("denying access by landlock"))?;
    }
    drop_privileges(mode, user)?;
    filter_calls(kind, mode)
}

fn filter_calls(kind: ThreadKind, mode: Sandbox) -> Result<(), SandboxError> {
    let step = "filtering system calls by seccomp";
    seccomp::enter(kind, mode).map_err(SandboxError::of::<io::Error>(step))
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
