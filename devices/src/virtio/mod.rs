//! Virtio: what a device is to its transport, and the devices.

pub mod block;
pub mod chain;
mod device;
pub mod failure;
pub mod iommu;
pub mod net;
pub mod pci;
pub mod rng;
pub mod vsock;

use device::read_image;
pub use device::{DeviceError, Interrupt, QueuePosition, StartedQueue, VirtioDevice};
