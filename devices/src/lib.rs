//! Devices of the machine and their buses.
//!
//! They access guest memory only through the [`iommu::AddressSpace`] of their
//! requester, and use no KVM: interrupts and doorbells are traits of
//! [`interrupt`].
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))] // They panic.
#![cfg_attr(
    not(test),
    warn(unreachable_pub, clippy::missing_errors_doc, clippy::indexing_slicing)
)]

pub mod bus;
pub mod error;
pub mod failure;
pub mod host_file;
pub mod interrupt;
pub mod legacy;
pub mod pause;
pub mod pci;
pub mod poll;
pub mod queue;
pub mod random;
pub mod smmuv3;
pub mod tap;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod thread;
pub mod vhost;
pub mod virtio;
