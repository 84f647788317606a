//! Why a configuration is refused.

use devices::error::Chain;
use std::error::Error;
use std::path::Path;

/// A value that cannot be accepted: where it is and what to do about it, in one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConfigError {
    /// The field at fault, with its section if known: `drives[rootfs].io_engine`.
    pub field: String,
    /// What is wrong with it, and the fix.
    pub problem: String,
}

impl ConfigError {
    /// An error in `field`. What came from a client may be part of either text, so control
    /// characters are escaped: the error stays one line, in the log too.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            field: one_line(field.into()),
            problem: one_line(problem.into()),
        }
    }

    /// An error in `field`, which names a file that cannot be used.
    pub fn of_file(field: impl Into<String>, path: &Path, error: &dyn Error) -> Self {
        Self::new(field, format!("{} {}", path.display(), Chain(error)))
    }

    /// The same error seen from the section that holds the field.
    #[must_use]
    pub fn within(self, section: &str) -> Self {
        Self {
            field: format!("{section}.{}", self.field),
            ..self
        }
    }
}

fn one_line(text: String) -> String {
    if !text.contains(char::is_control) {
        return text;
    }
    let escape = |character: char| {
        if character.is_control() {
            character.escape_default().to_string()
        } else {
            character.to_string()
        }
    };
    text.chars().map(escape).collect()
}

/// Refuses `field` unless `ok`.
pub(super) fn require(ok: bool, field: &str, problem: &str) -> Result<(), ConfigError> {
    if ok {
        Ok(())
    } else {
        Err(ConfigError::new(field, problem))
    }
}
