//! Slowness of the host relative to a quiet machine, and its effect on time limits.
//!
//! Shared by the boot tests and `xtask`, which measures the start only.

use std::time::Duration;

/// Upper bound: a slower host is not usable.
const MOST: f64 = 6.0;
/// Seconds from the kernel's start of an emulated host to the start of its job, on a quiet machine.
const QUIET_START_S: f64 = 6.0;

/// Slowness, from 1 to [`MOST`], of a host whose start takes `seconds`.
pub fn of_start(seconds: f64) -> f64 {
    bounded(seconds / QUIET_START_S)
}

/// Slowness, from 1 to [`MOST`], of a host that takes `times` for equal computations: interrupted
/// ones take longer than the fastest.
#[allow(dead_code, reason = "xtask measures nothing but the start")]
pub fn of_computations(times: &[Duration]) -> f64 {
    let fastest = times.iter().min().map_or(0.0, Duration::as_secs_f64);
    let sum: f64 = times.iter().map(Duration::as_secs_f64).sum();
    let count = u32::try_from(times.len()).unwrap_or(u32::MAX);
    bounded(sum / f64::from(count) / fastest)
}

/// Extends a quiet machine's limit by the slowness.
pub fn scaled(limit: Duration, slowness: f64) -> Duration {
    limit.mul_f64(bounded(slowness))
}

fn bounded(slowness: f64) -> f64 {
    if slowness.is_nan() {
        // A division by zero.
        return 1.0;
    }
    slowness.clamp(1.0, MOST)
}
