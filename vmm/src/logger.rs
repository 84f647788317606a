//! The log: lines on standard error, or appended to a file.
//!
//! A line is `[seconds since start] level module: text`, at most 4096
//! bytes. Logging never waits for a reader: while standard error or a FIFO is
//! full, lines are lost, and the next written line reports their number.
//! Frequent lines of one call site are omitted, and counted too.

mod handler;
mod rate;
mod stream;

use std::fs::File;
use std::io::{self, Write as _};
use std::path::Path;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use devices::host_file;
use log::{Level, LevelFilter, Log, Metadata, Record};

pub(crate) use self::handler::write_from_handler;
use self::rate::{CallSite, Limiter};
use self::stream::Stream;
use crate::config::{self, ConfigError};

/// Upper bound on the bytes of a line. Linux writes as many to a pipe at once or not at all
/// (`PIPE_BUF`), so that lines of several writers do not mix.
const MAX_LINE: usize = 4096;

static LOGGER: OnceLock<Logger> = OnceLock::new();

/// The process's logger, for the `log` crate.
struct Logger {
    start: Instant,
    state: Mutex<State>,
}

struct State {
    /// Replaces standard error.
    file: Option<File>,
    /// `None` when the process has no standard error.
    standard_error: Option<Stream>,
    show_level: bool,
    show_origin: bool,
    /// Only modules whose path starts with this text are logged.
    module: String,
    limiter: Limiter,
    /// Lines that could not be written since the last written one.
    lost: u64,
}

impl State {
    fn new(standard_error: Option<Stream>) -> Self {
        Self {
            file: None,
            standard_error,
            show_level: true,
            show_origin: true,
            module: String::new(),
            limiter: Limiter::default(),
            lost: 0,
        }
    }
}

/// Starts logging to standard error, at level `info`. Later calls do nothing.
pub fn start() {
    let logger = LOGGER.get_or_init(|| {
        let standard_error = stream::standard_error();
        if let Some(stream) = &standard_error {
            handler::set_standard_error(stream);
        }
        Logger {
            start: Instant::now(),
            state: Mutex::new(State::new(standard_error)),
        }
    });
    if log::set_logger(logger).is_ok() {
        log::set_max_level(LevelFilter::Info);
    }
}

/// Changes the settings that are present in `settings`.
///
/// # Errors
/// The file cannot be opened; nothing has changed.
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
        if let Some(file) = file {
            handler::set_file(&file);
            state.file = Some(file);
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
        let site: CallSite = (
            record.file_static().unwrap_or_default(),
            record.line().unwrap_or(0),
        );
        let now = self.start.elapsed();
        let Some(left_out) = state.limiter.admit(site, now) else {
            return;
        };
        if left_out != 0 {
            let text = format!("{left_out} lines like the next were left out");
            state.write(now, record.level(), origin, &text);
        }
        state.write(now, record.level(), origin, &record.args().to_string());
    }

    /// Writes the counts of omitted and lost lines that no later line reports.
    fn flush(&self) {
        let mut state = self.lock();
        let now = self.start.elapsed();
        for (site, count) in state.limiter.take_left_out() {
            let (file, line) = site;
            let text = format!("{count} lines of {file}:{line} were left out");
            state.write(now, Level::Warn, module_path!(), &text);
        }
    }
}

impl State {
    /// Writes a line, after one that reports the lost lines.
    fn write(&mut self, now: Duration, level: Level, origin: &str, text: &str) {
        if self.lost != 0 {
            let report = format!("{} lines of the log were lost", self.lost);
            let report = self.line(now, Level::Warn, module_path!(), &report);
            if self.put(&report).is_ok() {
                self.lost = 0;
            }
        }
        let line = self.line(now, level, origin, text);
        if self.put(&line).is_err() {
            self.lost = self.lost.saturating_add(1);
        }
    }

