//! Writes metrics to their file, on request and every minute.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::Duration;

use vmm_sys_util::timerfd::TimerFd;

use crate::action::{ActionError, MetricFamily};
use crate::config::ConfigError;
use crate::metrics::MetricsFile;

/// Interval between two lines.
const PERIOD: Duration = Duration::from_secs(60);

/// The metrics file, if one is configured, and a timer that is readable when a
/// line is due.
pub(super) struct Recorder {
    file: Option<MetricsFile>,
    timer: TimerFd,
}

impl Recorder {
    /// A recorder without a file.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub(super) fn new() -> io::Result<Self> {
        let timer = TimerFd::new()?;
        Ok(Self { file: None, timer })
    }

    /// Appends to `path` from now on.
    ///
    /// # Errors
    /// The file cannot be opened; nothing has changed.
    pub(super) fn open(&mut self, path: &str) -> Result<(), ConfigError> {
        let path = Path::new(path);
        let file = MetricsFile::open(path)
            .map_err(|error| ConfigError::of_file("metrics_path", path, &error))?;
        self.file = Some(file);
        self.rearm();
        Ok(())
    }

    /// Checks that a file is configured.
    ///
    /// # Errors
    /// There is none.
    pub(super) fn check(&self) -> Result<(), ActionError> {
        match self.file {
            Some(_) => Ok(()),
            None => Err(ActionError::Failed(
                "there is no file for metrics; PUT /metrics first".into(),
            )),
        }
    }

    /// Appends a line of metrics.
    ///
    /// # Errors
    /// There is no file, or it cannot be written.
    pub(super) fn append(&mut self, families: &[MetricFamily]) -> Result<(), ActionError> {
        self.check()?;
        let appended = self.file.as_mut().map(|file| file.append(families));
        appended
            .unwrap_or(Ok(()))
            .map_err(|error| ActionError::Failed(format!("writing metrics: {error}")))
    }

    /// Returns true once for each due line. The timer is one-shot and is not
    /// read, because a read can block.
    pub(super) fn is_due(&mut self) -> bool {
        if self.file.is_none() || self.timer.is_armed().unwrap_or(true) {
            return false;
        }
        self.rearm();
        true
    }

    fn rearm(&mut self) {
        if let Err(error) = self.timer.reset(PERIOD, None) {
            log::warn!("metrics are written on request only: {error}");
        }
    }
}

impl AsRawFd for Recorder {
    fn as_raw_fd(&self) -> RawFd {
        self.timer.as_raw_fd()
    }
}
