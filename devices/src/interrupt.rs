//! Interfaces of the interrupt controller and of doorbells, without KVM.

use std::io;
use std::sync::Arc;

use iommu::{Gpa, StreamId};
use vmm_sys_util::eventfd::EventFd;

/// A level-triggered interrupt line of a platform device.
pub trait IrqLine: Send + Sync {
    /// Asserts or deasserts the line.
    fn set(&self, high: bool);
}

/// A message-signalled interrupt as the interrupt controller receives it: after
/// translation by the IOMMU in front of its requester.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Guest-physical address of the doorbell.
    pub address: Gpa,
    /// Data of the write.
    pub data: u32,
    /// Requester ID of the write. An ITS uses it as DeviceID.
    pub requester: StreamId,
}

/// Allocates interrupt sources.
pub trait MsiAllocator: Send + Sync {
    /// Allocates a source without a route.
    ///
    /// # Errors
    /// No file descriptor or no interrupt route is left.
    fn vector(&self) -> io::Result<Arc<dyn MsiVector>>;
}

/// One interrupt source: an eventfd that interrupts the guest while it is
/// routed.
///
/// The eventfd is the same for the life of the source, so a vhost device
/// receives it once. Nothing reads it while it is not routed: a signal stays in
/// its counter, which is the pending bit of MSI-X (PCIe 6.0 §6.1.4.5), and is
/// delivered when it is routed.
pub trait MsiVector: Send + Sync {
    /// Eventfd whose signal interrupts the guest.
    fn eventfd(&self) -> &EventFd;

    /// Routes signals to `message` from now on, a pending one included. `None`
    /// removes the route: signals are pending (masked, or no valid address).
    ///
    /// # Errors
    /// The hypervisor refused the route.
    fn route(&self, message: Option<MsiMessage>) -> io::Result<()>;

    /// Whether a signal is pending.
    fn pending(&self) -> bool;
}

/// Turns a guest's write to an address into a signal on an eventfd, without an
/// exit to this process.
pub trait Doorbells: Send + Sync {
    /// Makes every write to `address`, of any size and value, signal `kick`.
    ///
    /// # Errors
    /// The hypervisor refused the doorbell.
    fn attach(&self, address: Gpa, kick: &EventFd) -> io::Result<()>;

    /// Removes a doorbell of [`attach`](Self::attach).
    ///
    /// # Errors
    /// There is no such doorbell.
    fn detach(&self, address: Gpa, kick: &EventFd) -> io::Result<()>;
}
