//! The guest's RAM and its identity mapping.

use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::addr::{Gpa, Iova, IovaRange};
use crate::mapping::{Mapping, Perm};

/// The guest's RAM: guest-physical regions that are mapped into this process.
pub type GuestRam = vm_memory::GuestMemoryMmap<()>;

/// The identity mappings of an IOMMU in bypass: one per region of RAM.
pub(crate) fn ram_blocks(ram: &GuestRam) -> impl Iterator<Item = Mapping> + '_ {
    ram.iter().filter_map(|block| {
        let first = block.start_addr().0;
        Some(Mapping {
            iova: IovaRange::from_len(Iova(first), block.len()).ok()?,
            gpa: Gpa(first),
            perm: Perm::READ_WRITE,
        })
    })
}

/// The identity mapping around `iova`: its whole region of RAM, or its 4 KiB
/// page outside of RAM (an interrupt doorbell, for example).
pub(crate) fn identity_around(ram: &GuestRam, iova: Iova) -> Mapping {
    let block = ram_blocks(ram).find(|block| block.iova.contains(iova));
    block.unwrap_or_else(|| {
        let page = IovaRange::block(iova, 12);
        Mapping {
            iova: page,
            gpa: Gpa(page.first().0),
            perm: Perm::READ_WRITE,
        }
    })
}
