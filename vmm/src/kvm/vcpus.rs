//! The vCPU threads: pause, resume, stop.
//!
//! A pause and a stop are requests. The last vCPU thread that complies makes a
//! callback, so that the requesting thread never waits for a vCPU that is
//! inside a device.
#![allow(unsafe_code)] // The kick's signal handler writes to the kvm_run page.

use std::cell::Cell;
use std::ptr::{self, NonNull};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Once, PoisonError};
use std::thread::JoinHandle;

use devices::bus::Bus;
use devices::pause::PauseRequest;
use devices::thread::{ThreadKind, set_vcpu, spawn};
use kvm_bindings::kvm_run;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::{Error, Exit, Vcpu};
use crate::ending::Ending;

/// The buses that handle the guest's accesses.
#[derive(Clone)]
pub(crate) struct Buses {
    /// I/O ports (x86_64).
    pub pio: Arc<Bus>,
    /// Guest physical addresses outside RAM.
    pub mmio: Arc<Bus>,
    /// Interrupts the devices' work on a request to pause or stop.
    pub pause: Arc<PauseRequest>,
}

/// A processor that a thread runs: a [`Vcpu`], or a fake of the tests.
pub(crate) trait Processor: Send + 'static {
    /// Number of the vCPU, from 0.
    fn index(&self) -> u32;
    /// Runs the guest until an exit, or until `immediate_exit` is set in
    /// [`Self::run_page`].
    fn run(&mut self) -> Exit<'_>;
    /// The page shared with the kernel. Its address does not change until the
    /// processor is dropped.
    fn run_page(&mut self) -> *mut kvm_run;
    /// Clears a kick, so that the next [`Self::run`] enters the guest.
    fn clear_kick(&mut self);
    /// The registers as text for a crash report.
    fn registers(&mut self) -> String;
    /// Reports to the guest's watchdogs that it did not run. Called after a
    /// pause, before the next [`Self::run`].
    fn report_pause(&self);
}

impl Processor for Vcpu {
    fn index(&self) -> u32 {
        self.index()
    }

    fn run(&mut self) -> Exit<'_> {
        self.run()
    }

    fn run_page(&mut self) -> *mut kvm_run {
        self.run_page()
    }

    fn clear_kick(&mut self) {
        self.clear_kick();
    }

    fn registers(&mut self) -> String {
        self.registers()
    }

    fn report_pause(&self) {
        self.report_pause();
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RequestedState {
    Paused,
    Running,
    Stopped,
}

#[derive(Debug)]
struct State {
    requested: RequestedState,
    /// Threads that wait to be resumed or have ended.
    parked: usize,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    pause: Arc<PauseRequest>,
    /// Number of vCPU threads.
    total: usize,
    on_idle: OnIdle,
}

/// Called when no vCPU executes any more, on the last vCPU thread.
type OnIdle = Box<dyn Fn() + Send + Sync>;

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // Two plain values, consistent at any time.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_requested(&self, requested: RequestedState) {
        self.state().requested = requested;
        self.changed.notify_all();
    }

    /// Counts the calling thread as parked.
    fn park(&self, mut state: MutexGuard<'_, State>) {
        state.parked += 1;
        let last = state.parked == self.total;
        drop(state);
        if last {
            (self.on_idle)();
        }
    }

    /// Waits while a pause is requested.
    fn wait(&self) -> NextStep {
        let state = self.state();
        if state.requested != RequestedState::Paused {
            return NextStep::from(state.requested, false);
        }
        self.park(state);
        let waited = self.changed.wait_while(self.state(), |state| {
            state.requested == RequestedState::Paused
        });
        let mut state = waited.unwrap_or_else(PoisonError::into_inner);
        state.parked -= 1;
        NextStep::from(state.requested, true)
    }
}

/// Next step of a vCPU thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum NextStep {
    /// Run the guest.
    Run {
        /// The thread was parked since it last ran.
        was_paused: bool,
    },
    /// End the thread.
    End,
}

impl NextStep {
    fn from(requested: RequestedState, was_paused: bool) -> Self {
        match requested {
            RequestedState::Stopped => Self::End,
            RequestedState::Running | RequestedState::Paused => Self::Run { was_paused },
        }
    }
}

/// All vCPU threads of a VM. Dropping it stops and joins them, which waits for
/// a vCPU inside a device: see [`Self::request_stop`].
pub(crate) struct Vcpus {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Vcpus {
    /// Starts a paused thread for each vCPU: [`Self::resume`] starts the guest.
    ///
    /// `on_end` is called on the thread of the vCPU that ended the guest. That
    /// thread runs no guest afterwards; the others do until
    /// [`Self::request_stop`]. `on_idle` is called on the last thread that
    /// complies with a request, when [`Self::is_idle`] is true. Neither may
    /// block, nor call back into this object.
    ///
    /// # Errors
    /// No thread is available.
    pub(crate) fn spawn<P: Processor>(
        vcpus: Vec<P>,
        buses: &Buses,
        on_end: impl Fn(Ending) + Send + Sync + 'static,
        on_idle: impl Fn() + Send + Sync + 'static,
    ) -> Result<Self, Error> {
        install_kick();
        let on_end: Arc<dyn Fn(Ending) + Send + Sync> = Arc::new(on_end);
        let state = Mutex::new(State {
            requested: RequestedState::Paused,
            parked: 0,
        });
        let shared = Arc::new(Shared {
            state,
            changed: Condvar::new(),
            pause: Arc::clone(&buses.pause),
            total: vcpus.len(),
            on_idle: Box::new(on_idle),
        });
        // From here on an error drops, and so joins, the threads that have
        // started.
        let mut this = Self {
            shared,
            threads: Vec::with_capacity(vcpus.len()),
        };
        for vcpu in vcpus {
            let index = vcpu.index();
            let (shared, buses) = (Arc::clone(&this.shared), buses.clone());
            let on_end = Arc::clone(&on_end);
            let work = move || {
                set_vcpu(index);
                run(vcpu, &shared, &buses, &*on_end);
            };
            let thread = spawn(ThreadKind::Vcpu, format!("vcpu{index}"), work);
            this.threads
                .push(thread.map_err(|source| Error::Thread { index, source })?);
        }
        Ok(this)
    }

