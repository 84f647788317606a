//! A kernel that was loaded, and what its format says about it.

use linux_loader::loader::bootparam::setup_header;

/// Upper bound on the command line of a kernel whose file names none (ELF).
pub(super) const CMDLINE_MAX: usize = 2047;
/// Bytes of a page.
pub(super) const PAGE: u64 = 4096;

/// A kernel in guest memory.
pub(super) struct Image {
    /// First address the kernel does not need before it manages memory itself.
    pub(super) end: u64,
    /// The initial ramdisk must end at or below this address.
    pub(super) initrd_limit: u64,
    /// Upper bound on the command line in bytes, without the NUL.
    pub(super) cmdline_max: usize,
    pub(super) entry: ImageEntry,
}

/// Where the kernel starts.
pub(super) enum ImageEntry {
    /// Address of the PVH entry.
    Pvh(u64),
    /// Header of the file, with the address to which the kernel was loaded.
    Linux64(setup_header),
}
