//! Counters of the monitor: plain atomics, incremented where the event happens
//! and read on request.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use devices::host_file::{self, FileError};
use devices::legacy::SerialCounters;

use crate::action::{MachineState, MetricFamily, metrics_json};

/// Counters of the monitor.
#[derive(Debug, Default)]
pub(crate) struct Metrics {
    /// Actions that succeeded.
    pub actions_done: AtomicU64,
    /// Actions that were refused or failed.
    pub actions_failed: AtomicU64,
    /// Counters of the serial port.
    pub serial: Arc<SerialCounters>,
}

impl Metrics {
    /// Returns all metrics with their current values, and `devices` after them.
    pub(crate) fn families(
        &self,
        state: MachineState,
        devices: Vec<MetricFamily>,
    ) -> Vec<MetricFamily> {
        let counter = |name, help, value: &AtomicU64| {
            let value = value.load(Ordering::Relaxed);
            MetricFamily::single(name, help, value)
        };
        let mut families = vec![
            MetricFamily::single(
                "portcullis_running",
                "Whether the guest's processors run.",
                u64::from(state == MachineState::Running),
            ),
            counter(
                "portcullis_actions_done_total",
                "Actions that were done.",
                &self.actions_done,
            ),
            counter(
                "portcullis_actions_failed_total",
                "Actions that were refused or failed.",
                &self.actions_failed,
            ),
            counter(
                "portcullis_serial_received_bytes_total",
                "Bytes the guest read from its serial port.",
                &self.serial.received,
            ),
            counter(
                "portcullis_serial_transmitted_bytes_total",
                "Bytes the guest wrote to its serial port.",
                &self.serial.transmitted,
            ),
            counter(
                "portcullis_serial_lost_bytes_total",
                "Bytes the guest wrote to its serial port while it was busy.",
                &self.serial.lost,
            ),
        ];
        families.extend(devices);
        families
    }
}

/// The file of `PUT /metrics`: one JSON object a line.
#[derive(Debug)]
pub(crate) struct MetricsFile(File);

impl MetricsFile {
    /// Opens `path` for appending.
    ///
    /// # Errors
    /// The file cannot be opened or created.
    pub(crate) fn open(path: &Path) -> Result<Self, FileError> {
        host_file::open_output(path).map(Self)
    }

    /// Appends a line.
    ///
    /// # Errors
    /// The line cannot be written now: a FIFO without a reader, or a full file
    /// system.
    pub(crate) fn append(&mut self, families: &[MetricFamily]) -> io::Result<()> {
        // A clock before 1970 counts as 1970.
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = u64::try_from(now.unwrap_or_default().as_millis()).unwrap_or(u64::MAX);
        let mut line = metrics_json(families, now);
        line.push('\n');
        self.0.write_all(line.as_bytes())
    }
}