    /// Lets the guest run. Withdraws a request to pause.
    pub(crate) fn resume(&self) {
        self.shared.pause.clear();
        self.shared.set_requested(RequestedState::Running);
    }

    /// Requests every vCPU to pause. Returns at once; [`Self::is_idle`] is true
    /// when all have paused.
    pub(crate) fn request_pause(&self) {
        self.request(RequestedState::Paused);
    }

    /// Requests every thread to end. Returns at once; dropping this object does
    /// not wait once [`Self::is_idle`] is true.
    pub(crate) fn request_stop(&self) {
        self.request(RequestedState::Stopped);
    }

    /// Whether no vCPU executes, and none is inside a device. It stays true
    /// until [`Self::resume`].
    #[must_use]
    pub(crate) fn is_idle(&self) -> bool {
        self.shared.state().parked == self.shared.total
    }

    fn request(&self, requested: RequestedState) {
        self.shared.pause.set();
        self.shared.set_requested(requested);
        self.kick();
    }

    fn kick(&self) {
        for thread in &self.threads {
            // An error means that the thread has ended.
            let _ = thread.kill(SIGRTMIN());
        }
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        self.request_stop();
        for thread in self.threads.drain(..) {
            let name = thread.thread().name().unwrap_or("vcpu").to_owned();
            if thread.join().is_err() {
                log::error!("thread {name} panicked");
            }
        }
    }
}

thread_local! {
    /// The kvm_run page of the vCPU that this thread runs, else null.
    static RUN_PAGE: Cell<*mut kvm_run> = const { Cell::new(ptr::null_mut()) };
}

/// Publishes the page to the signal handler, for as long as the vCPU lives.
struct RunPageGuard;

impl RunPageGuard {
    fn new(page: *mut kvm_run) -> Self {
        RUN_PAGE.set(page);
        Self
    }
}

impl Drop for RunPageGuard {
    fn drop(&mut self) {
        RUN_PAGE.set(ptr::null_mut());
    }
}

/// Interrupts KVM_RUN, or makes the next one return at once: so a kick that
/// comes between the check of the state and KVM_RUN is not lost.
extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(page) = NonNull::new(RUN_PAGE.get()) {
        // SAFETY: `RunPageGuard` publishes the page of this thread's own vCPU only
        // while that is alive. The field is one byte that the kernel reads
        // too; the write is volatile because the interrupted code does not
        // expect it.
        unsafe { ptr::write_volatile(&raw mut (*page.as_ptr()).immediate_exit, 1) };
    }
}

fn install_kick() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = register_signal_handler(SIGRTMIN(), on_kick) {
            log::error!("installing the vCPU kick handler: {error}");
        }
    });
}

fn run(mut vcpu: impl Processor, shared: &Shared, buses: &Buses, on_end: &dyn Fn(Ending)) {
    let end = {
        let page = vcpu.run_page();
        // Dropped before `vcpu`, whose page it publishes.
        let _guard = RunPageGuard::new(page);
        run_until_end(&mut vcpu, shared, buses)
    };
    shared.park(shared.state());
    if let Some(end) = end {
        on_end(end);
    }
}

/// Runs the guest until it ends; `None` when a stop is requested.
fn run_until_end(vcpu: &mut impl Processor, shared: &Shared, buses: &Buses) -> Option<Ending> {
    let mut has_run = false;
    while let NextStep::Run { was_paused } = shared.wait() {
        if was_paused && has_run {
            vcpu.report_pause();
        }
        has_run = true;
        shared.pause.resume_deferred();
        loop {
            match vcpu.run() {
                Exit::MmioRead { address, data } => {
                    buses.mmio.read(address, data);
                }
                Exit::MmioWrite { address, data } => {
                    buses.mmio.write(address, data);
                }
                Exit::PioRead { port, size, data } => {
                    for unit in data.chunks_exact_mut(size) {
                        buses.pio.read(u64::from(port), unit);
                    }
                }
                Exit::PioWrite { port, size, data } => {
                    for unit in data.chunks_exact(size) {
                        buses.pio.write(u64::from(port), unit);
                    }
                }
                Exit::Interrupted => {
                    // Cleared before the state is read: a later kick sets it
                    // again.
                    vcpu.clear_kick();
                    break;
                }
                Exit::PowerOff => return Some(Ending::PoweredOff),
                Exit::Reset => return Some(Ending::Reset),
                Exit::Crash(reason) => return Some(crash(vcpu, &reason)),
            }
            shared.pause.resume_deferred();
        }
    }
    None
}

/// Logs the registers of a vCPU that cannot continue.
fn crash(vcpu: &mut impl Processor, reason: &str) -> Ending {
    let index = vcpu.index();
    log::error!("vCPU {index}: {reason}");
    for line in vcpu.registers().lines() {
        log::error!("{line}");
    }
    Ending::Crashed(format!(
        "{reason} on vCPU {index}; its registers are in the log"
    ))
}

#[cfg(test)]
mod tests;
