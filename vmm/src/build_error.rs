//! Errors of building a machine.

use std::io;

use devices::bus::BusError;

use crate::action::ActionError;
use crate::config::ConfigError;
use crate::error::Chain;
use crate::kvm;
use crate::sandbox::SandboxError;

/// Error of building a machine: one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// A value of the configuration is refused, by its field.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// KVM or guest memory is not available.
    #[error(transparent)]
    Kvm(#[from] kvm::Error),
    /// The boot data does not fit into guest memory.
    #[error(transparent)]
    Boot(arch::Error),
    /// The console cannot be set up.
    #[error("cannot set up the console")]
    Console(#[source] io::Error),
    /// Two devices claim one address.
    #[error("cannot place a device")]
    Place(#[from] BusError),
    /// The process cannot be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    /// The host refuses an eventfd, a timer or a thread.
    #[error("cannot set up the machine")]
    Host(#[from] io::Error),
}

impl From<BuildError> for ActionError {
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::Config(error) => Self::Invalid(error),
            other => Self::Failed(Chain(&other).to_string()),
        }
    }
}
