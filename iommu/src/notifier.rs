//! Notifiers: how a consumer that keeps translations learns of changes.

use std::fmt;
use std::ops::BitOr;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::addr::IovaRange;
use crate::mapping::Mapping;

/// What a notifier asks for: any of three kinds.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct NotifierEvents(u8);

impl NotifierEvents {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// "Tell me what was mapped."
    pub const MAP: Self = Self(1);
    /// "I keep a cache: tell me what to drop."
    pub const UNMAP: Self = Self(2);
    /// "I have a device IOTLB: tell me when the guest invalidates it."
    pub const DEVIOTLB_UNMAP: Self = Self(4);

    /// Whether all of `other` is asked for.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// What is in both.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Whether nothing is asked for.
    #[must_use]
    pub const fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl BitOr for NotifierEvents {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Display for NotifierEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::MAP, "map"),
            (Self::UNMAP, "unmap"),
            (Self::DEVIOTLB_UNMAP, "dev-iotlb"),
        ];
        let mut sep = "";
        for (bit, name) in names {
            if self.contains(bit) {
                write!(f, "{sep}{name}")?;
                sep = "+";
            }
        }
        if sep.is_empty() {
            f.write_str("none")?;
        }
        Ok(())
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

/// A model will not deliver what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{events} refused: {reason}")]
pub struct Refused {
    /// The events that cannot be had.
    pub events: NotifierEvents,
    /// Why, for the log and the API.
    pub reason: &'static str,
}

/// What a registration came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Registration {
    /// What the notifier gets; empty when all it asked for was refused.
    pub events: NotifierEvents,
    /// What it would have liked better, with the reasons, in its own order.
    pub refused: Vec<Refused>,
}

/// The consumer's end. Every method is called with the stream's gate held: it
/// must neither enter the gate nor register, and should return soon, because a
/// guest's CPU waits for it. [`IommuRegion::lookup`](crate::IommuRegion::lookup)
/// tells it what is mapped.
pub trait NotifierSink: Send + Sync {
    /// A mapping appeared (`MAP`), or is shown by a replay.
    fn map(&self, mapping: &Mapping);

    /// Whether a replay goes on: asked for each mapping. A consumer that has a
    /// use for some of the mappings only, such as a cache of limited size, says
    /// `false` where it is full.
    fn wants_more(&self) -> bool {
        true
    }

    /// What lies in the ranges is no longer translated as it was (`UNMAP`,
    /// `DEVIOTLB_UNMAP`). When this returns the consumer uses nothing of it.
    fn unmap(&self, ranges: &[IovaRange]);

    /// The outcome of registering: at first, and again whenever the guest
    /// changes what the model can deliver. Between two outcomes everything is
    /// unmapped, so nothing is lost.
    fn registered(&self, outcome: &Registration);
}

/// A wish to be notified.
#[derive(Clone)]
pub struct IommuNotifier {
    /// What would serve, best first: the first one that is not refused is had.
    pub wanted: Vec<NotifierEvents>,
    /// The addresses of interest.
    pub range: IovaRange,
    /// Who is told.
    pub sink: Arc<dyn NotifierSink>,
}

/// Names a registered notifier of a region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NotifierId(pub(crate) u64);

/// A stream's address space, to which its model announces changes of the
/// translation. The model calls it without its state lock; every method but
/// [`map`](Self::map) waits until all accesses under the old translation ended.
pub trait StreamSink: Send + Sync {
    /// The translation of `ranges` changed: drops what the device caches hold
    /// and notifies for `UNMAP`. The model has changed its own state already.
    fn invalidate(&self, ranges: &[IovaRange]);

    /// The guest invalidated `ranges` of the stream's device IOTLB: notifies for
    /// `DEVIOTLB_UNMAP`.
    fn invalidate_device_iotlb(&self, ranges: &[IovaRange]);

    /// The stream's configuration changed: everything that any consumer holds,
    /// device IOTLB or not, is invalid.
    fn invalidate_all(&self);

    /// The stream has another view of memory: as
    /// [`invalidate_all`](Self::invalidate_all), then replays the new view to
    /// the notifiers for `MAP`. The model holds no lock but its command lock.
    fn reload(&self);

    /// A mapping appeared: notifies for `MAP`. The model holds its command lock,
    /// so that no removal of the same mapping can overtake it.
    fn map(&self, mapping: &Mapping);

    /// Negotiates every registration again, for a model whose ability to
    /// deliver events changed (the guest switched ATS, for example). A notifier
    /// whose outcome differs is unmapped in between.
    fn renegotiate(&self);
}
