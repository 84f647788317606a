//! Guest memory as an emulated device accesses it: at I/O virtual addresses.

mod cache;

use std::cell::Cell;
use std::iter::FusedIterator;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, MutexGuard};

use vm_memory::{
    GuestAddress, GuestMemory, GuestMemoryError, Permissions, VolatileSlice,
    guest_memory::GuestMemorySliceIterator,
};

use self::cache::{Cache, Slot};
use crate::addr::{Gpa, Iova, IovaRange};
use crate::mapping::{Access, Mapping, Perm};
use crate::ram::GuestRam;
use crate::region::Translating;
use crate::space::AddressSpace;
use crate::translate::{Fault, FaultReason};

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
            cache: Mutex::new(Cache::new(0)),
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
                cache.renew(region.generation());
            }
            Translated {
                inside,
                cache,
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
    cache: Option<MutexGuard<'a, Cache>>,
    hits: Cell<u64>,
}

impl Translated<'_> {
    fn hit(&self) {
        self.hits.set(self.hits.get().wrapping_add(1));
    }
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

    /// All of `count` bytes at `iova`, if one cached translation has them.
    #[inline]
    fn cached(&self, iova: u64, count: usize, wanted: Perm) -> Option<VolatileSlice<'_, ()>> {
        let translated = self.translated.as_ref()?;
        let cache = translated.cache.as_ref()?;
        let slice = cache.slice(self.space.ram(), iova, count, wanted)?;
        translated.hit();
        Some(slice)
    }

    /// The longest part of `count` bytes at `iova` that is contiguous in RAM and
    /// permits `wanted`.
    fn piece(
        &self,
        iova: Iova,
        count: usize,
        wanted: Perm,
    ) -> Result<VolatileSlice<'_, ()>, Fault> {
        let access = access_of(wanted);
        // A range that ends beyond 2^64 - 1 is refused, not wrapped around.
        if iova.checked_add(count as u64 - 1).is_none() {
            return Err(self.fault_of(iova, access, FaultReason::AddressSize));
        }
        let cache = self.translated.as_ref().and_then(|t| t.cache.as_ref());
        let slot = match cache.and_then(|cache| cache.find(iova, wanted)) {
            Some(slot) => {
                self.translated.iter().for_each(Translated::hit);
                slot
            }
            None => {
                let mut slot = self.translate(iova, access)?;
                if !slot.perm().contains(wanted) {
                    slot = self.translate(iova, Access::Read)?;
                }
                cache.into_iter().for_each(|cache| cache.insert(iova, slot));
                slot
            }
        };
        let slice = slot.slice(self.space.ram(), iova.0, count);
        slice.ok_or_else(|| self.fault_of(iova, access, FaultReason::NotRam))
    }

    /// The translation of `iova` for one access, in its block of RAM.
    fn translate(&self, iova: Iova, access: Access) -> Result<Slot, Fault> {
        let mapping = match &self.translated {
            None => Mapping {
                iova: IovaRange::ALL,
                gpa: Gpa(0),
                perm: Perm::READ_WRITE,
            },
            Some(translated) => translated.inside.translate(iova, access)?,
        };
        let slot = Slot::new(self.space.ram(), &mapping, iova);
        slot.ok_or_else(|| self.fault_of(iova, access, FaultReason::NotRam))
    }

    fn fault_of(&self, iova: Iova, access: Access, reason: FaultReason) -> Fault {
        Fault {
            stream: self.space.requester(),
            iova,
            access,
            reason,
        }
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

/// The access that is translated first.
fn access_of(wanted: Perm) -> Access {
    if wanted.contains(Perm::WRITE) {
        Access::Write
    } else {
        Access::Read
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
            wanted: match access {
                Permissions::No | Permissions::Read => Perm::READ,
                Permissions::Write => Perm::WRITE,
                Permissions::ReadWrite => Perm::READ_WRITE,
            },
        })
    }
}

/// The pieces of RAM to which a range of I/O virtual addresses is mapped.
struct Slices<'a, 'v> {
    view: &'a DmaView<'v>,
    iova: u64,
    left: usize,
    wanted: Perm,
}

impl<'a> Slices<'a, '_> {
    /// The next piece, where no cached translation has all of the rest.
    #[inline(never)]
    fn next_piece(&mut self) -> <Self as Iterator>::Item {
        match self.view.piece(Iova(self.iova), self.left, self.wanted) {
            Ok(piece) => {
                self.left -= piece.len();
                self.iova = self.iova.wrapping_add(piece.len() as u64);
                Ok(piece)
            }
            Err(fault) => {
                self.view.note(fault);
                self.left = 0;
                let address = GuestAddress(self.iova);
                Err(GuestMemoryError::InvalidGuestAddress(address))
            }
        }
    }
}

impl<'a> Iterator for Slices<'a, '_> {
    type Item = vm_memory::GuestMemoryResult<VolatileSlice<'a, ()>>;

    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.left == 0 {
            return None;
        }
        let rest = self.view.cached(self.iova, self.left, self.wanted);
        let Some(rest) = rest else {
            return Some(self.next_piece());
        };
        self.left = 0;
        Some(Ok(rest))
    }
}

impl FusedIterator for Slices<'_, '_> {}
impl<'a> GuestMemorySliceIterator<'a, ()> for Slices<'a, '_> {}

#[cfg(test)]
mod tests;
