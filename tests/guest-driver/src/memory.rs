//! Memory shared with a device: anonymous pages for DMA, and BARs.

#![allow(
    unsafe_code,
    reason = "memory that a device reads and writes is reached through raw pointers"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::NonNull;
use std::sync::atomic::{Ordering, fence};

/// Page size of this process in bytes.
pub fn page_size() -> usize {
    // SAFETY: sysconf has no precondition and touches no memory of ours.
    let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    usize::try_from(size).expect("the system has a page size")
}

/// A shared mapping. Every access is volatile and of exactly the given width, because a device
/// accesses it too; one out of range is a bug of this program and ends it.
pub struct Shared {
    base: NonNull<u8>,
    len: usize,
}

impl Shared {
    /// Maps `len` bytes of zeroed memory, page-aligned.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        Self::map(len, libc::MAP_ANONYMOUS, -1, 0)
    }

    /// Maps `len` bytes of the file at `offset`, such as a BAR of a VFIO device.
    pub fn of_file(file: BorrowedFd<'_>, offset: u64, len: usize) -> io::Result<Self> {
        let offset = libc::off_t::try_from(offset).map_err(io::Error::other)?;
        Self::map(len, 0, file.as_raw_fd(), offset)
    }

    fn map(len: usize, flags: i32, fd: i32, offset: libc::off_t) -> io::Result<Self> {
        // SAFETY: the kernel chooses the address, so no mapping of ours is replaced.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | flags,
                fd,
                offset,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mapped at zero"))?;
        Ok(Self { base, len })
    }

    /// Length of the mapping in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Virtual address of the first byte.
    pub fn address(&self) -> u64 {
        self.base.as_ptr() as u64
    }

    fn at<T>(&self, offset: usize) -> *mut T {
        let size = size_of::<T>();
        let end = offset.checked_add(size);
        assert!(
            end.is_some_and(|end| end <= self.len) && offset.is_multiple_of(size),
            "access of {size} bytes at {offset:#x} in a mapping of {:#x}",
            self.len
        );
        // SAFETY: offset is inside the mapping, as just checked.
        unsafe { self.base.as_ptr().add(offset).cast() }
    }

    fn load<T: Copy>(&self, offset: usize) -> T {
        // SAFETY: `at` checked range and alignment, and any bytes are a valid unsigned integer.
        let value = unsafe { self.at::<T>(offset).read_volatile() };
        fence(Ordering::Acquire);
        value
    }

    fn store<T: Copy>(&self, offset: usize, value: T) {
        fence(Ordering::Release);
        // SAFETY: `at` checked range and alignment, and the mapping is writable.
        unsafe { self.at::<T>(offset).write_volatile(value) }
    }

    /// Reads a byte.
    pub fn u8(&self, offset: usize) -> u8 {
        self.load(offset)
    }

    /// Reads a little-endian halfword, with acquire order.
    pub fn u16(&self, offset: usize) -> u16 {
        u16::from_le(self.load(offset))
    }

    /// Reads a little-endian word, with acquire order.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from_le(self.load(offset))
    }

    /// Writes a byte.
    pub fn set_u8(&self, offset: usize, value: u8) {
        self.store(offset, value);
    }

    /// Writes a little-endian halfword, with release order.
    pub fn set_u16(&self, offset: usize, value: u16) {
        self.store(offset, value.to_le());
    }

    /// Writes a little-endian word, with release order.
    pub fn set_u32(&self, offset: usize, value: u32) {
        self.store(offset, value.to_le());
    }

    /// Writes a 64-bit register or field as its two words, the low one first.
    pub fn set_u64(&self, offset: usize, value: u64) {
        let [low, high] = [value & 0xffff_ffff, value >> 32]
            .map(|word| u32::try_from(word).expect("32 bits were kept"));
        self.set_u32(offset, low);
        self.set_u32(offset + 4, high);
    }

    /// Copies `bytes` to the mapping at `offset`.
    pub fn write(&self, offset: usize, bytes: &[u8]) {
        for (index, byte) in bytes.iter().enumerate() {
            self.set_u8(offset + index, *byte);
        }
    }

    /// Copies `len` bytes at `offset` from the mapping.
    pub fn read(&self, offset: usize, len: usize) -> Vec<u8> {
        (offset..offset + len).map(|at| self.u8(at)).collect()
    }

    /// Sets every byte to `value`.
    pub fn fill(&self, value: u8) {
        for offset in 0..self.len {
            self.set_u8(offset, value);
        }
    }

    /// Offset of the first byte that is not `value`, if any.
    pub fn first_other_than(&self, value: u8) -> Option<usize> {
        (0..self.len).find(|offset| self.u8(*offset) != value)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // SAFETY: the range is ours and whole; no reference into it can exist, only copies.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.len) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_stored_in_little_endian() {
        let memory = Shared::anonymous(page_size()).unwrap();
        memory.set_u64(8, 0x1122_3344_5566_7788);
        assert_eq!(memory.u32(8), 0x5566_7788);
        assert_eq!(memory.u16(14), 0x1122);
        assert_eq!(memory.read(8, 2), [0x88, 0x77]);
    }

    #[test]
    fn a_changed_canary_is_found() {
        let memory = Shared::anonymous(page_size()).unwrap();
        memory.fill(0xc5);
        assert_eq!(memory.first_other_than(0xc5), None);
        memory.set_u8(1234, 0);
        assert_eq!(memory.first_other_than(0xc5), Some(1234));
    }

    #[test]
    #[should_panic(expected = "access of 4 bytes")]
    fn an_access_across_the_end_ends_the_program() {
        let memory = Shared::anonymous(page_size()).unwrap();
        memory.u32(memory.len() - 2);
    }
}
