//! The serial console on standard input and output.
//!
//! Input is read only as fast as the guest consumes it. On a terminal (raw mode) every key goes to
//! the guest as it is typed, except the keys for the monitor (Ctrl-a). From a pipe or file bytes
//! pass unchanged, and the end of the input ends nothing. A background job does not use the
//! terminal, and checks twice a second whether it is in the foreground.

mod keys;
mod output;
pub(crate) mod terminal;

use std::backtrace::{Backtrace, BacktraceStatus};
use std::fs::File;
use std::io::{self, IsTerminal, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use devices::legacy::SerialPort;
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use keys::Keys;
pub use output::Output;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use crate::logger;

/// Bytes read at a time.
const CHUNK: usize = 4096;
/// Interval of a background job's checks for the foreground.
const FOREGROUND_POLL: Duration = Duration::from_millis(500);

/// Restores the original mode of the terminal, if raw mode is set. Call it on every way out of the
/// process; a second call does nothing.
pub fn restore_terminal() {
    terminal::restore();
}

/// Makes a panic, on any thread, restore the terminal, report the panic and end the process with
/// status 1: a machine without one of its threads must not go on.
pub fn end_process_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        terminal::restore();
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("without a name").to_owned();
        // Not by the standard hook, which blocks on the reader of standard error.
        logger::write_last_line(&format!("thread '{name}' {panic}"));
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            logger::write_last_line(&backtrace.to_string());
        }
        std::process::exit(1);
    }));
}

/// Standard input for the guest: a subscriber of the event loop.
pub struct Input {
    stdin: File,
    /// Keys for the monitor; `None` when standard input is not a terminal.
    keys: Option<Keys>,
    source: Source,
    serial: Arc<SerialPort>,
    /// The port has room for [`Input::held`].
    drained: EventFd,
    /// Bytes that the port has not accepted yet.
    held: Vec<u8>,
    /// Signalled when the process may be in the foreground again.
    attention: EventFd,
    look: TimerFd,
    on_quit: Box<dyn Fn() + Send>,
}

/// How readable input is detected.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// By an event of the loop.
    Watched,
    /// By an event of the loop that is disabled now: the port has not accepted the last bytes, or
    /// the process is in the background.
    Unwatched,
    /// Always readable, and refused by epoll: a file, or /dev/null.
    File,
    /// At its end.
    Ended,
}

impl Input {
    /// Creates the input of `serial`, whose "input drained" event is `drained`. `on_quit` is called
    /// on the event loop when the user quits.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new(
        serial: Arc<SerialPort>,
        drained: EventFd,
        on_quit: impl Fn() + Send + 'static,
    ) -> io::Result<Self> {
        let stdin = io::stdin();
        Ok(Self {
            stdin: File::from(stdin.as_fd().try_clone_to_owned()?),
            keys: stdin.is_terminal().then(Keys::default),
            source: Source::Unwatched,
            serial,
            drained,
            held: Vec::new(),
            attention: EventFd::new(EFD_NONBLOCK)?,
            look: TimerFd::new()?,
            on_quit: Box::new(on_quit),
        })
    }

    /// Returns an event to signal when the process was continued (SIGCONT), and so may be in the
    /// foreground.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub(crate) fn attention(&self) -> io::Result<EventFd> {
        self.attention.try_clone()
    }

    /// Sets raw mode in the foreground; does not use the terminal in the background.
    fn update_mode(&mut self, ops: &mut EventOps) {
        if self.keys.is_none() || self.source == Source::Ended {
            return;
        }
        if terminal::is_ours() {
            if let Err(error) = terminal::make_raw() {
                log::warn!("console: the terminal stays in its mode: {error}");
            }
            let _ = self.look.clear();
            self.watch(ops);
        } else {
            self.unwatch(ops);
            let _ = self.look.reset(FOREGROUND_POLL, Some(FOREGROUND_POLL));
        }
    }

    fn watch(&mut self, ops: &mut EventOps) {
        if self.source == Source::Unwatched && self.held.is_empty() {
            self.source = match ops.add(Events::new(&self.stdin, EventSet::IN)) {
                Ok(()) => Source::Watched,
                Err(_) => Source::File,
            };
        }
        while self.source == Source::File && self.held.is_empty() {
            self.read(ops, EventSet::IN);
        }
    }

    fn unwatch(&mut self, ops: &mut EventOps) {
        if self.source == Source::Watched {
            let _ = ops.remove(Events::empty(&self.stdin));
            self.source = Source::Unwatched;
        }
    }

    fn end(&mut self, ops: &mut EventOps) {
        self.unwatch(ops);
        let _ = self.look.clear();
        self.source = Source::Ended;
    }

    fn read(&mut self, ops: &mut EventOps, events: EventSet) {
        let mut bytes = [0; CHUNK];
        match self.stdin.read(&mut bytes) {
            // A terminal reads as empty when another process took the key.
            Ok(0) if self.keys.is_some() && !events.contains(EventSet::HANG_UP) => {}
            Ok(0) => self.end(ops),
            Ok(count) => self.deliver(&bytes[..count], ops),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The process is in the background now.
            Err(_) if self.keys.is_some() && !terminal::is_ours() => self.update_mode(ops),
            Err(error) => {
                log::info!("console: no more input: {error}");
                self.end(ops);
            }
        }
    }

    fn deliver(&mut self, bytes: &[u8], ops: &mut EventOps) {
        match &mut self.keys {
            None => self.held.extend(bytes),
            Some(keys) => {
                if keys.filter(bytes, &mut self.held) {
                    (self.on_quit)();
                    self.end(ops);
                }
            }
        }
        self.pass_on(ops);
    }

    /// Passes bytes to the port, and reads on only when it accepted all.
    fn pass_on(&mut self, ops: &mut EventOps) {
        let taken = self.serial.input(&self.held);
        self.held.drain(..taken);
        if !self.held.is_empty() {
            self.unwatch(ops);
        }
    }
}

impl MutEventSubscriber for Input {
    fn init(&mut self, ops: &mut EventOps) {
        for event in [&self.drained, &self.attention] {
            let added = ops.add(Events::new(event, EventSet::IN));
            added.expect("an event fd can be watched");
        }
        let added = ops.add(Events::new(&self.look, EventSet::IN));
        added.expect("a timer fd can be watched");
        if self.keys.is_some() {
            self.update_mode(ops);
        } else {
            self.watch(ops);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        use std::os::fd::AsRawFd;
        let fd = events.fd();
        if fd == self.stdin.as_raw_fd() {
            self.read(ops, events.event_set());
        } else if fd == self.drained.as_raw_fd() {
            let _ = self.drained.read();
            self.pass_on(ops);
            if self.keys.is_some() {
                self.update_mode(ops);
            } else {
                self.watch(ops);
            }
        } else if fd == self.attention.as_raw_fd() {
            let _ = self.attention.read();
            self.update_mode(ops);
        } else {
            // Not read, which could block: setting or clearing the timer makes
            // it unreadable again, and `update_mode` does one of them.
            self.update_mode(ops);
        }
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        terminal::restore();
    }
}
