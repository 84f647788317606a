//! Arguments of the form `key=value,key=value`, parsed by tables.
//!
//! The table of a type gives each key's name, form, range, default and meaning. The parser and the
//! help text both use it, so that the help lists every key. A comma in a value is doubled.

use super::suggest::{closest, either};

/// One key of the type `T`.
pub struct Key<T> {
    pub(super) name: &'static str,
    pub(super) value: Value<T>,
    pub(super) omitted: Omitted,
    /// Effect of the key, for the help.
    pub(super) meaning: &'static str,
}

/// Form of a key's value, and the function that stores it.
pub enum Value<T> {
    /// Text; the first field names it in the help. The function's error is the fix.
    Text(
        &'static str,
        fn(&mut T, String) -> Result<(), super::error::ConfigError>,
    ),
    /// `on` or `off`.
    Switch(fn(&mut T, bool)),
    /// One of these words, stored by its index.
    Choice(&'static [&'static str], fn(&mut T, usize)),
    /// A whole number within an inclusive range.
    Number(u32, u32, fn(&mut T, u32)),
}

/// Meaning of an omitted key.
pub enum Omitted {
    /// An error.
    Refused,
    /// The same as this value.
    Is(&'static str),
    /// The behaviour that this text describes.
    Means(&'static str),
}

/// The fix, without the key's name.
type Problem = String;

impl<T> Key<T> {
    fn form(&self) -> String {
        match &self.value {
            Value::Text(form, _) => (*form).to_owned(),
            Value::Switch(_) => "on|off".to_owned(),
            Value::Choice(words, _) => words.join("|"),
            Value::Number(..) => "N".to_owned(),
        }
    }

    fn store(&self, target: &mut T, text: String) -> Result<(), Problem> {
        let name = self.name;
        let choices = |words: &[&str]| {
            let pairs: Vec<_> = words.iter().map(|word| format!("{name}={word}")).collect();
            format!("{name}={text}: use {}", either(&pairs))
        };
        match &self.value {
            Value::Text(_, store) => {
                let problem = format!("{name}={text}");
                store(target, text).map_err(|error| format!("{problem}: {}", error.problem))?;
            }
            Value::Switch(store) => match text.as_str() {
                "on" => store(target, true),
                "off" => store(target, false),
                _ => return Err(choices(&["on", "off"])),
            },
            Value::Choice(words, store) => {
                let index = words.iter().position(|word| *word == text);
                store(target, index.ok_or_else(|| choices(words))?);
            }
            Value::Number(least, most, store) => {
                let number = text.parse().ok();
                let number = number.filter(|number| (least..=most).contains(&number));
                let problem = || format!("{name}={text}: use {least} to {most}");
                store(target, number.ok_or_else(problem)?);
            }
        }
        Ok(())
    }
}

/// Parses the pairs of `text` and stores their values in `target`.
pub(super) fn parse<T>(text: &str, keys: &[Key<T>], target: &mut T) -> Result<(), Problem> {
    let mut given: Vec<&str> = Vec::new();
    for (index, item) in split_commas(text).into_iter().enumerate() {
        let Some((name, value)) = item.split_once('=') else {
            return Err(no_pair(&item, index == 0, keys));
        };
        let names = || keys.iter().map(|key| key.name);
        let Some(key) = keys.iter().find(|key| key.name == name) else {
            let fix = closest(name, names()).map_or_else(
                || format!("use {}", either(&names().collect::<Vec<_>>())),
                |near| format!("did you mean {near}?"),
            );
            return Err(format!("unknown key {name}; {fix}"));
        };
        if given.contains(&key.name) {
            return Err(format!("{name} is given twice; remove one"));
        }
        given.push(key.name);
        key.store(target, value.to_owned())?;
    }
    let required = |key: &&Key<T>| matches!(key.omitted, Omitted::Refused);
    match keys
        .iter()
        .filter(required)
        .find(|key| !given.contains(&key.name))
    {
        Some(key) => Err(format!(
            "{0}= is missing; give {0}={1}",
            key.name,
            key.form()
        )),
        None => Ok(()),
    }
}

/// Explains why an item without `=` is refused, with the fix.
fn no_pair<T>(item: &str, first: bool, keys: &[Key<T>]) -> Problem {
    let fix = match keys.iter().find(|key| key.name == item) {
        Some(key) => format!("use {item}={}", key.form()),
        None if first && !item.is_empty() => {
            let main = keys.first().map_or("key", |key| key.name);
            format!("use {main}={item}")
        }
        None if first => match keys.first() {
            Some(key) => format!("use {}={}", key.name, key.form()),
            None => "leave it out".to_owned(),
        },
        None if item.is_empty() => "remove the comma or write a pair".to_owned(),
        None => "write a comma that belongs to a value twice".to_owned(),
    };
    format!("\"{item}\" is not of the form key=value; {fix}")
}

/// A line for each key: its form, meaning, range and default.
pub(super) fn help<T>(keys: &[Key<T>]) -> String {
    let pair = |key: &Key<T>| format!("{}={}", key.name, key.form());
    let width = keys.iter().map(|key| pair(key).len()).max().unwrap_or(0);
    let mut text = String::new();
    for key in keys {
        let range = match key.value {
            Value::Number(least, most, _) => format!(", {least} to {most}"),
            _ => String::new(),
        };
        let default = match key.omitted {
            Omitted::Refused => "[required]".to_owned(),
            Omitted::Is(value) => format!("[default: {value}]"),
            Omitted::Means(text) => format!("[default: {text}]"),
        };
        let pair = pair(key);
        let meaning = key.meaning;
        text.push_str(&format!("\n  {pair:width$}  {meaning}{range} {default}"));
    }
    text
}

/// Splits at single commas; a doubled comma is one comma of the value.
fn split_commas(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let doubled = character == ',' && characters.next_if_eq(&',').is_some();
        if character == ',' && !doubled {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(character);
        }
    }
    items
}
