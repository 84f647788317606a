//! What a translation asks and answers, and the trait that every model has.

use std::fmt;
use std::ops::{BitOr, ControlFlow};
use std::sync::Weak;

use serde::{Deserialize, Serialize};

use crate::{Gpa, IommuRegion, Iova, IovaRange, NotifierEvents, Refused, StreamId};

/// What one access does to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// The device reads guest memory.
    Read,
    /// The device writes guest memory.
    Write,
}

/// What a mapping permits: any of reading and writing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Perm(u8);

impl Perm {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Reading only.
    pub const READ: Self = Self(1);
    /// Writing only.
    pub const WRITE: Self = Self(2);
    /// Reading and writing.
    pub const READ_WRITE: Self = Self(3);

    /// Whether `access` is permitted.
    #[must_use]
    pub const fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => self.0 & 1 != 0,
            Access::Write => self.0 & 2 != 0,
        }
    }

    /// What both permit.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitOr for Perm {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let read = if self.allows(Access::Read) { 'r' } else { '-' };
        let write = if self.allows(Access::Write) { 'w' } else { '-' };
        write!(f, "{read}{write}")
    }
}

/// A run of I/O virtual addresses that lies in one piece in guest-physical
/// memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The addresses a device uses; both ends inclusive.
    pub iova: IovaRange,
    /// Where the first of them lies. The others follow; the run does not wrap
    /// around 2^64.
    pub gpa: Gpa,
    /// What a device may do there.
    pub perm: Perm,
}

impl Mapping {
    /// Where `iova` lies, or `None` outside the run.
    #[must_use]
    pub const fn gpa_of(&self, iova: Iova) -> Option<Gpa> {
        if self.iova.contains(iova) {
            self.gpa.checked_add(iova.0 - self.iova.first().0)
        } else {
            None
        }
    }

    /// The part of the mapping that lies in `range`.
    #[must_use]
    pub fn clipped(&self, range: IovaRange) -> Option<Self> {
        let iova = self.iova.intersection(range)?;
        let gpa = self.gpa_of(iova.first())?;
        Some(Self { iova, gpa, ..*self })
    }
}

/// How a request reaches the IOMMU (PCIe 6.0 §10.2, the AT field).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum RequestKind {
    /// An access with an untranslated address.
    Untranslated,
    /// An ATS translation request: the device will keep the answer in its
    /// device IOTLB until it is told to drop it.
    AtsTranslation,
}

/// One question to an IOMMU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Who asks.
    pub stream: StreamId,
    /// The SubstreamID (PASID) that comes with the request, if one does.
    pub substream: Option<u32>,
    /// The address.
    pub iova: Iova,
    /// What the device wants to do there.
    pub access: Access,
    /// How the request came.
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

/// Why a request has no translation, in words that every model shares. The
/// model's own event record says more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultReason {
    /// The stream has no domain or its configuration is not valid.
    Configuration,
    /// Nothing is mapped there.
    Translation,
    /// The mapping does not permit the access.
    Permission,
    /// The address is outside what the stream may use.
    AddressSize,
    /// The access flag of the mapping is clear and nobody sets it.
    AccessFlag,
    /// The tables could not be read.
    External,
    /// The configuration says that the stream's requests are aborted.
    Aborted,
    /// The address is translated, to guest-physical memory that is not RAM.
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
    /// Who asked.
    pub stream: StreamId,
    /// The address.
    pub iova: Iova,
    /// What the device wanted to do there.
    pub access: Access,
    /// Why it cannot.
    pub reason: FaultReason,
}

/// A model of an IOMMU.
///
/// The methods that translate are called by [`IommuRegion`] with the stream's
/// gate held at least shared: a model takes its own state lock in them and
/// nothing else.
pub trait Iommu: Send + Sync {
    /// Answers a request with the largest run around its address that has one
    /// translation and one permission. A fault is recorded as the model's own
    /// event.
    ///
    /// # Errors
    /// The [`Fault`]; its event has been recorded.
    fn translate(&self, request: &Request) -> Result<Mapping, Fault>;

    /// As [`translate`](Self::translate), but records no event, updates no flag
    /// in a descriptor, fills no cache of the model and counts nothing. The
    /// consumers of the stream may keep the answer: its invalidation reaches
    /// them. For prefetching and for inspection.
    ///
    /// # Errors
    /// The [`Fault`], recorded nowhere.
    fn lookup(&self, request: &Request) -> Result<Mapping, Fault>;

    /// Asks whether a notifier of a stream may ask for `new` (where it asked
    /// for `old` until now). Called with the stream's gate held exclusively.
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

    /// Shows `visit` the mappings of the stream that overlap `range`, in order
    /// and as far as the model can know them without a request, until it
    /// breaks. Called with the stream's gate held exclusively; `visit` is
    /// called without the model's state lock.
    fn replay(
        &self,
        stream: StreamId,
        range: IovaRange,
        visit: &mut dyn FnMut(&Mapping) -> ControlFlow<()>,
    );

    /// Takes note of the region through which a stream is reached, so that
    /// invalidations find their way. Called once a region, at its creation.
    fn connect(&self, region: Weak<IommuRegion>);
}
