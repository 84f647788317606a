//! Endings of a machine, and the exit status of the process.

use std::fmt;

/// Ending of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The guest powered off.
    PoweredOff,
    /// The user stopped it: by key, signal or API.
    Stopped,
    /// The guest reset.
    Reset,
    /// The guest's processor cannot continue (triple fault, KVM internal
    /// error), or the guest reports a crash. One line; the registers are in the
    /// log.
    Crashed(String),
    /// The monitor cannot continue; one line.
    Failed(String),
}

impl Ending {
    /// Exit status of the process. Scripts depend on it.
    #[must_use]
    pub fn status(&self) -> u8 {
        match self {
            Self::PoweredOff | Self::Stopped => 0,
            Self::Failed(_) => 1,
            Self::Reset => 3,
            Self::Crashed(_) => 4,
        }
    }
}

impl fmt::Display for Ending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => f.write_str("the guest powered off"),
            Self::Stopped => f.write_str("the machine was stopped"),
            Self::Reset => f.write_str("the guest reset"),
            Self::Crashed(why) => write!(f, "the guest crashed: {why}"),
            Self::Failed(why) => f.write_str(why),
        }
    }
}
