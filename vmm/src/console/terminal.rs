//! The mode of the terminal on standard input.
//!
//! The state is the process's, as the terminal is: a panic hook and a signal
//! handler must be able to restore it.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::process::getpgrp;
use rustix::stdio::stdin;
use rustix::termios::{
    OptionalActions, SpecialCodeIndex, Termios, isatty, tcgetattr, tcgetpgrp, tcsetattr,
};

/// Original mode of the terminal: that of the first [`make_raw`].
static SAVED: OnceLock<Termios> = OnceLock::new();
/// Raw mode is set.
static RAW: AtomicBool = AtomicBool::new(false);

/// Whether standard input is a terminal and this process is in its foreground:
/// a background job must not use it.
pub(crate) fn is_ours() -> bool {
    isatty(stdin()) && tcgetpgrp(stdin()).is_ok_and(|group| group == getpgrp())
}

/// Sets raw mode: every key is passed on as it is typed. Output processing
/// stays on: log lines end in a bare newline.
///
/// # Errors
/// The terminal's mode cannot be read or set.
pub(crate) fn make_raw() -> io::Result<()> {
    let saved = match SAVED.get() {
        Some(saved) => saved,
        None => {
            let mode = tcgetattr(stdin())?;
            SAVED.get_or_init(|| mode)
        }
    };
    let mut mode = saved.clone();
    mode.make_raw();
    mode.output_modes = saved.output_modes;
    // A read returns at once even when another process took the key first.
    mode.special_codes[SpecialCodeIndex::VMIN] = 0;
    mode.special_codes[SpecialCodeIndex::VTIME] = 0;
    RAW.store(true, Ordering::SeqCst);
    Ok(tcsetattr(stdin(), OptionalActions::Now, &mode)?)
}

/// Restores the original mode, if raw mode is set and this process is in the
/// foreground. Async-signal-safe.
pub(crate) fn restore() {
    if !RAW.swap(false, Ordering::SeqCst) {
        return;
    }
    if let (true, Some(saved)) = (is_ours(), SAVED.get()) {
        // A failure has no remedy: the terminal is gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, saved);
    }
}
