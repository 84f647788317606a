//! The device side of split virtqueues (virtio 1.2 §2.7), for the virtio
//! devices and the vhost back end.

pub mod chain;
pub mod posted;
mod running;

pub use running::{Interrupt, QueuePosition, RunningQueue};
