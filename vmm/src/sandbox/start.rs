//! First steps of the process, in every mode.
#![allow(unsafe_code)] // Closes descriptors that no object owns.

use std::ffi::OsStr;
use std::io;
use std::os::fd::RawFd;
use std::os::unix::ffi::OsStrExt as _;

use libc::c_uint;
use rustix::fs::Mode;
use rustix::process::{
    DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit, umask,
};
use rustix::thread::set_no_new_privs;

use super::SandboxError;

/// First descriptor after the standard streams.
const FIRST: c_uint = 3;

/// Closes the inherited descriptors except the standard streams and `keep`, makes
/// new files private, leaves no core dump, and excludes a gain of privileges. Call
/// it before the process opens a file or starts a thread.
///
/// # Errors
/// The first step that the host refuses. The other steps are not done.
pub fn harden(keep: &[RawFd]) -> Result<(), SandboxError> {
    close_others(keep).map_err(SandboxError::of("closing inherited descriptors"))?;
    umask(Mode::RWXG | Mode::RWXO);
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)
        .map_err(io::Error::from)
        .map_err(SandboxError::of("limiting core dumps"))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)
        .map_err(io::Error::from)
        .map_err(SandboxError::of("excluding core dumps"))?;
    set_no_new_privs(true)
        .map_err(io::Error::from)
        .map_err(SandboxError::of("setting no_new_privs"))
}

fn close_others(keep: &[RawFd]) -> io::Result<()> {
    let mut kept: Vec<c_uint> = keep.iter().filter_map(|fd| (*fd).try_into().ok()).collect();
    kept.sort_unstable();
    let mut first = FIRST;
    for fd in kept.into_iter().filter(|fd| *fd >= FIRST) {
        if fd > first {
            close_range(first, fd - 1)?;
        }
        first = first.max(fd + 1);
    }
    close_range(first, c_uint::MAX)
}

/// Closes the descriptors from `first` to `last`, inclusive.
fn close_range(first: c_uint, last: c_uint) -> io::Result<()> {
    // SAFETY: no object of this process owns a descriptor yet, except the
    // standard streams, which are below `first`.
    match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// The inherited descriptors that `argument` names by a path, as a shell's
/// process substitution does: `/dev/fd/63`.
pub fn named_descriptors(argument: &OsStr) -> Vec<RawFd> {
    let text = String::from_utf8_lossy(argument.as_bytes());
    let after = ["/dev/fd/", "/proc/self/fd/"].map(|directory| text.split(directory).skip(1));
    let numbers = after.into_iter().flatten().filter_map(|rest| {
        let end = rest.find(|c: char| !c.is_ascii_digit());
        rest[..end.unwrap_or(rest.len())].parse().ok()
    });
    numbers.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_named_by_a_path_are_found() {
        for (argument, found) in [
            ("/dev/fd/63", vec![63]),
            ("path=/dev/fd/5,readonly=on", vec![5]),
            ("/proc/self/fd/7", vec![7]),
            ("/dev/fd/x", vec![]),
            ("63", vec![]),
        ] {
            assert_eq!(named_descriptors(OsStr::new(argument)), found, "{argument}");
        }
    }
}
