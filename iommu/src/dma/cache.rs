//! The translation cache of a [`DmaSpace`](super::DmaSpace).

use std::cell::Cell;

use vm_memory::{
    GuestMemoryBackend as _, GuestMemoryRegion as _, GuestRegionMmap, MemoryRegionAddress,
    VolatileSlice,
};

use crate::addr::Iova;
use crate::mapping::{Mapping, Perm};
use crate::ram::GuestRam;

/// Slots of a cache; a power of two.
const SLOTS: usize = 64;
/// Bytes that share a slot, as a shift: 4 KiB.
const PAGE_SHIFT: u32 = 12;

/// A translation whose target is in one block of RAM.
#[derive(Clone, Copy, Debug)]
pub(super) struct Slot {
    first: u64,
    /// Bytes minus one.
    extent: u64,
    /// Offset in the block of the target of `first`.
    offset: u64,
    /// Index of the block in RAM.
    block: usize,
    /// Permitted accesses; none in an empty slot.
    perm: Perm,
}

impl Slot {
    const EMPTY: Self = Self {
        first: 0,
        extent: 0,
        offset: 0,
        block: 0,
        perm: Perm::empty(),
    };

    /// The part of `mapping` around `iova` whose target is in one block of RAM.
    /// `None` if the target of `iova` is not RAM.
    pub(super) fn new(ram: &GuestRam, mapping: &Mapping, iova: Iova) -> Option<Self> {
        let gpa = mapping.gpa_of(iova)?.0;
        let offset_in = |block: &GuestRegionMmap<()>| {
            let offset = gpa.checked_sub(block.start_addr().0);
            offset.filter(|offset| *offset < block.len())
        };
        let mut blocks = ram.iter().enumerate();
        let (block, offset, len) = blocks.find_map(|(index, block)| {
            let offset = offset_in(block)?;
            Some((index, offset, block.len()))
        })?;
        let below = offset.min(iova.0 - mapping.iova.first().0);
        let above = (len - 1 - offset).min(mapping.iova.last().0 - iova.0);
        Some(Self {
            first: iova.0 - below,
            extent: below + above,
            offset: offset - below,
            block,
            perm: mapping.perm,
        })
    }

    pub(super) const fn perm(&self) -> Perm {
        self.perm
    }

    /// The part of up to `count` bytes at `iova`, of which the slot contains the
    /// first one. `count` is not 0.
    pub(super) fn slice<'a>(
        &self,
        ram: &'a GuestRam,
        iova: u64,
        count: usize,
    ) -> Option<VolatileSlice<'a, ()>> {
        let left = self.extent - (iova - self.first);
        let more = usize::try_from(left).unwrap_or(usize::MAX);
        self.exactly(ram, iova, (count - 1).min(more) + 1)
    }

    /// `count` bytes at `iova`, all of which the slot contains.
    #[inline]
    fn exactly<'a>(
        &self,
        ram: &'a GuestRam,
        iova: u64,
        count: usize,
    ) -> Option<VolatileSlice<'a, ()>> {
        let offset = self.offset.wrapping_add(iova.wrapping_sub(self.first));
        let block = ram.iter().nth(self.block)?;
        block.get_slice(MemoryRegionAddress(offset), count).ok()
    }
}

/// Translations, direct-mapped by page and valid for one generation of the
/// stream. The cache is part of the IOMMU's TLB, not a device IOTLB: every
/// invalidation of the stream empties it.
#[derive(Debug)]
pub(super) struct Cache {
    generation: u64,
    slots: [Cell<Slot>; SLOTS],
}

impl Cache {
    /// An empty cache.
    pub(super) const fn new(generation: u64) -> Self {
        Self {
            generation,
            slots: [const { Cell::new(Slot::EMPTY) }; SLOTS],
        }
    }

    /// Empties the cache unless it is of this generation.
    pub(super) fn renew(&mut self, generation: u64) {
        if self.generation != generation {
            *self = Self::new(generation);
        }
    }

    #[inline]
    fn cell(&self, iova: u64) -> Option<&Cell<Slot>> {
        let page = usize::try_from(iova >> PAGE_SHIFT).unwrap_or(0);
        self.slots.get(page % SLOTS)
    }

    /// The translation of `iova` that permits `wanted`.
    pub(super) fn find(&self, iova: Iova, wanted: Perm) -> Option<Slot> {
        let slot = self.cell(iova.0)?.get();
        let inside = iova.0.wrapping_sub(slot.first) <= slot.extent;
        (inside && slot.perm.contains(wanted)).then_some(slot)
    }

    /// All of `count` bytes at `iova`, if one translation has them and permits
    /// `wanted`. `count` is not 0.
    #[inline]
    pub(super) fn slice<'a>(
        &self,
        ram: &'a GuestRam,
        iova: u64,
        count: usize,
        wanted: Perm,
    ) -> Option<VolatileSlice<'a, ()>> {
        let slot = self.cell(iova)?.get();
        let into = iova.wrapping_sub(slot.first);
        let more = count as u64 - 1;
        if into > slot.extent || slot.extent - into < more || !slot.perm.contains(wanted) {
            return None;
        }
        slot.exactly(ram, iova, count)
    }

    /// Replaces the translation of the page of `iova`.
    pub(super) fn insert(&self, iova: Iova, slot: Slot) {
        if let Some(cell) = self.cell(iova.0) {
            cell.set(slot);
        }
    }
}
