//! System calls about the kind of a file.
#![allow(unsafe_code)] // fstatfs and an ioctl; each says why it is sound.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd as _;

/// `_IO(0x12, 94)` of `linux/fs.h`: whether a block device is read-only.
const BLKROGET: libc::Ioctl = 0x125e;

/// Magic numbers (`linux/magic.h`) of file systems whose regular files are
/// interfaces of the kernel: procfs, sysfs, debugfs, tracefs, securityfs, the
/// control groups and the EFI variables.
const KERNEL_FILE_SYSTEMS: [u32; 8] = [
    0x9fa0,
    0x6265_6572,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0x6367_7270,
    0x0027_e0eb,
    0xde5e_81e4,
];

/// Whether the file is an interface of the kernel, such as `/proc/self/mem`.
///
/// # Errors
/// Error of fstatfs(2).
pub(super) fn is_of_the_kernel(file: &File) -> io::Result<bool> {
    let mut stat = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the descriptor is open, and the structure is the kernel's to write.
    if unsafe { libc::fstatfs(file.as_raw_fd(), stat.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a call that succeeds has written all of the structure.
    let stat = unsafe { stat.assume_init() };
    let magic = u32::try_from(stat.f_type).ok();
    Ok(magic.is_some_and(|magic| KERNEL_FILE_SYSTEMS.contains(&magic)))
}

/// Whether a block device refuses writes (`BLKROGET`). It may be open for
/// writing anyway: the kernel then fails each write.
///
/// # Errors
/// Error of the ioctl: the file is not a block device.
pub fn block_device_is_read_only(file: &File) -> io::Result<bool> {
    let mut read_only: libc::c_int = 0;
    // SAFETY: the kernel writes an int to where the pointer points.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), BLKROGET, &raw mut read_only) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(read_only != 0)
}
