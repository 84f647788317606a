//! Errors as text.
//!
//! The text of an error says what failed; its cause is its
//! [`source`](Error::source) and is not part of the text. [`Chain`] joins both
//! where the program emits a text: on the command line, in an API response, in
//! the log.

use std::error::Error;
use std::fmt;

/// Displays an error, then each of its sources, on one line: `what: why: why`.
///
/// A source whose text is part of the preceding text is omitted, because some
/// libraries repeat it. For `EMFILE` the fix follows, because any operation may
/// reach the limit of open files.
#[derive(Clone, Copy)]
pub struct Chain<'a>(pub &'a (dyn Error + 'a));

/// Fix for `EMFILE`.
const MORE_FILES: &str = "raise the limit of open files (ulimit -n)";

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut line = self.0.to_string();
        let mut next = self.0.source();
        while let Some(source) = next {
            let reason = source.to_string();
            if !line.contains(&reason) {
                line = format!("{line}: {reason}");
            }
            next = source.source();
        }
        let out_of_files = format!("(os error {})", libc::EMFILE);
        if line.contains(&out_of_files) && !line.contains(MORE_FILES) {
            line = format!("{line}; {MORE_FILES}");
        }
        f.write_str(&line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[derive(Debug, thiserror::Error)]
    enum Layer {
        #[error("cannot open the disk")]
        Plain(#[source] io::Error),
        #[error("cannot open the disk ({0})")]
        Repeats(#[source] io::Error),
        #[error(transparent)]
        Transparent(Box<Layer>),
        #[error("cannot build")]
        Outer(#[source] Box<Layer>),
    }

    #[test]
    fn each_reason_is_displayed_once() {
        let reason = || io::Error::from_raw_os_error(2);
        let line = |layer: Layer| Chain(&layer).to_string();
        let plain = "cannot open the disk: No such file or directory (os error 2)";
        assert_eq!(line(Layer::Plain(reason())), plain);
        let nested = Layer::Transparent(Box::new(Layer::Plain(reason())));
        assert_eq!(line(nested), plain);
        let outer = Layer::Outer(Box::new(Layer::Plain(reason())));
        assert_eq!(line(outer), format!("cannot build: {plain}"));
        assert_eq!(
            line(Layer::Repeats(reason())),
            "cannot open the disk (No such file or directory (os error 2))"
        );
        let full = Layer::Plain(io::Error::from_raw_os_error(libc::EMFILE));
        let full = line(Layer::Outer(Box::new(full)));
        assert!(full.ends_with("(os error 24); raise the limit of open files (ulimit -n)"));
        let again = line(Layer::Plain(io::Error::other(full)));
        assert_eq!(again.matches("ulimit").count(), 1, "{again}");
        let custom = Layer::Plain(io::Error::other("the file is a FIFO"));
        assert_eq!(line(custom), "cannot open the disk: the file is a FIFO");
    }
}
