#![allow(unsafe_code)]
// Why: vmm-sys-util's `Terminal` knows a raw mode that still turns CR into NL
// and keeps Ctrl-s, Ctrl-q and Ctrl-v from the guest, and it restores a fixed
// mode instead of the one that was there; libc's terminal calls are unsafe.

//! The mode of the terminal on standard input.
//!
//! The state is the process's, as the terminal is: a panic hook and a signal
//! handler must be able to restore it.

use std::io::{self, IsTerminal};
use std::mem::MaybeUninit;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{STDIN_FILENO, termios};

/// Original mode of the terminal: that of the first [`make_raw`].
static SAVED: OnceLock<termios> = OnceLock::new();
/// Raw mode is set.
static RAW: AtomicBool = AtomicBool::new(false);

/// Whether standard input is a terminal and this process is in its foreground:
/// a background job must not use it.
pub(crate) fn is_ours() -> bool {
    // SAFETY: both calls take no pointers and have no preconditions.
    io::stdin().is_terminal() && unsafe { libc::tcgetpgrp(STDIN_FILENO) == libc::getpgrp() }
}

/// Sets raw mode: every key is passed on as it is typed. Output processing
/// stays on: log lines end in a bare newline.
///
/// # Errors
/// The terminal's mode cannot be read or set.
pub(crate) fn make_raw() -> io::Result<()> {
    let mut mode = match SAVED.get() {
        Some(saved) => *saved,
        None => *SAVED.get_or_init({
            let mode = current_mode()?;
            move || mode
        }),
    };
    let output_flags = mode.c_oflag;
    // SAFETY: `mode` is a valid termios, changed in place.
    unsafe { libc::cfmakeraw(&mut mode) };
    mode.c_oflag = output_flags;
    // A read returns at once even when another process took the key first.
    mode.c_cc[libc::VMIN] = 0;
    mode.c_cc[libc::VTIME] = 0;
    RAW.store(true, Ordering::SeqCst);
    set_mode(&mode)
}

/// Restores the original mode, if raw mode is set and this process is in the
/// foreground. Async-signal-safe.
pub(crate) fn restore() {
    if !RAW.swap(false, Ordering::SeqCst) {
        return;
    }
    if let (true, Some(saved)) = (is_ours(), SAVED.get()) {
        // A failure has no remedy: the terminal is gone.
        let _ = set_mode(saved);
    }
}

/// Restores the terminal and ends the process with status 1, at once. For a
/// signal handler that cannot wait for the event loop. Async-signal-safe.
pub(crate) fn restore_and_exit() -> ! {
    restore();
    // SAFETY: `_exit` may be called anywhere.
    unsafe { libc::_exit(1) }
}

/// Restores the terminal and stops the process as SIGTSTP would; returns when
/// it is continued.
pub(crate) fn restore_and_stop() {
    restore();
    // SAFETY: raising a signal at oneself has no preconditions; SIGSTOP has no
    // handler.
    unsafe { libc::raise(libc::SIGSTOP) };
}

fn current_mode() -> io::Result<termios> {
    let mut mode = MaybeUninit::uninit();
    // SAFETY: the pointer is valid for writes of a termios.
    if unsafe { libc::tcgetattr(STDIN_FILENO, mode.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: tcgetattr returned 0 and so has filled it.
    Ok(unsafe { mode.assume_init() })
}

fn set_mode(mode: &termios) -> io::Result<()> {
    // SAFETY: the pointer is valid for reads of a termios.
    if unsafe { libc::tcsetattr(STDIN_FILENO, libc::TCSANOW, mode) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