    fn put(&mut self, line: &str) -> io::Result<()> {
        match (&mut self.file, &mut self.standard_error) {
            (Some(file), _) => file.write_all(line.as_bytes()),
            (None, Some(stream)) => stream.write(line.as_bytes()),
            (None, None) => Ok(()),
        }
    }

    /// Formats one line, for one write: two processes may append to one file.
    fn line(&self, now: Duration, level: Level, origin: &str, text: &str) -> String {
        use std::fmt::Write as _;
        let mut line = String::new();
        if let (None, Some(stream)) = (&self.file, &self.standard_error) {
            line.push_str(stream.priority(level));
        }
        // Writing to a string does not fail.
        let _ = write!(line, "[{:11.6}] ", now.as_secs_f64());
        if self.show_level {
            let _ = write!(line, "{} ", level.as_str().to_ascii_lowercase());
        }
        if self.show_origin {
            let _ = write!(line, "{origin}: ");
        }
        // A file name or a guest's string adds no line and moves no cursor.
        for character in text.chars() {
            if line.len() + character.len_utf8() >= MAX_LINE {
                break;
            }
            line.push(if character.is_control() {
                ' '
            } else {
                character
            });
        }
        line.push('\n');
        line
    }
}

/// Writes the counts of omitted lines that no later line reports. Called when
/// the process ends.
pub fn finish() {
    log::logger().flush();
}

/// Writes a line to standard error without waiting for its reader, also before
/// the logger is started. For an error that ends the process.
pub fn write_last_line(line: &str) {
    let write = |stream: &mut Stream| {
        let line = format!("{}{line}\n", stream.priority(Level::Error));
        stream.write(line.as_bytes())
    };
    // A thread that panics inside the logger holds its lock.
    let mut state = LOGGER.get().and_then(|it| it.state.try_lock().ok());
    let open = state.as_mut().and_then(|it| it.standard_error.as_mut());
    // A failed write has no other place to be reported.
    let _ = match open {
        Some(stream) => write(stream),
        None => stream::standard_error().map_or(Ok(()), |mut it| write(&mut it)),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formatted(show_level: bool, show_origin: bool, text: &str) -> String {
        let state = State {
            show_level,
            show_origin,
            ..State::new(None)
        };
        let now = Duration::from_millis(1500);
        state.line(now, Level::Warn, "vmm::x", text)
    }

    #[test]
    fn a_record_is_one_line_with_the_configured_parts() {
        assert_eq!(
            formatted(true, true, "a\nb"),
            "[   1.500000] warn vmm::x: a b\n"
        );
        assert_eq!(formatted(false, false, "a"), "[   1.500000] a\n");
    }

    #[test]
    fn line_is_never_longer_than_an_atomic_write_to_a_pipe() {
        let line = formatted(true, true, &"\u{20ac}".repeat(3000));
        assert!(
            (MAX_LINE - 3..=MAX_LINE).contains(&line.len()),
            "{}",
            line.len()
        );
        assert!(line.ends_with("\u{20ac}\n"));
    }

    #[test]
    fn lines_lost_at_a_full_pipe_are_counted_in_the_next_that_is_written() {
        use std::io::Read as _;
        use std::os::fd::AsFd as _;
        let (mut reader, writer) = io::pipe().unwrap();
        let mut state = State::new(Stream::of(writer.as_fd()).ok());
        let text = "x".repeat(1000);
        let mut written = 0;
        while state.lost < 3 {
            state.write(Duration::ZERO, Level::Info, "a", &text);
            written += usize::from(state.lost == 0);
        }
        let mut bytes = vec![0; written * (text.len() + 23)];
        reader.read_exact(&mut bytes).unwrap();
        state.write(Duration::ZERO, Level::Info, "a", "again");
        drop((state, writer));
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        let lines: Vec<_> = rest.lines().collect();
        assert_eq!(lines.len(), 2, "{rest}");
        assert!(lines[0].ends_with("3 lines of the log were lost"), "{rest}");
        assert!(lines[1].ends_with("again"), "{rest}");
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
