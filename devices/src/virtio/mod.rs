//! Virtio: what a device is to its transport, and the devices.

mod device;
pub mod iommu;

pub use device::{DeviceError, Interrupt, QueuePosition, StartedQueue, VirtioDevice};
