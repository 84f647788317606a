//! Errors of the command line, in one line.

use crate::streams;
use clap::error::ErrorKind;
use std::process::ExitCode;

/// Exit status for an unusable command line or configuration.
pub const USAGE_STATUS: u8 = 2;

/// Prints the parser's text: the help unchanged, an error as one line.
pub fn answer(error: &clap::Error) -> ExitCode {
    if error.use_stderr() && error.kind() != HELP_INSTEAD {
        let line = refusal(error);
        streams::print_error(line);
        return ExitCode::from(USAGE_STATUS);
    }
    // A closed reader needs no help text.
    let _ = error.print();
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(USAGE_STATUS))
}

/// The parser shows the help in place of an error: no argument was given.
const HELP_INSTEAD: ErrorKind = ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;

/// The fault of the command line, and the fix.
pub fn refusal(error: &clap::Error) -> String {
    let line = one_line(&error.render().to_string());
    match error.kind() {
        ErrorKind::UnknownArgument | ErrorKind::InvalidSubcommand if !line.contains("tip: ") => {
            format!("{line}; see --help")
        }
        _ => line,
    }
}

/// The error and the tips of the parser's text, without the usage below them.
fn one_line(text: &str) -> String {
    let text = text.strip_prefix("error: ").unwrap_or(text);
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
    let mut joined = String::new();
    for line in lines.take_while(|line| !is_trailer(line)) {
        if !joined.is_empty() {
            joined.push_str(if joined.ends_with(':') { " " } else { "; " });
        }
        joined.push_str(line);
    }
    let printable = joined.chars().map(|c| if c.is_control() { '?' } else { c });
    printable.collect()
}

fn is_trailer(line: &str) -> bool {
    line.starts_with("Usage: ") || line.starts_with("For more information")
}
