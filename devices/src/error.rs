//! Errors as text.
//!
//! The text of an error says what failed; the error it came from is its
//! [`source`](Error::source) and is not part of the text. [`Chain`] joins both
//! where a text leaves the program: on the command line, in an API response, in
//! the log.

use std::error::Error;
use std::fmt;

/// Displays an error, then each of its sources, on one line: `what: why: why`.
///
/// A source whose text is in what precedes it is left out, for some libraries
/// repeat theirs.
#[derive(Clone, Copy)]
pub struct Chain<'a>(pub &'a (dyn Error + 'a));

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
        let custom = Layer::Plain(io::Error::other("the file is a FIFO"));
        assert_eq!(line(custom), "cannot open the disk: the file is a FIFO");
    }
}
