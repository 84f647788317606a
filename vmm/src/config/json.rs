//! JSON documents: one reader for `--config` and for the bodies of requests.

use super::ConfigError;
use super::suggest::{closest, either};
use ::devices::error::Chain;
use serde::de::{DeserializeOwned, Deserializer, Error, Visitor};
use serde_path_to_error::{Path, Segment};
use std::fmt;
use std::marker::PhantomData;

/// Reads one JSON document and nothing after it. The error names the field at fault, by its path
/// from the outside in (`drives[1].iommu`), which `serde_json` alone does not for a wrong type.
///
/// # Errors
/// The bytes are not JSON, or not of the shape of `T`. A list in the place of an object is not,
/// although serde would take its elements for the fields in their order.
pub fn parse_json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, ConfigError> {
    let mut reader = serde_json::Deserializer::from_slice(bytes);
    let value = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let (field, problem) = (field(error.path()), reworded(error.inner()));
        let name = field.rsplit('.').next().unwrap_or_default();
        let twice = format!("unknown field `{name}`");
        let problem = problem.replacen(&twice, "unknown field", 1);
        ConfigError::new(field, problem)
    })?;
    let whole = |error: &serde_json::Error| ConfigError::new(DOCUMENT, reworded(error));
    reader.end().map_err(|error| whole(&error))?;
    let shape = serde_json::from_slice(bytes).map_err(|error| whole(&error))?;
    refuse_lists(&shape, "")?;
    Ok(value)
}

/// The name of the document as a whole.
const DOCUMENT: &str = "JSON";

/// The path as the documents write it. What the reader did not get to know is left out.
fn field(path: &Path) -> String {
    let mut text = String::new();
    for segment in path {
        match segment {
            Segment::Seq { index } => text.push_str(&format!("[{index}]")),
            Segment::Map { key } | Segment::Enum { variant: key } => {
                if !text.is_empty() {
                    text.push('.');
                }
                text.push_str(key);
            }
            Segment::Unknown => {}
        }
    }
    if text.is_empty() {
        DOCUMENT.to_owned()
    } else {
        text
    }
}

/// The reader's text, in the words of the configuration and with the fix.
fn reworded(error: &serde_json::Error) -> String {
    let text = Chain(error).to_string();
    // Only the place of a syntax error is not named by its field already.
    let place = format!(" at line {} column {}", error.line(), error.column());
    let (text, place) = match text.strip_suffix(&place) {
        Some(text) if error.is_data() => (text, ""),
        Some(text) => (text, place.as_str()),
        None => (text.as_str(), ""),
    };
    let text = not_among(text).unwrap_or_else(|| other_type(text));
    format!("{text}{place}")
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

/// What the reader calls a type, and what the documents call it.
const TYPES: [(&str, &str); 5] = [
    ("u64", "a whole number"),
    ("a boolean", "true or false"),
    ("a sequence", "a list"),
    ("a map", "an object"),
    ("option", "a value or null"),
];

/// Rewrites "unknown field `a`, expected one of `b`, `c`", and the same for a value: the name
/// that was meant, or all there are.
fn not_among(text: &str) -> Option<String> {
    let mut names = text.split('`').skip(1).step_by(2);
    let (name, kind) = match text {
        _ if text.starts_with("unknown field `") => (names.next()?, "field"),
        _ if text.starts_with("unknown variant `") => (names.next()?, "value"),
        _ => return None,
    };
    let known: Vec<&str> = names.collect();
    if known.is_empty() {
        return None;
    }
    let fix = match closest(name, known.iter().copied()) {
        Some(near) => format!("did you mean `{near}`?"),
        None => {
            let quoted: Vec<_> = known.iter().map(|name| format!("`{name}`")).collect();
            format!("use {}", either(&quoted))
        }
    };
    Some(format!("unknown {kind} `{name}`; {fix}"))
}

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

/// Reads a whole number. One that its field cannot hold is read as 0, which is out of the range
/// of every field that uses this: the range's own check refuses it then and names the range.
pub(super) fn whole<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64> + Default,
{
    deserializer.deserialize_u64(Whole(PhantomData))
}

/// [`whole`], or `null`.
pub(super) fn optional_whole<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: Deserializer<'de>,
    T: TryFrom<u64> + Default,
{
    deserializer.deserialize_option(OptionalWhole(PhantomData))
}

struct Whole<T>(PhantomData<T>);

impl<T: TryFrom<u64> + Default> Visitor<'_> for Whole<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number")
    }

    fn visit_u64<E: Error>(self, number: u64) -> Result<T, E> {
        Ok(T::try_from(number).unwrap_or_default())
    }

    fn visit_i64<E: Error>(self, number: i64) -> Result<T, E> {
        self.visit_u64(u64::try_from(number).unwrap_or_default())
    }
}

struct OptionalWhole<T>(PhantomData<T>);

impl<'de, T: TryFrom<u64> + Default> Visitor<'de> for OptionalWhole<T> {
    type Value = Option<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number or null")
    }

    fn visit_none<E: Error>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_unit<E: Error>(self) -> Result<Option<T>, E> {
        Ok(None)
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Option<T>, D::Error> {
        whole(deserializer).map(Some)
    }
}
