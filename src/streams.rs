//! Standard output and standard error. They may be closed, full, or a pipe without a reader: what
//! cannot be written there is lost, and neither ends the program nor changes its exit status.

use std::fmt::Display;
use std::io::{self, ErrorKind, Write};

use vmm::logger;

/// Prints a line on standard output.
pub fn print_line(line: &str) {
    let mut out = io::stdout().lock();
    let printed = writeln!(out, "{line}").and_then(|()| out.flush());
    if let Err(error) = printed {
        explain(&error);
    }
}

/// Prints a message of this program on standard error, without waiting for its reader.
pub fn complain(message: impl Display) {
    logger::write_last_line(&format!("portcullis: {message}"));
}

/// The same for `portcullis ctl`.
pub fn complain_of_ctl(message: impl Display) {
    logger::write_last_line(&format!("portcullis ctl: {message}"));
}

/// Says why standard output cannot be written. A reader that has left knows.
pub fn explain(error: &io::Error) {
    if error.kind() != ErrorKind::BrokenPipe {
        complain(format_args!("standard output cannot be written: {error}"));
    }
}
