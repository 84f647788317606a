//! A guest's IOMMU as a library: addresses, translation, the notifier chain,
//! and two models, [`virtio`] and [`smmuv3`].
//!
//! The crate has no file descriptor, no thread and no KVM in it. A monitor
//! gives every requester (a PCI function) an [`AddressSpace`]. A device that it
//! emulates reaches guest memory through a [`DmaSpace`] made from it. A consumer
//! that keeps translations (vhost, an MSI route) registers an [`IommuNotifier`]
//! with its [`IommuRegion`].
//!
//! ```text
//!   guest driver: MAP, UNMAP, CMD_TLBI, CMD_ATC_INV, registers
//!        |
//!        v                  StreamSink: invalidate, map, reload
//!   +---------+ ------------------------------> +---------------------+
//!   |  Iommu  |                                 | IommuRegion(stream) |
//!   | (model) | <------------------------------ | gate, notifiers     |
//!   +---------+  translate, lookup, replay,     +---------------------+
//!                notifier_events_changed          |                 ^
//!                                                 | NotifierSink:   | enter, translate
//!                                                 | map, unmap      |
//!                                                 v                 |
//!                                              vhost,            DmaSpace (emulated
//!                                              MSI routes        devices), miss handlers
//! ```
//!
//! The program `examples/notifier_chain.rs` uses all of it: two requesters, a
//! consumer whose preferred events are refused, and an SMMUv3 whose guest
//! enables and disables ATS.
//!
//! # Locks
//! From the outermost to the innermost:
//!
//! 1. a model's command lock: commands of one IOMMU are executed in order;
//! 2. the [`Gate`](gate::Gate) of a stream: shared by {translate, use or
//!    publish}, exclusive for {invalidate, notify};
//! 3. a consumer's own lock, taken inside its [`NotifierSink`];
//! 4. a model's state (tables, TLB), never held while a gate is taken or a
//!    sink is called, because a sink may call `lookup`.
#![forbid(unsafe_code)]
#![warn(unreachable_pub, clippy::indexing_slicing, clippy::missing_errors_doc)]
#![cfg_attr(
    test,
    allow(
        clippy::cast_possible_truncation,
        clippy::indexing_slicing,
        unreachable_pub,
        reason = "tests index small tables by the addresses they made up, and export nothing"
    )
)]

mod addr;
pub mod dma;
pub mod gate;
pub mod lock;
mod mapping;
mod notifier;
mod ram;
mod region;
pub mod smmuv3;
mod space;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
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
