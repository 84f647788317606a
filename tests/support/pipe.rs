//! Pipes with a small capacity.
#![expect(unsafe_code, reason = "the standard library cannot set a pipe's size")]

use std::io;
use std::os::fd::AsRawFd;

/// Reading end of a pipe with a capacity of one page: a guest takes minutes to fill one of 64 KiB.
pub fn of_one_page() -> io::PipeReader {
    let (reader, _) = io::pipe().expect("a pipe");
    // SAFETY: the call takes an integer and touches no memory.
    let size = unsafe { libc::fcntl(reader.as_raw_fd(), libc::F_SETPIPE_SZ, 4096) };
    assert!((1..=4096).contains(&size), "a pipe of {size} bytes");
    reader
}
