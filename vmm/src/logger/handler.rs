//! The log's descriptors for a signal handler, which can take no lock.
#![allow(unsafe_code)] // Writes to descriptors by their numbers.

use std::fs::File;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

use super::stream::Stream;

/// The value while no descriptor is set.
const NONE: RawFd = -1;

/// Standard error.
static STANDARD_ERROR: AtomicI32 = AtomicI32::new(NONE);
/// Reports whether a write to [`STANDARD_ERROR`] would block, if one may.
static READY: AtomicI32 = AtomicI32::new(NONE);
/// The log's file.
static FILE: AtomicI32 = AtomicI32::new(NONE);

/// Publishes the stream, which stays open until the process ends.
pub(super) fn set_standard_error(stream: &Stream) {
    let (file, ready) = stream.descriptors();
    READY.store(ready.unwrap_or(NONE), Ordering::Relaxed);
    STANDARD_ERROR.store(file, Ordering::Release);
}

/// Publishes the log's file, which stays open until the next call.
pub(super) fn set_file(file: &File) {
    FILE.store(file.as_raw_fd(), Ordering::Release);
}

/// Writes a line to standard error, and to the log's file if there is one.
/// Never blocks. Async-signal-safe.
pub(crate) fn write_from_handler(line: &[u8]) {
    let ready = READY.load(Ordering::Relaxed);
    let mut event = libc::epoll_event { events: 0, u64: 0 };
    // SAFETY: the kernel writes at most one event to the pointer.
    if ready == NONE || unsafe { libc::epoll_wait(ready, &raw mut event, 1, 0) } == 1 {
        write(STANDARD_ERROR.load(Ordering::Acquire), line);
    }
    write(FILE.load(Ordering::Acquire), line);
}

fn write(fd: RawFd, line: &[u8]) {
    if fd != NONE {
        // SAFETY: the pointer is valid for reads of the slice. A failed write
        // has no other place to be reported.
        let _ = unsafe { libc::write(fd, line.as_ptr().cast(), line.len()) };
    }
}
