//! The address space of one requester.

use std::sync::Arc;

use crate::addr::StreamId;
use crate::ram::GuestRam;
use crate::region::IommuRegion;

/// The address space of one requester: all of RAM at its own address, or one
/// region that the guest's IOMMU translates. Cheap to clone.
#[derive(Clone, Debug)]
pub struct AddressSpace {
    requester: StreamId,
    ram: Arc<GuestRam>,
    region: Option<Arc<IommuRegion>>,
}

impl AddressSpace {
    /// The address space of a requester that is behind no IOMMU.
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

    /// Requester ID of the owner.
    #[must_use]
    pub fn requester(&self) -> StreamId {
        self.requester
    }

    /// RAM that the address space leads to.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The translated region; `None` behind no IOMMU.
    #[must_use]
    pub fn region(&self) -> Option<&Arc<IommuRegion>> {
        self.region.as_ref()
    }
}
