//! Virtio: what a device is to its transport, and the devices.

pub mod block;
mod device;
pub mod iommu;
pub mod net;
pub mod pci;
pub mod rng;
pub mod vsock;

pub use device::VirtioDevice;
use device::read_image;
