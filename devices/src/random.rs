//! Random bytes of the host.

use std::io;

use rustix::io::Errno;
use rustix::rand::{GetRandomFlags, getrandom};

/// Fills `bytes` from the host's random pool by getrandom(2) itself. The usual
/// crate looks the call up at run time, does not find it in a static program and
/// opens `/dev/urandom`, which a process in a chroot does not have.
///
/// # Errors
/// The call fails: a system call filter refuses it.
pub fn fill(mut bytes: &mut [u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        // More than 256 bytes may come in parts: a signal ends the call early.
        match getrandom(&mut *bytes, GetRandomFlags::empty()) {
            Ok(count) => bytes = bytes.get_mut(count..).unwrap_or_default(),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
