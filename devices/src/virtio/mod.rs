//! Virtio (1.2): the devices, and their PCI transport.

pub mod block;
mod counters;
mod device;
pub mod iommu;
pub mod net;
pub mod pci;
pub mod rng;
pub mod vsock;

pub use counters::{BlockCounters, DeviceCounters, NetCounters};
pub use device::VirtioDevice;
