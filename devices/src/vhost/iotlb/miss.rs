//! Translations of the IOMMU as entries of the kernel's IOTLB.

use iommu::{Access, GuestRam, Hva, Iova, IovaRange, Mapping, Translating};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _, MemoryRegionAddress};

use crate::vhost::shadow::Entry;

/// Whether the model records a fault.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Recording {
    On,
    Off,
}

/// Translates for a stream while its gate is held.
pub(super) struct StreamTranslator<'a> {
    pub(super) inside: &'a Translating<'a>,
    pub(super) ram: &'a GuestRam,
    /// Translates by ATS requests (PCIe 6.0 §10.2).
    pub(super) ats: bool,
}

impl StreamTranslator<'_> {
    /// Translates an access of the device. The model records a fault.
    pub(super) fn resolve(&self, iova: Iova, access: Access) -> Option<Entry> {
        let answer = if self.ats {
            self.inside.request_ats(iova, access)
        } else {
            self.inside.translate(iova, access)
        };
        let mapping = answer.ok().filter(|mapping| mapping.perm.allows(access))?;
        pieces(self.ram, &mapping).find(|piece| piece.iova.contains(iova))
    }

    /// Translates without recording a fault.
    pub(super) fn resolve_quietly(&self, iova: Iova, access: Access) -> Option<Entry> {
        self.inside.lookup(iova, access).ok()?;
        self.resolve(iova, access)
    }
}

/// Splits a mapping into entries that are contiguous in this process's memory.
/// Parts outside of RAM are omitted.
pub(super) fn pieces<'a>(
    ram: &'a GuestRam,
    mapping: &'a Mapping,
) -> impl Iterator<Item = Entry> + 'a {
    ram.iter().filter_map(|block| {
        let start = block.start_addr().0;
        let below = mapping.gpa.0;
        let first = start.max(below);
        let last = (start + (block.len() - 1)).min(below.checked_add(mapping.iova.extent())?);
        let extent = last.checked_sub(first)?;
        let iova = mapping.iova.first().checked_add(first - below)?;
        let host = block.get_host_address(MemoryRegionAddress(first - start));
        Some(Entry {
            iova: IovaRange::new(iova, iova.checked_add(extent)?).ok()?,
            hva: Hva(host.ok()?.addr() as u64),
            perm: mapping.perm,
        })
    })
}
