//! Corrections of mistyped words.

/// Returns the candidate closest to `word`, if at most a third of the word's characters differ. One
/// difference is always permitted.
#[must_use]
pub fn closest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let plain = |text: &str| text.to_lowercase().replace('_', "-");
    let word = plain(word);
    let allowed = (word.chars().count() / 3).max(1);
    let distances = candidates
        .into_iter()
        .map(|candidate| (distance(&word, &plain(candidate)), candidate));
    let nearest = distances.min_by_key(|(distance, _)| *distance)?;
    (nearest.0 <= allowed).then_some(nearest.1)
}

/// Joins words as a sentence does: `a, b or c`.
#[must_use]
pub fn either<S: AsRef<str>>(words: &[S]) -> String {
    let words: Vec<&str> = words.iter().map(AsRef::as_ref).collect();
    match words.as_slice() {
        [] => String::new(),
        [only] => (*only).to_owned(),
        [first @ .., last] => format!("{} or {last}", first.join(", ")),
    }
}

/// Edit distance in characters: insert, remove, replace, or exchange with the neighbour (optimal
/// string alignment). A word longer than 64 characters has its own length as the distance to any
/// other.
fn distance(from: &str, to: &str) -> usize {
    let longest = from.chars().count().max(to.chars().count());
    match longest {
        65.. => longest,
        _ => strsim::osa_distance(from, to),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn near_words_are_found_and_far_ones_are_not() {
        let words = ["kernel_image_path", "initrd_path", "boot_args", "id"];
        let of = |word| closest(word, words);
        assert_eq!(of("kernle_image_path"), Some("kernel_image_path"));
        assert_eq!(of("kernel-image-path"), Some("kernel_image_path"));
        assert_eq!(of("BootArgs"), Some("boot_args"));
        assert_eq!(of("di"), Some("id"));
        assert_eq!(of("size"), None);
        assert_eq!(of(""), None);
        assert_eq!(of(&"x".repeat(100_000)), None);
        assert_eq!(closest("a", []), None);
    }

    #[test]
    fn distances_count_each_change_once() {
        for (from, to, changes) in [
            ("", "", 0),
            ("ab", "ba", 1),
            ("abc", "ac", 1),
            ("x", "yz", 2),
        ] {
            assert_eq!(distance(from, to), changes, "{from} to {to}");
        }
    }
}
