//! A loaded kernel, and the limits that its format gives.

use linux_loader::loader::bootparam::setup_header;

/// Size of a page in bytes.
pub(super) const PAGE: u64 = 4096;

/// A kernel in guest memory.
pub(super) struct Image {
    /// First address that the kernel does not need before it manages memory
    /// itself (exclusive end).
    pub(super) end: u64,
    /// The initial ramdisk must end at or below this address.
    pub(super) initrd_limit: u64,
    /// Upper bound on the command line in bytes, without the NUL.
    pub(super) cmdline_max: usize,
    pub(super) entry: ImageEntry,
}

/// Entry point of the kernel.
pub(super) enum ImageEntry {
    /// Address of the PVH entry.
    Pvh(u64),
    /// Header of the file, with the address to which the kernel was loaded.
    Linux64(setup_header),
}
