//! Guest memory as an emulated device accesses it: at I/O virtual addresses.

use std::cell::Cell;
use std::iter::FusedIterator;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};

use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryBackend as _, GuestMemoryError, GuestMemoryRegion as _,
    MemoryRegionAddress, Permissions, VolatileSlice, guest_memory::GuestMemorySliceIterator,
};

use crate::addr::{Gpa, Iova, IovaRange};
use crate::mapping::{Access, Mapping, Perm};
use crate::ram::GuestRam;
use crate::region::Translating;
use crate::space::AddressSpace;
use crate::translate::{Fault, FaultReason};

/// Entries of a view's translation cache; a power of two.
const CACHE: usize = 64;
/// Bytes that share a slot of the cache, as a shift: 4 KiB.
const SLOT_SHIFT: u32 = 12;

/// Translations, direct-mapped by page and valid for one generation of the
/// stream. The cache is part of the IOMMU's TLB, not a device IOTLB: every
/// invalidation of the stream empties it.
#[derive(Debug)]
struct Cache {
    generation: u64,
    slots: [Option<Mapping>; CACHE],
}

/// A requester's view of guest memory. Each queue or thread uses a clone,
/// because a clone has its own translation cache.
///
/// ```
/// use std::sync::Arc;
/// use iommu::{AddressSpace, GuestRam, StreamId};
/// use vm_memory::{Bytes as _, GuestAddress};
///
/// let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)])?);
/// let dma = AddressSpace::identity(StreamId(8), ram).dma();
/// let view = dma.view();
/// view.write_obj(42_u32, GuestAddress(0x10))?;
/// assert_eq!(view.read_obj::<u32>(GuestAddress(0x10))?, 42);
/// assert!(view.read_obj::<u32>(GuestAddress(0x2000)).is_err());
/// assert_eq!(view.fault().map(|fault| fault.iova.0), Some(0x2000));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct DmaSpace {
    space: AddressSpace,
    cache: Mutex<Cache>,
}

impl AddressSpace {
    /// A view for a device that this process emulates, with an empty cache.
    #[must_use]
    pub fn dma(&self) -> DmaSpace {
        DmaSpace::new(self.clone())
    }
}

impl Clone for DmaSpace {
    fn clone(&self) -> Self {
        Self::new(self.space.clone())
    }
}

impl DmaSpace {
    fn new(space: AddressSpace) -> Self {
        Self {
            space,
            cache: Mutex::new(Cache {
                generation: 0,
                slots: [None; CACHE],
            }),
        }
    }

    /// The address space that the view accesses.
    #[must_use]
    pub fn space(&self) -> &AddressSpace {
        &self.space
    }

    /// Enters the stream's gate for a batch of accesses. An invalidation of the
    /// stream waits until the view is dropped, so no view is held across a
    /// sleep. A thread holds one view of a stream at a time.
    #[must_use]
    pub fn view(&self) -> DmaView<'_> {
        let translated = self.space.region().map(|region| {
            let inside = region.enter();
            // Another thread holds the cache of this clone, which is rare: use
            // none.
            let mut cache = self.cache.try_lock().ok();
            if let Some(cache) = &mut cache {
                let generation = region.generation();
                if cache.generation != generation {
                    cache.slots = [None; CACHE];
                    cache.generation = generation;
                }
            }
            Translated {
                inside,
                cache: std::cell::RefCell::new(cache),
                hits: Cell::new(0),
            }
        });
        DmaView {
            space: &self.space,
            translated,
            fault: Cell::new(None),
        }
    }
}

struct Translated<'a> {
    inside: Translating<'a>,
    cache: std::cell::RefCell<Option<MutexGuard<'a, Cache>>>,
    hits: Cell<u64>,
}

/// Guest memory at I/O virtual addresses, with the stream's gate entered. It
/// implements [`GuestMemory`], so code for untranslated memory accepts it.
///
/// `virtio_queue` ends a chain at a descriptor that faults:
/// [`fault`](Self::fault) distinguishes that from a complete chain.
pub struct DmaView<'a> {
    space: &'a AddressSpace,
    translated: Option<Translated<'a>>,
    fault: Cell<Option<Fault>>,
}

