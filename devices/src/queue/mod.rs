//! Split virtqueues (virtio 1.2 §2.7) from the device's end: what the virtio
//! devices and the vhost back end both need of them.

pub mod chain;
pub mod posted;
mod running;

pub use running::{Interrupt, QueuePosition, RunningQueue};
