//! Errors of the configuration.

use devices::error::Chain;
use std::error::Error;
use std::io;
use std::path::Path;

/// A refused value: its field and the fix, in one line.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct ConfigError {
    /// Path of the field, with its section if known: `drives[rootfs].io_engine`.
    pub field: String,
    /// The fault and the fix.
    pub problem: String,
    /// The host denies access to the file that the field names.
    pub is_denied: bool,
}

impl ConfigError {
    /// Creates an error in `field`. Both texts may contain bytes of a client, so control characters
    /// are escaped: the error stays one line, in the log too.
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            field: one_line(field.into()),
            problem: one_line(problem.into()),
            is_denied: false,
        }
    }

    /// Creates an error in `field`, which names a file that cannot be used.
    pub fn of_file(field: impl Into<String>, path: &Path, error: &dyn Error) -> Self {
        let cause = error.source().and_then(|it| it.downcast_ref::<io::Error>());
        Self {
            is_denied: cause.is_some_and(|it| it.kind() == io::ErrorKind::PermissionDenied),
            ..Self::new(field, format!("{} {}", path.display(), Chain(error)))
        }
    }

    /// Adds the section that contains the field.
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
