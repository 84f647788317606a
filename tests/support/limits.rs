//! Time limits that follow the host: an emulator on a busy machine is no broken monitor.

use std::env;
use std::hint::black_box;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::slowness;

/// Computations whose times are compared.
const COMPUTATIONS: usize = 30;
/// Steps of each: a millisecond or two in an emulated host, less than its turn on the processor.
const STEPS: u64 = 200_000;
/// How often a program says that it goes on: far below the silence after which the lab takes the
/// host for hung.
const SIGN_OF_LIFE: Duration = Duration::from_secs(60);

/// Slowness when it was last measured: the bits of an `f64`; 0, which is 0.0, at first.
static MEASURED: AtomicU64 = AtomicU64::new(0);

/// The limit that applies now, for a limit that is generous on a quiet machine.
pub fn scaled(limit: Duration) -> Duration {
    let measured = f64::from_bits(MEASURED.load(Ordering::Relaxed));
    slowness::scaled(limit, measured.max(at_start()))
}

/// Slowness of the host's own start, as the lab passes it on.
fn at_start() -> f64 {
    let seconds = env::var("PORTCULLIS_HOST_START_SECONDS").ok();
    seconds.map_or(1.0, |text| {
        let seconds = text.parse();
        slowness::of_start(seconds.expect("PORTCULLIS_HOST_START_SECONDS is a number"))
    })
}

/// Measures the slowness. To be called while no guest runs: it would be part of it.
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

/// Has a thread say now and then that the program goes on, whatever a test waits for.
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
