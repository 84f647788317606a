//! Rust's tokens, as needed for names and paths.

/// Whether a token is a name or a keyword.
pub fn is_name(token: &str) -> bool {
    token.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
}

/// Splits code into names, `::`, string literals with their quotes, and single
/// characters.
pub fn tokens(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = match first {
            _ if rest.starts_with("//") => rest.find('\n').unwrap_or(rest.len()),
            _ if rest.starts_with("::") => 2,
            _ if is_name(rest) => name_length(rest),
            '"' => string_length(rest),
            '\'' => quoted_length(rest),
            _ => first.len_utf8(),
        };
        let (token, after) = rest.split_at(length);
        let raw =
            token.ends_with('r') && matches!(token, "r" | "br") && after.starts_with(['"', '#']);
        if raw && let Some(end) = raw_string_length(after) {
            rest = &after[end..];
            continue;
        }
        if !token.starts_with("//") && !token.trim().is_empty() {
            found.push(token.to_owned());
        }
        rest = after;
    }
    found
}

fn name_length(text: &str) -> usize {
    text.find(|c: char| !c.is_ascii_alphanumeric() && c != '_')
        .unwrap_or(text.len())
}

fn string_length(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

/// Length of a raw string's rest after its `r`.
fn raw_string_length(text: &str) -> Option<usize> {
    let hashes = text.find(|c| c != '#')?;
    let inner = text[hashes..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(hashes));
    Some(hashes + 1 + inner.find(&end)? + end.len())
}

/// Length of a character literal; 1 for a lifetime's quote.
fn quoted_length(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match (chars.next(), chars.next()) {
        (Some((_, '\\')), Some(_)) => text[3..].find('\'').map_or(1, |end| end + 4),
        (Some(_), Some((at, '\''))) => at + 1,
        _ => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_comments_hide_no_names() {
        let text = "a::b('\\'', b'x', \"c\\\" d\", r#\"e\"f\"#); // g\nfn h<'i>()";
        let found = tokens(text).join(" ");
        assert_eq!(
            found,
            "a :: b ( '\\'' , b 'x' , \"c\\\" d\" , ) ; fn h < ' i > ( )"
        );
    }
}
