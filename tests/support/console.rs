//! What a process says, collected by a thread as it says it.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// The text so far, and how far it has been searched.
pub(super) struct Console {
    shared: Arc<Shared>,
    searched: usize,
}

#[derive(Default)]
struct Shared {
    said: Mutex<Said>,
    more: Condvar,
}

#[derive(Default)]
struct Said {
    bytes: Vec<u8>,
    ended: bool,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
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

    /// Nothing, and at its end.
    pub(super) fn empty() -> Self {
        let shared = Arc::new(Shared::default());
        shared.lock().ended = true;
        Self {
            shared,
            searched: 0,
        }
    }

    /// Everything said so far.
    pub(super) fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.lock().bytes).into_owned()
    }

    /// Everything, once it has ended.
    pub(super) fn whole(&self, patience: Duration) -> String {
        let said = self.shared.lock();
        let ended = |said: &mut Said| !said.ended;
        let waited = self.shared.more.wait_timeout_while(said, patience, ended);
        drop(waited);
        self.text()
    }

    /// Waits for `text` after what was found before. Returns what came before
    /// it; `None` when it has not come in time or cannot come any more.
    pub(super) fn find(&mut self, text: &str, patience: Duration) -> Option<String> {
        let deadline = Instant::now() + patience;
        let mut said = self.shared.lock();
        loop {
            let rest = &said.bytes[self.searched..];
            let needle = text.as_bytes();
            if let Some(at) = rest.windows(needle.len()).position(|part| part == needle) {
                let before = String::from_utf8_lossy(&rest[..at]).into_owned();
                self.searched += at + needle.len();
                return Some(before);
            }
            let wait = deadline.checked_duration_since(Instant::now())?;
            if said.ended {
                return None;
            }
            let waited = self.shared.more.wait_timeout(said, wait);
            said = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}
