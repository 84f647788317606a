//! A pseudo-terminal, as a terminal window uses one.
#![allow(unsafe_code, reason = "libc's terminal calls")]

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;

/// The user's side of a pseudo-terminal.
pub struct Pty {
    master: File,
    slave: PathBuf,
}

/// The settable mode of a terminal, for comparison.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mode {
    flags: [libc::tcflag_t; 4],
    keys: Vec<libc::cc_t>,
}

impl Mode {
    /// Whether line editing and signal keys are enabled, as for a shell.
    pub fn is_cooked(&self) -> bool {
        let cooked = libc::ICANON | libc::ECHO | libc::ISIG;
        self.flags[3] & cooked == cooked
    }

    /// Whether every key is passed on as it is typed.
    pub fn is_raw(&self) -> bool {
        self.flags[3] & (libc::ICANON | libc::ECHO | libc::ISIG | libc::IEXTEN) == 0
    }
}

impl Pty {
    /// Opens a new pseudo-terminal.
    pub fn open() -> io::Result<Self> {
        // SAFETY: takes no pointers.
        let fd = unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` was just opened and has no other owner.
        let master = unsafe { File::from_raw_fd(fd) };
        let mut name = [0; 128];
        // SAFETY: `fd` is open; `name` is valid for writes of its length, which
        // is passed on.
        let named = unsafe {
            libc::grantpt(fd) == 0
                && libc::unlockpt(fd) == 0
                && libc::ptsname_r(fd, name.as_mut_ptr(), name.len()) == 0
        };
        if !named {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: ptsname_r succeeded and so has written a terminated string.
        let slave = unsafe { CStr::from_ptr(name.as_ptr()) };
        let slave = PathBuf::from(slave.to_str().map_err(io::Error::other)?);
        Ok(Self { master, slave })
    }

    /// Opens the programs' side.
    pub fn slave(&self) -> io::Result<OwnedFd> {
        // It must not become this process's controlling terminal.
        let mut options = OpenOptions::new();
        options.read(true).write(true).custom_flags(libc::O_NOCTTY);
        Ok(options.open(&self.slave)?.into())
    }

    /// Descriptor for the programs' output.
    pub fn output(&self) -> io::Result<OwnedFd> {
        Ok(self.master.try_clone()?.into())
    }

    pub fn type_text(&mut self, text: &str) -> io::Result<()> {
        self.master.write_all(text.as_bytes())
    }

    /// The current mode of the terminal.
    pub fn mode(&self) -> Mode {
        let mut mode = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: the pointer is valid for writes of a termios; the descriptor
        // is open.
        let got = unsafe { libc::tcgetattr(self.master.as_raw_fd(), mode.as_mut_ptr()) };
        assert_eq!(got, 0, "{}", io::Error::last_os_error());
        // SAFETY: tcgetattr returned 0 and so has filled it.
        let mode = unsafe { mode.assume_init() };
        Mode {
            flags: [mode.c_iflag, mode.c_oflag, mode.c_cflag, mode.c_lflag],
            keys: mode.c_cc.to_vec(),
        }
    }
}
