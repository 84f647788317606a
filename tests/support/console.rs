//! Collects the output of a process in a thread.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Collected text, and the length of its searched part.
pub(super) struct Console {
    shared: Arc<Shared>,
    searched: usize,
}

#[derive(Default)]
struct Shared {
    buffer: Mutex<Buffer>,
    more: Condvar,
}

#[derive(Default)]
struct Buffer {
    bytes: Vec<u8>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Console {
    /// Reads `source` to its end, on a thread.
    pub(super) fn collect(source: OwnedFd) -> Self {
        let shared = Arc::new(Shared::default());
        let filled = Arc::clone(&shared);
        thread::spawn(move || {
            let mut source = File::from(source);
            let mut buffer = [0; 4096];
            // A pseudo-terminal whose other side is closed reads as EIO.
            while let Ok(count @ 1..) = source.read(&mut buffer) {
                filled.lock().bytes.extend(&buffer[..count]);
                filled.more.notify_all();
            }
            filled.lock().ended = true;
            filled.more.notify_all();
        });
        Self {
            shared,
            searched: 0,
        }
    }

    /// Creates an empty console at its end.
    pub(super) fn empty() -> Self {
        let shared = Arc::new(Shared::default());
        shared.lock().ended = true;
        Self {
            shared,
            searched: 0,
        }
    }

    /// The text so far.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().bytes).into_owned()
    }

    /// Waits for the end of the output, and returns the text so far.
    pub(super) fn whole(&self, timeout: Duration) -> String {
        let buffer = self.shared.lock();
        let ended = |buffer: &mut Buffer| !buffer.ended;
        let waited = self.shared.more.wait_timeout_while(buffer, timeout, ended);
        drop(waited);
        self.text()
    }

    /// Waits for `text` after the last match. Returns the text between them;
    /// `None` at the time limit or at the end of the output.
    pub(super) fn find(&mut self, text: &str, timeout: Duration) -> Option<String> {
        let deadline = Instant::now() + timeout;
        let mut buffer = self.shared.lock();
        loop {
            let rest = &buffer.bytes[self.searched..];
            let needle = text.as_bytes();
            if let Some(at) = rest.windows(needle.len()).position(|part| part == needle) {
                let before = String::from_utf8_lossy(&rest[..at]).into_owned();
                self.searched += at + needle.len();
                return Some(before);
            }
            let wait = deadline.checked_duration_since(Instant::now())?;
            if buffer.ended {
                return None;
            }
            let waited = self.shared.more.wait_timeout(buffer, wait);
            buffer = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
