//! Errors of actions.

use super::state::MachineState;
use crate::config::ConfigError;

/// Error of an [`Action`](super::Action): one line, for the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActionError {
    /// A value of the configuration is refused.
    #[error(transparent)]
    Invalid(#[from] ConfigError),
    /// The machine's state does not permit the action.
    #[error("{action} is not possible: the machine is {state}")]
    WrongState {
        /// The action, as a noun.
        action: &'static str,
        /// The machine's state.
        state: MachineState,
    },
    /// No device or file of this name is configured.
    #[error("{0}")]
    NotFound(String),
    /// The action failed for this reason.
    #[error("{0}")]
    Failed(String),
    /// The controller ended without an answer, as it does when the machine ends.
    #[error("the machine ended before it answered")]
    Unanswered,
}
