//! The PCI bus of a machine: the root, the IOMMU in front of its functions, and
//! the functions.

mod bus;
mod function;
mod iommu;
mod report;
mod smmuv3;
mod vhost;
mod virtio_iommu;

pub(crate) use self::bus::PciBus;
#[cfg(test)]
pub(crate) use self::iommu::IommuDevice;
