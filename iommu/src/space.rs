//! The address space of one requester.

use std::sync::Arc;

use crate::addr::StreamId;
use crate::ram::GuestRam;
use crate::region::IommuRegion;

/// The address space of one requester: the identity mapping of RAM, or one
/// region that the guest's IOMMU translates. A clone shares both.
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

    /// The address space of the requester with the stream of `region`.
    #[must_use]
    pub fn translated(region: Arc<IommuRegion>, ram: Arc<GuestRam>) -> Self {
        Self {
            requester: region.stream(),
            ram,
            region: Some(region),
        }
    }

    /// Stream ID of the requester.
    #[must_use]
    pub fn requester(&self) -> StreamId {
        self.requester
    }

    /// RAM that translations refer to.
    #[must_use]
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The translated region; `None` for a requester that is behind no IOMMU.
    #[must_use]
    pub fn region(&self) -> Option<&Arc<IommuRegion>> {
        self.region.as_ref()
    }
}
