//! Configuration of the log and the metrics.

use super::check::check_path;
use super::error::{ConfigError, require};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::str::FromStr;

/// Level of the log. The names are Firecracker's, in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String")]
pub enum LogLevel {
    /// Nothing.
    Off,
    /// Failures.
    Error,
    /// Conditions that may be faults.
    Warning,
    /// Changes of the machine's state.
    #[default]
    Info,
    /// Details for developers.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    /// Converts the level to the filter of the `log` crate.
    #[must_use]
    pub fn filter(self) -> log::LevelFilter {
        match self {
            Self::Off => log::LevelFilter::Off,
            Self::Error => log::LevelFilter::Error,
            Self::Warning => log::LevelFilter::Warn,
            Self::Info => log::LevelFilter::Info,
            Self::Debug => log::LevelFilter::Debug,
            Self::Trace => log::LevelFilter::Trace,
        }
    }
}

impl FromStr for LogLevel {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        match text.to_ascii_lowercase().as_str() {
            "off" => Ok(Self::Off),
            "error" => Ok(Self::Error),
            "warning" | "warn" => Ok(Self::Warning),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err("use Off, Error, Warning, Info, Debug or Trace"),
        }
    }
}

impl TryFrom<String> for LogLevel {
    type Error = &'static str;

    fn try_from(text: String) -> Result<Self, &'static str> {
        text.parse()
    }
}

/// The log (`/logger`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file or FIFO to append to. If omitted, the destination does not change (standard error at
    /// first).
    pub log_path: Option<String>,
    /// Level of the log. If omitted, it does not change.
    pub level: Option<LogLevel>,
    /// Whether a line shows its level.
    pub show_level: Option<bool>,
    /// Whether a line shows the module it comes from.
    pub show_log_origin: Option<bool>,
    /// Logs only modules whose path starts with this text.
    pub module: Option<String>,
}

impl Logger {
    /// Checks the values; opens nothing.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        self.log_path
            .as_ref()
            .map_or(Ok(()), |path| check_path("log_path", path))
    }
}

/// Destination of the metrics, one JSON object a line (`/metrics`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file or FIFO to append to.
    pub metrics_path: String,
    /// Accepted as `false` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub emit_id: Option<bool>,
    /// Accepted empty only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub properties: Option<BTreeMap<String, String>>,
}

impl Metrics {
    /// Checks the values; opens nothing.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        check_path("metrics_path", &self.metrics_path)?;
        require(
            !self.emit_id.unwrap_or(false),
            "emit_id",
            "is not supported; leave it out or set it to false",
        )?;
        require(
            self.properties.as_ref().is_none_or(BTreeMap::is_empty),
            "properties",
            "is not supported; leave it out",
        )
    }
}
