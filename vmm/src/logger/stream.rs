//! Writes to standard error without waiting for its reader.

use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, RawFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};

use log::Level;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

/// A stream that other processes may share, so that its flags must not change:
/// `O_NONBLOCK` belongs to every holder of the open file.
#[derive(Debug)]
pub(super) struct Stream {
    file: File,
    /// Reports whether a write would block; `None` where none does.
    ready: Option<Epoll>,
    /// journald reads the stream: `JOURNAL_STREAM` has its device and inode.
    is_journal: bool,
}

impl Stream {
    /// Opens the stream that `fd` refers to.
    ///
    /// A pipe and a terminal are opened again through `/proc`: that open file
    /// is private and non-blocking. Where it cannot be opened (no `/proc`,
    /// another user's terminal, a socket), each write first polls the stream.
    /// That suffices as long as a line fits into what the kernel calls
    /// writable, and no other process fills it in between.
    ///
    /// # Errors
    /// `fd` is closed, or no file descriptor is left.
    pub(super) fn of(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let file = File::from(fd.try_clone_to_owned()?);
        let metadata = file.metadata()?;
        let kind = metadata.file_type();
        let name = format!("{}:{}", metadata.dev(), metadata.ino());
        let is_journal = std::env::var_os("JOURNAL_STREAM").is_some_and(|value| value == *name);
        if kind.is_fifo() || kind.is_char_device() {
            let path = format!("/proc/self/fd/{}", file.as_raw_fd());
            let own = OpenOptions::new()
                .write(true)
                .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
                .open(path);
            if let Ok(file) = own {
                return Ok(Self {
                    file,
                    ready: None,
                    is_journal,
                });
            }
        }
        let ready = Epoll::new()?;
        let writable = EpollEvent::new(EventSet::OUT, 0);
        // epoll refuses a regular file, which never blocks.
        let watched = ready.ctl(ControlOperation::Add, file.as_raw_fd(), writable);
        Ok(Self {
            file,
            ready: watched.is_ok().then_some(ready),
            is_journal,
        })
    }

    /// Prefix of a line for journald (sd-daemon(3)); empty for another reader.
    pub(super) fn priority(&self, level: Level) -> &'static str {
        match level {
            _ if !self.is_journal => "",
            Level::Error => "<3>",
            Level::Warn => "<4>",
            Level::Info => "<6>",
            Level::Debug | Level::Trace => "<7>",
        }
    }

    /// The stream's descriptor, and that which reports whether a write would block.
    pub(super) fn descriptors(&self) -> (RawFd, Option<RawFd>) {
        let ready = self.ready.as_ref().map(Epoll::as_raw_fd);
        (self.file.as_raw_fd(), ready)
    }

    /// Writes all of `line`, in one write where the stream accepts it.
    ///
    /// # Errors
    /// The line is not written: `WouldBlock` when the stream is full, and the
    /// errors of write(2).
    pub(super) fn write(&mut self, line: &[u8]) -> io::Result<()> {
        if let Some(ready) = &self.ready
            && ready.wait(0, &mut [EpollEvent::default()])? == 0
        {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        self.file.write_all(line)
    }
}

/// Standard error; `None` when the process has none.
pub(super) fn standard_error() -> Option<Stream> {
    Stream::of(io::stderr().as_fd()).ok()
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// Writes until the stream is full. Returns the number of bytes.
    fn fill(stream: &mut Stream) -> usize {
        let mut taken = 0;
        loop {
            match stream.write(&[b'x'; 1024]) {
                Ok(()) => taken += 1024,
                Err(error) => {
                    assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
                    return taken;
                }
            }
        }
    }

    #[test]
    fn pipe_that_is_not_read_fills_up_and_stays_blocking_for_others() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut stream = Stream::of(writer.as_fd()).unwrap();
        assert!(stream.ready.is_none(), "it was not opened again");
        let taken = fill(&mut stream);
        assert!(taken > 0);
        let path = format!("/proc/self/fdinfo/{}", writer.as_raw_fd());
        let info = std::fs::read_to_string(path).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = i32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
        assert_eq!(flags & libc::O_NONBLOCK, 0);
        let mut bytes = vec![0; taken];
        reader.read_exact(&mut bytes).unwrap();
        stream.write(b"again").unwrap();
    }

    #[test]
    fn socket_that_is_not_read_is_polled_before_each_write() {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let mut stream = Stream::of(writer.as_fd()).unwrap();
        let taken = fill(&mut stream);
        assert!(taken > 0);
        let mut bytes = vec![0; taken];
        reader.read_exact(&mut bytes).unwrap();
        stream.write(b"again").unwrap();
        drop(reader);
        assert!(stream.write(b"x").is_err());
    }

    #[test]
    fn regular_file_is_written_at_the_shared_offset() {
        let mut file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        let mut stream = Stream::of(file.as_fd()).unwrap();
        file.write_all(b"one").unwrap();
        stream.write(b"two").unwrap();
        file.write_all(b"six").unwrap();
        let mut text = String::new();
        io::Seek::rewind(&mut file).unwrap();
        file.read_to_string(&mut text).unwrap();
        assert_eq!(text, "onetwosix");
    }
}
