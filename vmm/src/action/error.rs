//! Why an action is refused or fails.

use super::state::MachineState;
use crate::config::ConfigError;

/// Why an [`Action`](super::Action) was not done. The text is one line, for the user.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ActionError {
    /// A value cannot be accepted.
    #[error(transparent)]
    Invalid(#[from] ConfigError),
    /// The machine is in a state where this cannot be done.
    #[error("{action} is not possible: the machine is {state}")]
    WrongState {
        /// What was asked, as a noun.
        action: &'static str,
        /// The state the machine is in.
        state: MachineState,
    },
    /// There is no such thing.
    #[error("{0}")]
    NotFound(String),
    /// It was tried and failed.
    #[error("{0}")]
    Failed(String),
    /// The controller went away without an answer, as it does when the machine ends.
    #[error("the machine ended before it answered")]
    Unanswered,
}
