//! What one requester sees when it looks at the bus.

use std::sync::Arc;

use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _};

use crate::{
    Access, DmaSpace, Fault, FaultReason, Gpa, GuestRam, IommuRegion, Iova, IovaRange, Mapping,
    Perm, StreamId,
};

/// A piece of a requester's address space.
#[derive(Clone, Debug)]
pub enum Section {
    /// RAM that the device reaches at its guest-physical address.
    Ram(Mapping),
    /// Addresses that an IOMMU translates.
    Iommu(Arc<IommuRegion>),
}

/// Who wants to know of what an address space is made: vhost, MSI routes.
pub trait MemoryListener {
    /// A section is part of the address space.
    fn region_add(&mut self, section: &Section);
}

/// The address space of one requester: all of RAM at its own address, or one
/// region that the guest's IOMMU translates. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AddressSpace {
    requester: StreamId,
    ram: Arc<GuestRam>,
    region: Option<Arc<IommuRegion>>,
}

impl AddressSpace {
    /// The address space of a requester that no IOMMU stands before.
    #[must_use]
    pub fn identity(requester: StreamId, ram: Arc<GuestRam>) -> Self {
        Self {
            requester,
            ram,
            region: None,
        }
    }

    /// The address space of the requester whose stream `region` is.
    #[must_use]
    pub fn translated(region: Arc<IommuRegion>, ram: Arc<GuestRam>) -> Self {
        Self {
            requester: region.stream(),
            ram,
            region: Some(region),
        }
    }

    /// Whose it is.
    #[must_use]
    pub fn requester(&self) -> StreamId {
        self.requester
    }

    /// The guest's RAM below it.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The region that an IOMMU translates, if one does.
    #[must_use]
    pub fn region(&self) -> Option<&Arc<IommuRegion>> {
        self.region.as_ref()
    }

    /// A way to memory for a device that this process emulates.
    #[must_use]
    pub fn dma(&self) -> DmaSpace {
        DmaSpace::new(self.clone())
    }

    /// Shows `listener` every section.
    pub fn listen(&self, listener: &mut dyn MemoryListener) {
        match &self.region {
            Some(region) => listener.region_add(&Section::Iommu(Arc::clone(region))),
            None => {
                for block in ram_blocks(&self.ram) {
                    listener.region_add(&Section::Ram(block));
                }
            }
        }
    }

    /// Translates an access where it stands alone, such as an MSI write: the
    /// answer may change as soon as this returns, unless the caller holds a
    /// notifier for it.
    ///
    /// # Errors
    /// The [`Fault`].
    pub fn translate_once(&self, iova: Iova, access: Access) -> Result<Gpa, Fault> {
        let Some(region) = &self.region else {
            return Ok(Gpa(iova.0));
        };
        let mapping = region.enter().translate(iova, access)?;
        mapping.gpa_of(iova).ok_or(Fault {
            stream: self.requester,
            iova,
            access,
            reason: FaultReason::Translation,
        })
    }
}

/// The regions of RAM as mappings of themselves: what an IOMMU in bypass
/// answers with.
pub fn ram_blocks(ram: &GuestRam) -> impl Iterator<Item = Mapping> + '_ {
    ram.iter().filter_map(|block| {
        let first = block.start_addr().0;
        Some(Mapping {
            iova: IovaRange::from_len(Iova(first), block.len()).ok()?,
            gpa: Gpa(first),
            perm: Perm::READ_WRITE,
        })
    })
}

/// The mapping of `iova` to itself: the whole block of RAM it lies in, or its
/// page outside of RAM (an interrupt doorbell, say).
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
