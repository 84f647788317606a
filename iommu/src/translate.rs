//! Translation requests, faults, and the trait that every model implements.

use std::ops::ControlFlow;
use std::sync::Weak;

use serde::{Deserialize, Serialize};

use crate::addr::{Iova, IovaRange, StreamId};
use crate::mapping::{Access, Mapping};
use crate::notifier::{NotifierEvents, Refused, StreamSink};

/// How a request reaches the IOMMU (PCIe 6.0 §10.2, the AT field).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// An access with an untranslated address.
    Untranslated,
    /// An ATS translation request: the device keeps the translation in its
    /// device IOTLB until an invalidation.
    AtsTranslation,
}

/// A translation request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Stream of the requester.
    pub stream: StreamId,
    /// SubstreamID (PASID) of the request, if it has one.
    pub substream: Option<u32>,
    /// Address to translate.
    pub iova: Iova,
    /// Direction of the access.
    pub access: Access,
    /// Kind of the transaction.
    pub kind: RequestKind,
}

impl Request {
    /// An untranslated access without a SubstreamID.
    #[must_use]
    pub const fn untranslated(stream: StreamId, iova: Iova, access: Access) -> Self {
        Self {
            stream,
            substream: None,
            iova,
            access,
            kind: RequestKind::Untranslated,
        }
    }
}

/// Reason of a fault, common to all models. The model's own event record has
/// more detail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultReason {
    /// The stream has no domain or its configuration is not valid.
    Configuration,
    /// The address is not mapped.
    Translation,
    /// The mapping does not permit the access.
    Permission,
    /// The address is outside what the stream may use.
    AddressSize,
    /// The access flag of the mapping is clear, and the IOMMU does not set it.
    AccessFlag,
    /// A table or a configuration structure is outside of RAM.
    External,
    /// The configuration aborts the stream's requests.
    Aborted,
    /// The address is mapped to a guest-physical address that is not RAM.
    NotRam,
}

impl FaultReason {
    /// Every reason, in the order of their declaration.
    pub const ALL: [Self; 8] = [
        Self::Configuration,
        Self::Translation,
        Self::Permission,
        Self::AddressSize,
        Self::AccessFlag,
        Self::External,
        Self::Aborted,
        Self::NotRam,
    ];
}

/// A request without a translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{access:?} of {iova} by {stream} faults: {reason:?}")]
pub struct Fault {
    /// Stream of the requester.
    pub stream: StreamId,
    /// Address of the access.
    pub iova: Iova,
    /// Direction of the access.
    pub access: Access,
    /// Reason, common to all models.
    pub reason: FaultReason,
}

impl Fault {
    /// The fault of `request` for `reason`.
    #[must_use]
    pub const fn new(request: &Request, reason: FaultReason) -> Self {
        Self {
            stream: request.stream,
            iova: request.iova,
            access: request.access,
            reason,
        }
    }
}

/// A model of an IOMMU.
///
/// The methods that translate are called by [`IommuRegion`](crate::IommuRegion)
/// with the stream's gate held at least shared: a model takes only its own
/// state lock in them.
pub trait Iommu: Send + Sync {
    /// Translates to the largest mapping around the address that the model can
    /// determine. A fault is recorded as the model's own event.
    ///
    /// # Errors
    /// The [`Fault`]; its event has been recorded.
    fn translate(&self, request: &Request) -> Result<Mapping, Fault>;

    /// As [`translate`](Self::translate), but records no event, updates no flag
    /// in a descriptor, fills no cache of the model and counts nothing. The
    /// consumers of the stream may keep the translation: its invalidation
    /// reaches them. For prefetching and for inspection.
    ///
    /// # Errors
    /// The [`Fault`]; it is not recorded.
    fn lookup(&self, request: &Request) -> Result<Mapping, Fault>;

    /// Checks whether a notifier of a stream may change its events from `old`
    /// to `new`. Called with the stream's gate held exclusively.
    ///
    /// # Errors
    /// [`Refused`] names the events that the model cannot deliver for this
    /// stream now.
    fn notifier_events_changed(
        &self,
        stream: StreamId,
        old: NotifierEvents,
        new: NotifierEvents,
    ) -> Result<(), Refused>;

    /// Passes the mappings of the stream that overlap `range` to `visit`, in
    /// ascending order, until it breaks. Called with the stream's gate held
    /// exclusively; `visit` is called without the model's state lock.
    fn replay(
        &self,
        stream: StreamId,
        range: IovaRange,
        visit: &mut dyn FnMut(&Mapping) -> ControlFlow<()>,
    );

    /// Sets the receiver of changes of a stream's translations. Called once per
    /// region, at its creation.
    fn connect(&self, stream: StreamId, sink: Weak<dyn StreamSink>);
}
