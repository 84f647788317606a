//! Opens the files that the user names.
//!
//! No call here waits for another process: files are opened with `O_NONBLOCK |
//! O_NOCTTY | O_CLOEXEC` and examined before they are used. A FIFO without a
//! peer, a terminal or a tape drive as a disk image is an error at once.

mod sys;

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, IsTerminal, Read as _};
use std::os::fd::{AsFd, AsRawFd as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

pub use self::sys::block_device_is_read_only;

/// Mode of created files: only their owner reads a guest's log and console.
const OUTPUT_MODE: u32 = 0o600;
/// `/dev/null` (Linux' devices.txt: 1, 3).
const NULL_DEVICE: u64 = libc::makedev(1, 3);
/// Time without data after which reading a FIFO fails.
const FIFO_TIMEOUT: Duration = Duration::from_secs(10);

/// Error of a file. The text is one line for the user, without the file's name.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be opened.
    #[error("cannot be opened {how}")]
    Open {
        /// Requested access, such as "for reading".
        how: &'static str,
        /// Error of open(2).
        source: io::Error,
    },
    /// It is of the wrong kind.
    #[error("is not {needed}: it is {is}")]
    Kind {
        /// Kind of the file, with an article.
        is: &'static str,
        /// Needed kinds, with an article.
        needed: &'static str,
    },
    /// It cannot be examined.
    #[error("cannot be examined")]
    Examine(#[source] io::Error),
    /// It cannot be read to its end.
    #[error("cannot be read")]
    Read(#[source] io::Error),
    /// It is longer than this limit in bytes.
    #[error("is longer than {0} bytes")]
    TooLong(usize),
}

/// Kinds of files that the uses distinguish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Regular,
    BlockDevice,
    Fifo,
    /// `/dev/null`, or a terminal that is one of the process's standard streams.
    Sink,
    /// A file of procfs, sysfs or another interface of the kernel: reading or
    /// writing it has effects.
    Kernel,
    CharacterDevice,
    Directory,
    Socket,
}

impl Kind {
    fn of(metadata: &Metadata) -> Self {
        let kind = metadata.file_type();
        if kind.is_file() {
            Self::Regular
        } else if kind.is_block_device() {
            Self::BlockDevice
        } else if kind.is_fifo() {
            Self::Fifo
        } else if kind.is_char_device() {
            let rdev = metadata.rdev();
            if rdev == NULL_DEVICE || is_own_terminal(rdev) {
                Self::Sink
            } else {
                Self::CharacterDevice
            }
        } else if kind.is_dir() {
            Self::Directory
        } else {
            Self::Socket
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Regular => "a regular file",
            Self::BlockDevice => "a block device",
            Self::Fifo => "a FIFO",
            Self::Sink | Self::CharacterDevice => "a character device",
            Self::Kernel => "an interface of the kernel",
            Self::Directory => "a directory",
            Self::Socket => "a socket",
        }
    }
}

/// Access and permitted kinds of a use.
struct Use {
    how: &'static str,
    kinds: &'static [Kind],
    needed: &'static str,
}

const BOOT: Use = Use {
    how: "for reading",
    kinds: &[Kind::Regular],
    needed: "a regular file",
};
const TEXT: Use = Use {
    how: "for reading",
    kinds: &[Kind::Regular, Kind::Fifo],
    needed: "a regular file or a FIFO",
};
const READ_ONLY_IMAGE: Use = Use {
    how: "for reading",
    kinds: &[Kind::Regular, Kind::BlockDevice],
    needed: "a regular file or a block device",
};
const IMAGE: Use = Use {
    how: "for reading and writing",
    ..READ_ONLY_IMAGE
};
const OUTPUT: Use = Use {
    how: "to append",
    kinds: &[Kind::Regular, Kind::Fifo, Kind::Sink],
    needed: "a regular file or a FIFO",
};

impl Use {
    fn check(&self, kind: Kind) -> Result<(), FileError> {
        if self.kinds.contains(&kind) {
            return Ok(());
        }
        Err(FileError::Kind {
            is: kind.name(),
            needed: self.needed,
        })
    }

    /// Opens `path` and examines the open file. `expected` is the kind of the
    /// file at the path, if it exists. A file of the wrong kind is not opened,
    /// because that may have effects (`/dev/ptmx` creates a terminal).
    fn open(
        &self,
        path: &Path,
        expected: Option<Kind>,
        options: &mut OpenOptions,
    ) -> Result<File, FileError> {
        if let Some(kind) = expected {
            self.check(kind)?;
        }
        let flags = libc::O_NONBLOCK | libc::O_NOCTTY | libc::O_CLOEXEC;
        let opened = options.custom_flags(flags).open(path);
        let file = opened.map_err(|source| self.cannot(source))?;
        let metadata = file.metadata().map_err(FileError::Examine)?;
        let kind = match Kind::of(&metadata) {
            Kind::Regular if sys::is_of_the_kernel(&file).map_err(FileError::Examine)? => {
                Kind::Kernel
            }
            kind => kind,
        };
        self.check(kind)?;
        Ok(file)
    }

    fn open_existing(&self, path: &Path, options: &mut OpenOptions) -> Result<File, FileError> {
        let metadata = fs::metadata(path).map_err(|source| self.cannot(source))?;
        self.open(path, Some(Kind::of(&metadata)), options)
    }

    fn cannot(&self, source: io::Error) -> FileError {
        FileError::Open {
            how: self.how,
            source,
        }
    }
}

/// Opens a kernel or an initial ramdisk: a regular file.
///
/// # Errors
/// See [`FileError`].
pub fn open_boot_file(path: &Path) -> Result<File, FileError> {
    BOOT.open_existing(path, OpenOptions::new().read(true))
}

/// Opens a disk image: a regular file or a block device.
///
/// # Errors
/// See [`FileError`].
pub fn open_image(path: &Path, read_only: bool) -> Result<File, FileError> {
    let image = if read_only { READ_ONLY_IMAGE } else { IMAGE };
    image.open_existing(path, OpenOptions::new().read(true).write(!read_only))
}

/// Opens a log, a metrics file or a console file for appending: a regular file,
/// which is created with mode 0600 if it does not exist, a FIFO with or without
/// a reader, `/dev/null`, or the terminal of a standard stream (`/dev/stderr`).
///
/// # Errors
/// See [`FileError`].
pub fn open_output(path: &Path) -> Result<File, FileError> {
    let expected = match fs::metadata(path) {
        Ok(metadata) => Some(Kind::of(&metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(OUTPUT.cannot(source)),
    };
    let mut options = OpenOptions::new();
    options.append(true);
    if expected == Some(Kind::Fifo) {
        // For reading too: a FIFO without a reader cannot be opened for
        // writing only, and writes would fail after its reader closes it.
        options.read(true);
    }
    OUTPUT.open(path, expected, options.create(true).mode(OUTPUT_MODE))
}

/// Reads a regular file, or a FIFO until its writers have closed it.
///
/// # Errors
/// See [`FileError`]; also when it is not UTF-8 or longer than `limit` bytes,
/// or when a FIFO has no data for 10 seconds.
pub fn read_text(path: &Path, limit: usize) -> Result<String, FileError> {
    let file = TEXT.open_existing(path, OpenOptions::new().read(true))?;
    let mut bytes = Vec::new();
    let mut chunk = [0; 4096];
    loop {
        match wait_and_read(&file, &mut chunk).map_err(FileError::Read)? {
            0 => break,
            count => bytes.extend(chunk.iter().take(count)),
        }
        if bytes.len() > limit {
            return Err(FileError::TooLong(limit));
        }
    }
    String::from_utf8(bytes).map_err(|_| {
        let error = io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8 text");
        FileError::Read(error)
    })
}

/// Reads some bytes of a file. Waits for data from a FIFO.
fn wait_and_read(mut file: &File, bytes: &mut [u8]) -> io::Result<usize> {
    let epoll = Epoll::new()?;
    let readable = EpollEvent::new(EventSet::IN, 0);
    let watched = epoll.ctl(ControlOperation::Add, file.as_raw_fd(), readable);
    let give_up = Instant::now() + FIFO_TIMEOUT;
    loop {
        // epoll refuses a regular file, which is always readable.
        if watched.is_ok() {
            let left = give_up.saturating_duration_since(Instant::now());
            let left = i32::try_from(left.as_millis()).unwrap_or(i32::MAX);
            if epoll.wait(left, &mut [EpollEvent::default()])? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
        }
        match file.read(bytes) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && watched.is_ok() => {}
            result => return result,
        }
    }
}

/// Whether a standard stream of the process is the terminal `rdev`.
fn is_own_terminal(rdev: u64) -> bool {
    fn is(stream: &(impl AsFd + IsTerminal), rdev: u64) -> bool {
        let copy = stream.as_fd().try_clone_to_owned().map(File::from);
        let metadata = copy.and_then(|file| file.metadata());
        stream.is_terminal() && metadata.is_ok_and(|metadata| metadata.rdev() == rdev)
    }
    is(&io::stdin(), rdev) || is(&io::stdout(), rdev) || is(&io::stderr(), rdev)
}

#[cfg(test)]
mod tests;