impl DmaView<'_> {
    /// The first fault since the view was opened or the last
    /// [`take_fault`](Self::take_fault).
    #[must_use]
    pub fn fault(&self) -> Option<Fault> {
        self.fault.get()
    }

    /// Removes and returns the fault, so that the next one is recorded.
    pub fn take_fault(&self) -> Option<Fault> {
        self.fault.take()
    }

    /// The run of addresses around `iova` whose mapping permits `access`.
    fn run(&self, iova: Iova, access: Access) -> Result<Mapping, Fault> {
        let Some(translated) = &self.translated else {
            return Ok(Mapping {
                iova: IovaRange::ALL,
                gpa: Gpa(0),
                perm: Perm::READ_WRITE,
            });
        };
        let mut cache = translated.cache.borrow_mut();
        let page = usize::try_from(iova.0 >> SLOT_SHIFT).unwrap_or(0) % CACHE;
        let slot = cache.as_mut().and_then(|cache| cache.slots.get_mut(page));
        if let Some(Some(known)) = &slot
            && known.iova.contains(iova)
            && known.perm.allows(access)
        {
            translated.hits.set(translated.hits.get() + 1);
            return Ok(*known);
        }
        let answer = translated.inside.translate(iova, access)?;
        if let Some(slot) = slot {
            *slot = Some(answer);
        }
        Ok(answer)
    }

    /// The longest part of `count` bytes at `iova` that is contiguous in RAM.
    fn piece(
        &self,
        iova: Iova,
        count: usize,
        access: Access,
    ) -> Result<VolatileSlice<'_, ()>, Fault> {
        let fault = |reason| Fault {
            stream: self.space.requester(),
            iova,
            access,
            reason,
        };
        let mapping = self.run(iova, access)?;
        let gpa = mapping
            .gpa_of(iova)
            .ok_or_else(|| fault(FaultReason::Translation))?;
        let ram: &GuestRam = self.space.ram();
        let block = ram
            .find_region(GuestAddress(gpa.0))
            .ok_or_else(|| fault(FaultReason::NotRam))?;
        let offset = gpa.0 - block.start_addr().0;
        let left = (mapping.iova.last().0 - iova.0)
            .saturating_add(1)
            .min(block.len() - offset);
        let count = count.min(usize::try_from(left).unwrap_or(usize::MAX));
        block
            .get_slice(MemoryRegionAddress(offset), count)
            .map_err(|_| fault(FaultReason::NotRam))
    }

    fn note(&self, fault: Fault) {
        // The model counts every other reason itself.
        if let (FaultReason::NotRam, Some(region)) = (fault.reason, self.space.region()) {
            region.counters().count_fault(fault.reason);
        }
        if self.fault.get().is_none() {
            self.fault.set(Some(fault));
        }
    }
}

impl Drop for DmaView<'_> {
    fn drop(&mut self) {
        if let (Some(translated), Some(region)) = (&self.translated, self.space.region()) {
            let hits = translated.hits.get();
            if hits != 0 {
                region.counters().hits.fetch_add(hits, Ordering::Relaxed);
            }
        }
    }
}

impl GuestMemory for DmaView<'_> {
    type PhysicalMemory = GuestRam;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        match self.get_slices(addr, count, access) {
            Ok(mut slices) => slices.all(|slice| slice.is_ok()),
            Err(_) => false,
        }
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> vm_memory::GuestMemoryResult<impl GuestMemorySliceIterator<'a, ()>> {
        Ok(Slices {
            view: self,
            iova: addr.0,
            left: count,
            access: match access {
                Permissions::No | Permissions::Read => Access::Read,
                Permissions::Write | Permissions::ReadWrite => Access::Write,
            },
            also_read: access == Permissions::ReadWrite,
        })
    }
}

/// The pieces of RAM to which a range of I/O virtual addresses is mapped.
struct Slices<'a, 'v> {
    view: &'a DmaView<'v>,
    iova: u64,
    left: usize,
    access: Access,
    also_read: bool,
}

impl<'a> Slices<'a, '_> {
    fn piece(&self) -> Result<VolatileSlice<'a, ()>, Fault> {
        let iova = Iova(self.iova);
        // A range that ends beyond 2^64 - 1 is refused, not wrapped around.
        if iova.checked_add(self.left as u64 - 1).is_none() {
            return Err(Fault {
                stream: self.view.space.requester(),
                iova,
                access: self.access,
                reason: FaultReason::AddressSize,
            });
        }
        let piece = self.view.piece(iova, self.left, self.access)?;
        if self.also_read {
            let readable = self.view.piece(iova, piece.len(), Access::Read)?;
            return Ok(if readable.len() < piece.len() {
                readable
            } else {
                piece
            });
        }
        Ok(piece)
    }
}

impl<'a> Iterator for Slices<'a, '_> {
    type Item = vm_memory::GuestMemoryResult<VolatileSlice<'a, ()>>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        match self.piece() {
            Ok(piece) => {
                self.left -= piece.len();
                self.iova = self.iova.wrapping_add(piece.len() as u64);
                Some(Ok(piece))
            }
            Err(fault) => {
                self.view.note(fault);
                self.left = 0;
                Some(Err(GuestMemoryError::InvalidGuestAddress(GuestAddress(
                    self.iova,
                ))))
            }
        }
    }
}

impl FusedIterator for Slices<'_, '_> {}
impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a, '_> {}

#[cfg(test)]
mod tests;
