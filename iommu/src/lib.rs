//! A guest's IOMMU as a library: addresses, translation, the notifier chain,
//! and the models (virtio-iommu, SMMUv3) that stand behind it.
//!
//! The crate has no file descriptor, no thread and no KVM in it. A monitor
//! gives every requester (a PCI function) an [`AddressSpace`]; a device that it
//! emulates reaches guest memory through a [`DmaSpace`] made from it, and a
//! consumer that keeps a copy of translations (vhost, an MSI route) listens to
//! it by [`IommuRegion::register`].
//!
//! # Locks
//! From the outermost to the innermost:
//!
//! 1. a model's command lock: commands of one IOMMU are carried out in order;
//! 2. the [`Gate`](gate::Gate) of a stream: shared by {translate, use or
//!    publish}, exclusive for {invalidate, notify};
//! 3. a consumer's own lock, taken inside its [`NotifierSink`];
//! 4. a model's state (tables, TLB), never held while a gate is taken or a
//!    sink is called: a sink may look up.
#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        reason = "tests index small tables by the addresses they made up"
    )
)]

mod addr;
pub mod dma;
pub mod gate;
mod mapping;
mod notifier;
mod ram;
mod region;
pub mod smmuv3;
mod space;
mod translate;
pub mod virtio;

pub use addr::{EmptyRange, Gpa, Hva, Iova, IovaRange, StreamId};
pub use dma::{DmaSpace, DmaView};
pub use mapping::{Access, Mapping, Perm};
pub use notifier::{
    IommuNotifier, NotifierEvents, NotifierId, NotifierSink, Refused, Registration, StreamSink,
};
pub use ram::GuestRam;
pub use region::{IommuRegion, StreamCounters, StreamStats, Translating};
pub use space::AddressSpace;
pub use translate::{Fault, FaultReason, Iommu, Request, RequestKind};
