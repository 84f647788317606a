//! JSON documents: one parser for `--config` and for the bodies of requests.

use super::error::ConfigError;
use super::suggest::{closest, either};
use ::devices::error::Chain;
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error, Unexpected};
use serde_json::Number;
use serde_path_to_error::{Path, Segment};

/// Reads exactly one JSON document. The error names the field by its path from the outside in
/// (`drives[1].iommu`), which `serde_json` alone does not for a wrong type.
///
/// # Errors
/// The bytes are not JSON, or do not have the shape of `T`. A list in the place of an object is
/// refused, although serde accepts its elements as the fields in their order.
pub fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ConfigError> {
    let shape = serde_json::from_slice(bytes)
        .map_err(|error| ConfigError::new(DOCUMENT, Chain(&error).to_string()))?;
    refuse_lists(&shape, "")?;
    // From the bytes again: `shape` has a duplicate field only once.
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    serde_path_to_error::deserialize(&mut reader)
        .map_err(|error| explain(path_of(error.path()), error.inner()))
}

/// The name of the document as a whole.
const DOCUMENT: &str = "JSON";

impl ConfigError {
    /// As [`within`](Self::within), for an error of [`parse_json`] in a document that is one
    /// section of the configuration. An error of the whole document keeps its name.
    #[must_use]
    pub fn in_document(self, section: &str) -> Self {
        if self.field == DOCUMENT {
            return self;
        }
        self.within(section)
    }
}

/// Formats the path as the documents write it. Elements that the parser did not reach are omitted.
fn path_of(path: &Path) -> String {
    path.iter()
        .fold(String::new(), |text, segment| match segment {
            Segment::Seq { index } => format!("{text}[{index}]"),
            Segment::Map { key } | Segment::Enum { variant: key } => joined(&text, key),
            Segment::Unknown => text,
        })
}

fn joined(path: &str, name: &str) -> String {
    let dot = if path.is_empty() { "" } else { "." };
    format!("{path}{dot}{name}")
}

/// Converts the parser's error about a value into the words of the configuration, with the fix.
fn explain(path: String, error: &serde_json::Error) -> ConfigError {
    let text = Chain(error).to_string();
    let place = format!(" at line {} column {}", error.line(), error.column());
    // The field replaces the position.
    let text = text.strip_suffix(&place).unwrap_or(&text);
    let mut names = text.split('`').skip(1).step_by(2);
    let name = names.next().unwrap_or_default();
    let known: Vec<&str> = names.collect();
    let (of_name, problem) = match text.split('`').next().unwrap_or_default() {
        "missing field " => (true, "is missing".to_owned()),
        "duplicate field " => (true, "is given twice; remove one".to_owned()),
        "unknown field " => (true, format!("unknown field; {}", instead(name, &known))),
        "unknown variant " => {
            let fix = instead(name, &known);
            (false, format!("unknown value `{name}`; {fix}"))
        }
        // The parser's text for `null`, a number or a list in place of a word.
        "expected value" => (false, "invalid type, expected a string".to_owned()),
        _ => (false, other_type(text)),
    };
    // The parser counts only some names as a part of the path.
    let is_last = path == name || path.ends_with(&format!(".{name}"));
    let field = match path.as_str() {
        path if of_name && !is_last => joined(path, name),
        "" => DOCUMENT.to_owned(),
        path => path.to_owned(),
    };
    ConfigError::new(field, problem)
}

/// The closest known name, or the list of all names.
fn instead(name: &str, known: &[&str]) -> String {
    match closest(name, known.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => {
            let quoted: Vec<_> = known.iter().map(|name| format!("`{name}`")).collect();
            format!("use {}", either(&quoted))
        }
    }
}

/// Rewrites the name of the type at the end of "invalid type: …, expected TYPE".
fn other_type(text: &str) -> String {
    let Some((start, expected)) = text.rsplit_once(", expected ") else {
        return text.to_owned();
    };
    let known = TYPES.iter().find(|(rust, _)| *rust == expected);
    let expected = match known {
        Some((_, json)) => json,
        None if expected.starts_with("struct ") => "an object",
        None => expected,
    };
    format!("{start}, expected {expected}")
}

/// The parser's names of types, and those of the documents.
const TYPES: [(&str, &str); 6] = [
    ("u64", "a whole number"),
    ("a JSON number", "a whole number"),
    ("a boolean", "true or false"),
    ("a sequence", "a list"),
    ("a map", "an object"),
    ("option", "a value or null"),
];

/// The sections that are lists of objects. Nothing else in a configuration is a list.
const LISTS: [&str; 3] = ["drives", "network-interfaces", "pmem"];

fn refuse_lists(value: &serde_json::Value, path: &str) -> Result<(), ConfigError> {
    use serde_json::Value;
    match value {
        Value::Array(items) if LISTS.contains(&path) => items
            .iter()
            .enumerate()
            .try_for_each(|(index, item)| refuse_lists(item, &format!("{path}[{index}]"))),
        Value::Array(_) => {
            let field = if path.is_empty() { "JSON" } else { path };
            Err(ConfigError::new(field, "is a list; give an object"))
        }
        Value::Object(fields) => fields.iter().try_for_each(|(name, value)| {
            let dot = if path.is_empty() { "" } else { "." };
            refuse_lists(value, &format!("{path}{dot}{name}"))
        }),
        _ => Ok(()),
    }
}

/// Reads a whole number. A number that `T` cannot hold is read as 0, which is out of the range of
/// every field that uses this: the field's own check then names the range.
pub(super) fn whole<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64> + Default,
{
    narrow(&Number::deserialize(deserializer)?)
}

/// Reads a whole number as [`whole`] does, or `null`.
pub(super) fn optional_whole<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64> + Default,
{
    let number = Option::<Number>::deserialize(deserializer)?;
    number.as_ref().map(narrow).transpose()
}

fn narrow<T: TryFrom<u64> + Default, E: Error>(number: &Number) -> Result<T, E> {
    if !number.is_f64() {
        let fitting = number.as_u64().map(T::try_from);
        return Ok(fitting.and_then(Result::ok).unwrap_or_default());
    }
    let float = Unexpected::Float(number.as_f64().unwrap_or_default());
    Err(E::invalid_type(float, &"a whole number"))
}
