//! PCI configuration space as memory that the guest reads without an exit.
//!
//! Each function's 4 KiB of the ECAM window are a read-only memory slot: KVM
//! exits for writes only. A function whose reads have effects loses its slot.
//! Absent functions have none, because Linux reads one register of each.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use arch::layout;
use devices::pci::ConfigImage;
use iommu::Gpa;
use vm_memory::{Bytes as _, VolatileMemory as _};

use super::error::Error;
use super::vm::{PAGE, Vm};

/// Bytes of the ECAM window for one device number, as a shift.
const SLOT_SHIFT: u32 = 15;

/// The pages of all functions that have one.
pub(crate) struct ConfigPages {
    vm: Arc<Vm>,
    /// Page of each device number in the VM's read-only memory.
    pages: BTreeMap<u8, usize>,
}

impl ConfigPages {
    /// Gives the guest a page of zeros for function 0 of each device number.
    /// `None` where reads of these pages are not coherent with their writes.
    ///
    /// # Errors
    /// The host refuses the memory.
    pub(crate) fn new(
        vm: &Arc<Vm>,
        slots: impl Iterator<Item = u8>,
    ) -> Result<Option<Arc<Self>>, Error> {
        let pages: BTreeMap<u8, usize> = slots.zip(0..).collect();
        if !vm.allocate_read_only(pages.len())? {
            return Ok(None);
        }
        let this = Self {
            vm: Arc::clone(vm),
            pages,
        };
        for (&slot, &page) in &this.pages {
            this.vm.set_read_only(page, Some(address(slot)))?;
        }
        Ok(Some(Arc::new(this)))
    }
}

fn address(slot: u8) -> Gpa {
    Gpa(layout::PCI_ECAM.base + (u64::from(slot) << SLOT_SHIFT))
}

impl ConfigImage for ConfigPages {
    fn store(&self, slot: u8, offset: u16, bytes: &[u8]) {
        let page = self.pages.get(&slot).zip(self.vm.read_only());
        let Some((page, memory)) = page else {
            return;
        };
        let Ok(page) = memory.get_slice(page * PAGE, PAGE) else {
            return;
        };
        for (at, word) in (usize::from(offset)..)
            .step_by(4)
            .zip(bytes.chunks_exact(4))
        {
            let word = <[u8; 4]>::try_from(word).map_or(0, u32::from_ne_bytes);
            // Only an offset beyond the page is an error.
            let _ = page.store(word, at, Ordering::Relaxed);
        }
    }

    fn withdraw(&self, slot: u8) {
        let Some(&page) = self.pages.get(&slot) else {
            return;
        };
        if let Err(error) = self.vm.set_read_only(page, None) {
            // Reads of its window then return the last value.
            log::error!("configuration space of PCI device {slot}: {error}");
        }
    }
}
