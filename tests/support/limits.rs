//! Time limits scaled to the host: an emulator on a busy machine is slower, without a fault of the
//! monitor.

use std::env;
use std::hint::black_box;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::slowness;

/// Number of computations whose times are compared.
const COMPUTATIONS: usize = 30;
/// Steps of each computation: one or two milliseconds in an emulated host, less than a time slice.
const STEPS: u64 = 200_000;
/// Interval of the program's progress lines: far below the silence after which the lab treats the
/// host as hung.
const SIGN_OF_LIFE: Duration = Duration::from_secs(60);

/// Last measured slowness: the bits of an `f64`; 0, which is 0.0, at first.
static MEASURED: AtomicU64 = AtomicU64::new(0);

/// Scales a limit for a quiet machine by the current slowness.
pub fn scaled(limit: Duration) -> Duration {
    let measured = f64::from_bits(MEASURED.load(Ordering::Relaxed));
    slowness::scaled(limit, measured.max(at_start()))
}

/// Slowness of the host's own start, from the lab's environment variable.
fn at_start() -> f64 {
    let seconds = env::var("PORTCULLIS_HOST_START_SECONDS").ok();
    seconds.map_or(1.0, |text| {
        let seconds = text.parse();
        slowness::of_start(seconds.expect("PORTCULLIS_HOST_START_SECONDS is a number"))
    })
}

/// Measures the slowness. Call it while no guest runs: a guest would slow it down.
pub fn measure() {
    let times: Vec<Duration> = (0..COMPUTATIONS).map(|_| computation()).collect();
    let measured = slowness::of_computations(&times);
    MEASURED.store(measured.to_bits(), Ordering::Relaxed);
    if measured > 2.0 {
        super::say_now(&format!("--- the host is {measured:.1} times slower"));
    }
}

fn computation() -> Duration {
    let started = Instant::now();
    let mut state = black_box(1_u64);
    for _ in 0..STEPS {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
    }
    black_box(state);
    started.elapsed()
}

/// Starts a thread that prints a progress line at intervals, during every wait of a test.
pub fn show_life() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        thread::spawn(|| {
            loop {
                thread::sleep(SIGN_OF_LIFE);
                super::say_now("--- still running");
            }
        });
    });
}
