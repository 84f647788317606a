//! Standard output and standard error, which may be closed, full, or a pipe without a reader. A
//! failed write is lost; it neither ends the program nor changes its exit status.

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

/// Prints an error of this program on standard error, without waiting for its reader.
pub fn print_error(message: impl Display) {
    logger::write_last_line(&format!("portcullis: {message}"));
}

/// Prints an error of `portcullis ctl` in the same way.
pub fn print_ctl_error(message: impl Display) {
    logger::write_last_line(&format!("portcullis ctl: {message}"));
}

/// Reports that standard output cannot be written, except when its reader has closed it.
pub fn explain(error: &io::Error) {
    if error.kind() != ErrorKind::BrokenPipe {
        print_error(format_args!("standard output cannot be written: {error}"));
    }
}
