//! Checks and defaults that several sections share.

use super::error::{ConfigError, require};

/// Upper bound on the queues of a device (queue pairs of a network interface).
pub(super) const MAX_QUEUES: u16 = 16;

/// Upper bound on the length of an identifier, in bytes.
const MAX_ID_LEN: usize = 64;

/// Checks an identifier: letters, digits, `_`, `-` and `.`, at most 64 of them.
pub(super) fn check_id(field: &str, id: &str) -> Result<(), ConfigError> {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"_-.".contains(&byte);
    require(!id.is_empty(), field, "is empty; give the device a name")?;
    require(
        id.len() <= MAX_ID_LEN && id.bytes().all(legal),
        field,
        "use 1 to 64 letters, digits, '_', '-' or '.'",
    )
}

/// Names an element of a list by its identifier, or by its index if that is not valid.
pub(super) fn element(list: &str, index: usize, id: &str) -> String {
    match check_id("", id) {
        Ok(()) => format!("{list}[{id}]"),
        Err(_) => format!("{list}[{index}]"),
    }
}

/// Checks a path that the host will open: not empty, no control character.
pub(super) fn check_path(field: &str, path: &str) -> Result<(), ConfigError> {
    require(!path.is_empty(), field, "is empty; give a path")?;
    require(
        !path.contains(char::is_control),
        field,
        "contains a control character; rename the file",
    )
}

/// Checks a number of queues: 1 to [`MAX_QUEUES`], inclusive.
pub(super) fn check_queues(num_queues: u16) -> Result<(), ConfigError> {
    require(
        (1..=MAX_QUEUES).contains(&num_queues),
        "num_queues",
        "use 1 to 16",
    )
}

pub(super) fn default_true() -> bool {
    true
}

pub(super) fn default_one() -> u16 {
    1
}
