//! Where interrupts and kicks go. Devices see these traits and never KVM.

use std::io;
use std::sync::Arc;

use iommu::{Gpa, StreamId};
use vmm_sys_util::eventfd::EventFd;

/// A level-triggered interrupt line of a platform device.
pub trait IrqLine: Send + Sync {
    /// Raises or lowers the line.
    fn set(&self, high: bool);
}

/// A message-signalled interrupt as the interrupt controller gets it: already
/// translated by the IOMMU that stands before its sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// The doorbell, guest-physical.
    pub address: Gpa,
    /// What is written there.
    pub data: u32,
    /// The requester ID that comes with the write; an ITS knows its sender by
    /// it.
    pub requester: StreamId,
}

/// Allocates interrupt sources.
pub trait MsiAllocator: Send + Sync {
    /// A new source, routed nowhere.
    ///
    /// # Errors
    /// No file descriptor or no interrupt route is left.
    fn vector(&self) -> io::Result<Arc<dyn MsiVector>>;
}

/// One interrupt source: an eventfd that is an interrupt while it is routed.
///
/// The eventfd stays the same for the life of the source, so a vhost device
/// can be given it once. While it is not routed nobody reads it: what is
/// signalled then stays in its counter, which is the pending bit of MSI-X
/// (PCIe 6.0 §6.1.4.5), and is delivered when it is routed.
pub trait MsiVector: Send + Sync {
    /// Signal this to interrupt the guest.
    fn eventfd(&self) -> &EventFd;

    /// Sends what is signalled to `message` from now on, what is pending
    /// included; `None` holds it back (masked, or without a valid address).
    ///
    /// # Errors
    /// The hypervisor refused the route.
    fn route(&self, message: Option<MsiMessage>) -> io::Result<()>;

    /// Whether something is signalled and held back.
    fn pending(&self) -> bool;
}

/// Turns a guest's write to an address into a signal on an eventfd, without a
/// visit to this process.
pub trait Doorbells: Send + Sync {
    /// Every write to `address`, whatever its size and value, signals `kick`.
    ///
    /// # Errors
    /// The hypervisor refused.
    fn attach(&self, address: Gpa, kick: &EventFd) -> io::Result<()>;

    /// Undoes [`attach`](Self::attach).
    ///
    /// # Errors
    /// There is no such doorbell.
    fn detach(&self, address: Gpa, kick: &EventFd) -> io::Result<()>;
}
