//! Signals of the host, as events of the loop.
#![allow(unsafe_code)] // Asks for the disposition of a signal, stops and ends the process.

use std::io;
use std::mem::zeroed;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use libc::{
    SIGCONT, SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGTSTP, SIGTTIN, SIGTTOU, SIGXFSZ, c_int, c_void,
    siginfo_t,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::signal::{block_signal, register_signal_handler};

use crate::console::terminal;

/// Written by the signal handler. Never closed: a signal may arrive at any time.
static WAKE: OnceLock<EventFd> = OnceLock::new();
/// Signals that arrived since [`Signals::take`], one bit for each number.
static PENDING: AtomicU64 = AtomicU64::new(0);
/// Arrival of the first terminating signal, in milliseconds since 1970; 0 without one.
static TERMINATING: AtomicU64 = AtomicU64::new(0);
/// Signals within this time of the first are the same request: `timeout` and shells send one to the
/// process and one to its group.
const SAME_REQUEST_MS: u64 = 1_000;

/// Request of the host to the process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// End (SIGTERM, SIGINT, SIGQUIT, SIGHUP).
    Terminate,
    /// Stop, giving the terminal back (SIGTSTP).
    Suspend,
    /// The process was continued (SIGCONT).
    Continue,
}

/// The process's signal handlers.
#[derive(Debug)]
pub struct Signals {
    wake: &'static EventFd,
}

impl Signals {
    /// Installs the handlers. The first terminating signal is an event. If the event loop does not
    /// handle it, another one a second later ends the process at once.
    ///
    /// A signal that is ignored stays so: `nohup` and a shell without job control
    /// start a process that way.
    ///
    /// SIGTTIN and SIGTTOU are blocked here and in every thread started later:
    /// a job in the background then reads EIO from its terminal, and writes to
    /// it, instead of being stopped.
    ///
    /// # Errors
    /// No eventfd is available, or a handler cannot be installed.
    pub fn install() -> io::Result<Self> {
        let wake = match WAKE.get() {
            Some(wake) => wake,
            None => {
                let created = EventFd::new(EFD_NONBLOCK)?;
                WAKE.get_or_init(|| created)
            }
        };
        for number in [SIGTTIN, SIGTTOU] {
            // Its only error is that the signal is blocked already.
            let _ = block_signal(number);
        }
        for number in [SIGTERM, SIGINT, SIGQUIT, SIGHUP, SIGTSTP, SIGCONT] {
            if is_ignored(number) {
                continue;
            }
            register_signal_handler(number, handle)
                .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        }
        Ok(Self { wake })
    }

    /// Returns the signals since the last call, in the order to handle them.
    pub fn take(&self) -> impl Iterator<Item = Signal> + use<> {
        // Empty after a spurious wake-up: then no signal is pending.
        let _ = self.wake.read();
        let pending = PENDING.swap(0, Ordering::SeqCst);
        let any = move |numbers: &[c_int]| numbers.iter().any(|&n| pending & bit(n) != 0);
        [
            (Signal::Suspend, any(&[SIGTSTP])),
            (Signal::Continue, any(&[SIGCONT])),
            (Signal::Terminate, any(&[SIGTERM, SIGINT, SIGQUIT, SIGHUP])),
        ]
        .into_iter()
        .filter_map(|(signal, arrived)| arrived.then_some(signal))
    }
}

/// Turns a write beyond the process's file size limit (`ulimit -f`) into the error EFBIG, in this
/// thread and those it starts. SIGXFSZ would end the process, and a guest can write to a disk up to
/// that limit. Call it first.
pub fn survive_file_size_limit() {
    // Its only error is that the signal is blocked already.
    let _ = block_signal(SIGXFSZ);
}

/// Restores the terminal and stops the process as SIGTSTP would; returns when
/// it is continued.
pub(crate) fn suspend() {
    terminal::restore();
    // SAFETY: raising a signal at this thread has no preconditions; SIGSTOP has
    // no handler.
    unsafe { libc::raise(libc::SIGSTOP) };
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// Whether the process ignores a signal, a disposition that execve(2) inherits.
fn is_ignored(number: c_int) -> bool {
    // SAFETY: all zeroes are a sigaction; a null pointer changes nothing, and the
    // other is valid for writes of a sigaction.
    let (asked, action) = unsafe {
        let mut action: libc::sigaction = zeroed();
        let asked = libc::sigaction(number, std::ptr::null(), &raw mut action);
        (asked, action)
    };
    asked == 0 && action.sa_sigaction == libc::SIG_IGN
}

fn bit(number: c_int) -> u64 {
    1 << (number & 63)
}

/// The signal handler: it runs on any thread, and calls async-signal-safe functions only.
extern "C" fn handle(number: c_int, _: *mut siginfo_t, _: *mut c_void) {
    if !matches!(number, SIGTSTP | SIGCONT) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.map_or(1, |since| {
            u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
        });
        let first = TERMINATING.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst);
        if first.is_err_and(|first| now.saturating_sub(first) > SAME_REQUEST_MS) {
            terminal::restore();
            // SAFETY: `_exit` may be called anywhere.
            unsafe { libc::_exit(1) }
        }
    }
    PENDING.fetch_or(bit(number), Ordering::SeqCst);
    if let Some(wake) = WAKE.get() {
        let _ = wake.write(1);
    }
}

/// Locks the process's signals for one test.
#[cfg(test)]
pub(crate) fn alone() -> std::sync::MutexGuard<'static, ()> {
    static ALONE: std::sync::Mutex<()> = std::sync::Mutex::new(());
    ALONE
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_becomes_an_event_once() {
        let _alone = alone();
        let signals = Signals::install().unwrap();
        // As the kernel calls it; the arguments are not read.
        handle(SIGCONT, std::ptr::null_mut(), std::ptr::null_mut());
        assert_eq!(signals.take().collect::<Vec<_>>(), [Signal::Continue]);
        assert_eq!(signals.take().count(), 0);
    }
}
