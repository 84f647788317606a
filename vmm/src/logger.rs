//! The log: lines on standard error, or appended to a file.
//!
//! A line is `[seconds since start] level module: text`. The file is opened
//! non-blocking, so that a FIFO nobody reads costs lines and never time.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Instant;

use devices::host_file;
use log::{LevelFilter, Log, Metadata, Record};

use crate::config::{self, ConfigError};

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// The process's logger, for the `log` crate.
struct Logger {
    start: Instant,
    state: Mutex<State>,
}

struct State {
    /// Standard error when `None`.
    file: Option<File>,
    show_level: bool,
    show_origin: bool,
    /// Only modules whose path starts with this.
    module: String,
}

/// Starts logging to standard error, at level `info`. Later calls do nothing.
pub fn start() {
    let logger = LOGGER.get_or_init(|| Logger {
        start: Instant::now(),
        state: Mutex::new(State {
            file: None,
            show_level: true,
            show_origin: true,
            module: String::new(),
        }),
    });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Changes what `settings` gives and leaves the rest.
///
/// # Errors
/// The file cannot be opened; nothing has changed then.
pub fn configure(settings: &config::Logger) -> Result<(), ConfigError> {
    let file = match &settings.log_path {
        Some(path) => {
            let path = Path::new(path);
            let opened = host_file::open_output(path);
            Some(opened.map_err(|error| ConfigError::of_file("log_path", path, &error))?)
        }
        None => None,
    };
    if let Some(logger) = LOGGER.get() {
        let mut state = logger.lock();
        if file.is_some() {
            state.file = file;
        }
        state.show_level = settings.show_level.unwrap_or(state.show_level);
        state.show_origin = settings.show_log_origin.unwrap_or(state.show_origin);
        if let Some(module) = &settings.module {
            state.module.clone_from(module);
        }
    }
    if let Some(level) = settings.level {
        log::set_max_level(level.filter());
    }
    Ok(())
}

impl Logger {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Log for Logger {
    fn enabled(&self, metadata: &Metadata) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &Record) {
        let mut state = self.lock();
        let origin = record.module_path().unwrap_or_default();
        if !self.enabled(record.metadata()) || !origin.starts_with(&state.module) {
            return;
        }
        let line = line(&state, self.start.elapsed().as_secs_f64(), record);
        // There is nowhere left to say that the log cannot be written.
        let _ = match &mut state.file {
            Some(file) => file.write_all(line.as_bytes()),
            None => io::stderr().write_all(line.as_bytes()),
        };
    }

    fn flush(&self) {}
}

/// One line, in one write: two processes may append to one file.
fn line(state: &State, seconds: f64, record: &Record) -> String {
    use std::fmt::Write as _;
    let mut line = format!("[{seconds:11.6}] ");
    // Writing to a string does not fail.
    if state.show_level {
        let level = record.level().as_str().to_ascii_lowercase();
        let _ = write!(line, "{level} ");
    }
    if state.show_origin {
        let _ = write!(line, "{}: ", record.module_path().unwrap_or("?"));
    }
    let text = record.args().to_string();
    // A file name or a guest's string makes no lines and moves no cursor.
    line.extend(text.chars().map(|c| if c.is_control() { ' ' } else { c }));
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formatted(show_level: bool, show_origin: bool, text: &str) -> String {
        let state = State {
            file: None,
            show_level,
            show_origin,
            module: String::new(),
        };
        let mut record = Record::builder();
        record.level(log::Level::Warn).module_path(Some("vmm::x"));
        line(&state, 1.5, &record.args(format_args!("{text}")).build())
    }

    #[test]
    fn a_record_is_one_line_with_what_was_asked_for() {
        assert_eq!(
            formatted(true, true, "a\nb"),
            "[   1.500000] warn vmm::x: a b\n"
        );
        assert_eq!(formatted(false, false, "a"), "[   1.500000] a\n");
    }

    #[test]
    fn a_log_file_that_cannot_be_opened_is_named() {
        let settings = config::Logger {
            log_path: Some("/nowhere/log".into()),
            ..config::Logger::default()
        };
        let error = configure(&settings).unwrap_err().to_string();
        assert!(
            error.starts_with("log_path: /nowhere/log cannot be opened to append: No such file"),
            "{error}"
        );
    }
}
