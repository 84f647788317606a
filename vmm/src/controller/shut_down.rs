//! The end of a machine.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use super::life::{Running, STOP_TIMEOUT};
use crate::console::terminal;
use crate::signals::{Signal, Signals};

/// Interval between polls of the signals while the devices stop.
const SIGNAL_POLL: Duration = Duration::from_millis(100);
/// Time without progress after which the last console output of an ended
/// machine is dropped.
const OUTPUT_TIMEOUT: Duration = Duration::from_secs(5);

/// Drops the machine, and flushes its last output. A vCPU or device that does
/// not stop until `deadline` is left to the end of the process.
pub(super) fn shut_down(running: Running, signals: &Signals, deadline: Instant) {
    let Running { machine, queries } = running;
    let output = machine.output();
    let is_idle = machine.vcpus.is_idle();
    if !wait_until(deadline, signals, &queries.tear_down(machine)) {
        let who = if is_idle { "a device" } else { "a vCPU" };
        log::warn!("{who} does not stop, and is left to the end of the process");
    }
    let left = output.flush(OUTPUT_TIMEOUT);
    if left != 0 {
        log::warn!("console: the last {left} bytes were not read, and are lost");
    }
    terminal::restore();
}

/// Waits for a message until `deadline`. A terminating signal shortens it to
/// [`STOP_TIMEOUT`].
fn wait_until(mut deadline: Instant, signals: &Signals, message: &Receiver<()>) -> bool {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match message.recv_timeout(left.min(SIGNAL_POLL)) {
            Ok(()) => return true,
            Err(RecvTimeoutError::Timeout) if !left.is_zero() => {}
            Err(_) => return false,
        }
        if signals.take().any(|signal| signal == Signal::Terminate) {
            deadline = deadline.min(Instant::now() + STOP_TIMEOUT);
        }
    }
}
