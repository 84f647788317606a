//! The serial console on standard input and output.
//!
//! Input is read only as fast as the guest takes it. On a terminal every key
//! goes to the guest as it is typed (raw mode), except for those of
//! [`keys`]; from a pipe or file bytes pass unchanged, and the end of the input
//! ends nothing. In the background the terminal is left alone, and looked at
//! twice a second until it is ours again.

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
/// How often a job in the background looks whether the terminal is its own.
const LOOK: Duration = Duration::from_millis(500);

/// Puts the terminal back into its own mode, if it is in ours. To be called on
/// every way out of the process; calling it twice does nothing.
pub fn restore_terminal() {
    terminal::restore();
}

/// Makes a panic, on any thread, end the process with status 1, the terminal
/// restored and the panic reported: a machine that lost a thread is worth
/// nothing, and one that hangs is worse.
pub fn end_process_on_panic() {
    std::panic::set_hook(Box::new(|panic| {
        terminal::restore();
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("without a name").to_owned();
        // Not by the standard hook, which waits for the reader of standard error.
        logger::write_last_line(&format!("thread '{name}' {panic}"));
        let backtrace = Backtrace::capture();
        if backtrace.status() == BacktraceStatus::Captured {
            logger::write_last_line(&backtrace.to_string());
        }
        std::process::exit(1);
    }));
}

/// Standard input, on its way to the guest: a subscriber of the event loop.
pub struct Input {
    stdin: File,
    /// Standard input is a terminal, and these are the monitor's keys on it.
    keys: Option<Keys>,
    source: Source,
    serial: Arc<SerialPort>,
    /// The port has room for [`Input::held`].
    drained: EventFd,
    /// Read and not yet taken by the port.
    held: Vec<u8>,
    /// Somebody thinks the terminal may have become ours.
    attention: EventFd,
    look: TimerFd,
    on_quit: Box<dyn Fn() + Send>,
}

/// How to know that there is something to read.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Source {
    /// By an event of the loop.
    Watched,
    /// By an event of the loop, which is not asked for now: the guest has yet
    /// to take what was read, or the terminal is not ours.
    Unwatched,
    /// It can always be read, and so cannot be watched: a file, or /dev/null.
    File,
    /// There will never be more.
    Ended,
}

impl Input {
    /// Standard input for `serial`, whose "input drained" event is `drained`.
    /// `on_quit` is called on the event loop when the user quits.
    ///
    /// # Errors
    /// No more file descriptors.
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

    /// An event to signal when the process was continued, and so may have been
    /// brought to the foreground.
    ///
    /// # Errors
    /// No more file descriptors.
    pub fn attention(&self) -> io::Result<EventFd> {
        self.attention.try_clone()
    }

    /// Takes the terminal if it is ours, and keeps off it if it is not.
    fn attend(&mut self, ops: &mut EventOps) {
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
            let _ = self.look.reset(LOOK, Some(LOOK));
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
            // A terminal reads as nothing when somebody else took the key.
            Ok(0) if self.keys.is_some() && !events.contains(EventSet::HANG_UP) => {}
            Ok(0) => self.end(ops),
            Ok(count) => self.deliver(&bytes[..count], ops),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            // The terminal is another job's now.
            Err(_) if self.keys.is_some() && !terminal::is_ours() => self.attend(ops),
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

    /// Gives the port what it takes, and reads on only when it took all.
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
            self.attend(ops);
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
                self.attend(ops);
            } else {
                self.watch(ops);
            }
        } else if fd == self.attention.as_raw_fd() {
            let _ = self.attention.read();
            self.attend(ops);
        } else {
            // Not read, which could block: setting or clearing the timer makes
            // it unreadable again, and `attend` does one of them.
            self.attend(ops);
        }
    }
}

impl Drop for Input {
    fn drop(&mut self) {
        terminal::restore();
    }
}
