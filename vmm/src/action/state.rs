//! State of a machine.

use serde::{Deserialize, Serialize};
use std::fmt;

/// State of a machine. The names are Firecracker's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum MachineState {
    /// Configured, but not started.
    #[default]
    #[serde(rename = "Not started")]
    NotStarted,
    /// The vCPUs run.
    Running,
    /// The vCPUs are paused, so that no device receives an access.
    Paused,
}

impl fmt::Display for MachineState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotStarted => "not started",
            Self::Running => "running",
            Self::Paused => "paused",
        })
    }
}
