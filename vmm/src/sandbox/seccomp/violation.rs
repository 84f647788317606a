//! Report of a forbidden system call, and the end of the process.
//!
//! The kernel does not make the call and sends SIGSYS to its thread. The
//! handler calls async-signal-safe functions only, and only system calls that
//! every kind of thread may make.
#![allow(unsafe_code)] // Reads the signal's information.

use std::cell::Cell;
use std::fmt::{self, Write as _};
use std::io;

use libc::{SIGSYS, c_int, c_void, siginfo_t};
use vmm_sys_util::signal::register_signal_handler;

use super::names;
use crate::console::terminal;
use crate::logger;

/// Exit status of a process that made a forbidden system call.
pub const EXIT_STATUS: c_int = 148;
/// `si_code` of a signal from a filter.
const SYS_SECCOMP: c_int = 1;
thread_local! {
    /// Name of the thread, as much as the kernel keeps of it, padded with zeros.
    static NAME: Cell<[u8; 15]> = const { Cell::new([0; 15]) };
}

/// Handles SIGSYS, which a filter sends to the thread that makes the call.
///
/// # Errors
/// The signal cannot be handled.
pub(super) fn handle() -> io::Result<()> {
    #[cfg(feature = "forbidden-calls")]
    forbidden::install()?;
    register_signal_handler(SIGSYS, on_violation)
        .map_err(|error| io::Error::from_raw_os_error(error.errno()))
}

/// Stores the name of the calling thread for a report.
pub(super) fn name_thread() {
    let mut stored = [0; 15];
    let thread = std::thread::current();
    let name = thread.name().unwrap_or_default().bytes();
    for (to, byte) in stored.iter_mut().zip(name) {
        *to = byte;
    }
    NAME.set(stored);
}

/// The beginning of `siginfo_t` for SIGSYS (`asm-generic/siginfo.h`).
#[repr(C)]
struct Violation {
    signal: c_int,
    errno: c_int,
    code: c_int,
    padding: c_int,
    address: usize,
    call: c_int,
    architecture: u32,
}

extern "C" fn on_violation(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes a siginfo_t, whose fields for SIGSYS are these,
    // and which is longer.
    let violation = unsafe { &*info.cast::<Violation>() };
    if violation.code != SYS_SECCOMP {
        // Another process sent the signal.
        return;
    }
    terminal::restore();
    let mut line = Line::default();
    // A line that is too long is cut.
    let _ = report(&mut line, NAME.get(), violation);
    logger::write_from_handler(line.bytes.get(..line.len).unwrap_or_default());
    // SAFETY: `_exit` may be called anywhere.
    unsafe { libc::_exit(EXIT_STATUS) }
}

fn report(line: &mut Line, name: [u8; 15], violation: &Violation) -> fmt::Result {
    let end = name.iter().position(|byte| *byte == 0);
    let name = name.get(..end.unwrap_or(name.len())).unwrap_or_default();
    let name = str::from_utf8(name).unwrap_or("?");
    let number = violation.call;
    let call = names::name(number.into()).unwrap_or("unknown");
    let address = violation.address;
    writeln!(
        line,
        "portcullis: thread {name} made the forbidden system call {call} ({number}) at \
         {address:#x}; the process ends"
    )
}

/// Text without an allocation.
struct Line {
    bytes: [u8; 256],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 256],
            len: 0,
        }
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for (to, byte) in self.bytes.iter_mut().skip(self.len).zip(text.bytes()) {
            *to = byte;
            self.len += 1;
        }
        Ok(())
    }
}

/// For tests only: a thread that receives a signal makes a forbidden call.
#[cfg(feature = "forbidden-calls")]
mod forbidden {
    use std::io;

    use libc::{SIGSYS, c_int, c_void, siginfo_t};
    use vmm_sys_util::signal::{SIGRTMIN, register_signal_handler, unblock_signal};

    #[cfg(not(debug_assertions))]
    compile_error!("the feature forbidden-calls is for tests only");

    /// Makes the signal `SIGRTMIN` + 1 an execve(2) of the thread that receives
    /// it.
    pub(super) fn install() -> io::Result<()> {
        register_signal_handler(SIGRTMIN() + 1, on_signal)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))
    }

    extern "C" fn on_signal(_: c_int, _: *mut siginfo_t, _: *mut c_void) {
        // A handler blocks all signals; the kernel kills a thread that blocks
        // this one.
        let _ = unblock_signal(SIGSYS);
        let none: [*const libc::c_char; 1] = [std::ptr::null()];
        // SAFETY: the path and both lists end with a null.
        unsafe { libc::execve(c"/bin/sh".as_ptr(), none.as_ptr(), none.as_ptr()) };
    }
}
