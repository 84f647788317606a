//! Notifiers: notify the consumers of translations of changes.

use std::fmt;
use std::sync::Arc;

use bitflags::bitflags;
use serde::{Serialize, Serializer};

use crate::addr::IovaRange;
use crate::mapping::Mapping;

/// A set of events that a notifier requests.
///
/// ```
/// use iommu::NotifierEvents;
///
/// let events = NotifierEvents::MAP | NotifierEvents::UNMAP;
/// assert!(events.contains(NotifierEvents::UNMAP));
/// assert_eq!(events.to_string(), "map+unmap");
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct NotifierEvents(u8);

bitflags! {
    impl NotifierEvents: u8 {
        /// Mappings that are created.
        const MAP = 1;
        /// Ranges whose translation changed.
        const UNMAP = 2;
        /// Invalidations of the device IOTLB by the guest (ATS).
        const DEVIOTLB_UNMAP = 4;
    }
}

impl fmt::Display for NotifierEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::MAP, "map"),
            (Self::UNMAP, "unmap"),
            (Self::DEVIOTLB_UNMAP, "dev-iotlb"),
        ];
        let set = names.iter().filter(|(bit, _)| self.contains(*bit));
        let text = set.map(|(_, name)| *name).collect::<Vec<_>>().join("+");
        f.write_str(if text.is_empty() { "none" } else { &text })
    }
}

impl fmt::Debug for NotifierEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for NotifierEvents {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Refusal of an event set by a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{events} refused: {reason}")]
pub struct Refused {
    /// The events that the model cannot deliver.
    pub events: NotifierEvents,
    /// Reason for the log and the API.
    pub reason: &'static str,
}

/// Result of a registration.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// Events that are delivered; empty when every set was refused.
    pub events: NotifierEvents,
    /// The sets that were preferred and refused, in the order of preference.
    pub refused: Vec<Refused>,
}

/// Callbacks of a consumer. Every method is called with the stream's gate held:
/// it must neither enter the gate nor register, and should return soon, because
/// a vCPU waits for it. It translates with
/// [`IommuRegion::lookup`](crate::IommuRegion::lookup).
pub trait NotifierSink: Send + Sync {
    /// A mapping was created (`MAP`), or is replayed.
    fn map(&self, mapping: &Mapping);

    /// Whether a replay continues: called for each mapping. A cache of limited
    /// size returns `false` when it is full.
    fn wants_more(&self) -> bool {
        true
    }

    /// The translation of the ranges changed (`UNMAP`, `DEVIOTLB_UNMAP`). When
    /// this returns the consumer uses no old translation of them.
    fn unmap(&self, ranges: &[IovaRange]);

    /// Result of the registration, and again whenever the guest changes the
    /// events that the model can deliver. Between two results everything is
    /// unmapped, so no event is lost.
    fn registered(&self, outcome: &Registration);
}

/// A registration of a [`NotifierSink`] with a region.
#[derive(Clone)]
pub struct IommuNotifier {
    /// Acceptable event sets in order of preference; the first one that the model
    /// accepts is used.
    pub acceptable: Vec<NotifierEvents>,
    /// Addresses whose events are delivered, both ends inclusive.
    pub range: IovaRange,
    /// Receives the events.
    pub sink: Arc<dyn NotifierSink>,
}

/// Identifies a registered notifier of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NotifierId(pub(crate) u64);

/// Receives a model's changes of one stream's translation. The model calls it
/// without its state lock; every method but [`map`](Self::map) waits until all
/// accesses under the old translation have ended.
pub trait StreamSink: Send + Sync {
    /// The translation of `ranges` changed: empties the caches of emulated
    /// devices and notifies for `UNMAP`. The model changes its own state first.
    fn invalidate(&self, ranges: &[IovaRange]);

    /// The guest invalidated `ranges` of the stream's device IOTLB: notifies for
    /// `DEVIOTLB_UNMAP`.
    fn invalidate_device_iotlb(&self, ranges: &[IovaRange]);

    /// The stream's configuration changed: every translation of every consumer,
    /// device IOTLB or not, is invalid.
    fn invalidate_all(&self);

    /// The stream's address space was replaced: does
    /// [`invalidate_all`](Self::invalidate_all), then replays the new mappings
    /// to the notifiers for `MAP`. The model holds only its command lock.
    fn reload(&self);

    /// A mapping was created: notifies for `MAP`. The model holds its command
    /// lock, so that no removal of the same mapping can overtake it.
    fn map(&self, mapping: &Mapping);

    /// Negotiates every registration again, after a change of the events that
    /// the model can deliver (the guest enabled ATS, for example). A notifier
    /// with a different result is unmapped in between.
    fn renegotiate(&self);
}
