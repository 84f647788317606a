//! Mode of the process's confinement.

use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// How the process is confined while the guest runs (`--sandbox`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Sandbox {
    /// A forbidden system call ends the process.
    #[default]
    On,
    /// A forbidden system call is made, and logged once for each kind of thread.
    Log,
    /// Nothing is forbidden.
    Off,
}

impl FromStr for Sandbox {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        match text {
            "on" => Ok(Self::On),
            "log" => Ok(Self::Log),
            "off" => Ok(Self::Off),
            _ => Err("use on, log or off"),
        }
    }
}

impl fmt::Display for Sandbox {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}
