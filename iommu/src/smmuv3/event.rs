//! Event records (IHI 0070 §7.3).

use serde::{Deserialize, Serialize};

use super::spec::event::{self, RawEvent};
use super::spec::{Field, Raw as _};
use super::walk::{Cause, Class, WalkFault};
use crate::mapping::Access;
use crate::translate::{FaultReason, Request};

/// Event numbers that this SMMU can record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the specification's")]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
#[repr(u8)]
pub enum EventKind {
    CBadStreamid = 0x02,
    FSteFetch = 0x03,
    CBadSte = 0x04,
    FBadAtsTreq = 0x05,
    FStreamDisabled = 0x06,
    CBadSubstreamid = 0x08,
    FCdFetch = 0x09,
    CBadCd = 0x0a,
    FWalkEabt = 0x0b,
    FTranslation = 0x10,
    FAddrSize = 0x11,
    FAccess = 0x12,
    FPermission = 0x13,
}

impl EventKind {
    /// All kinds, in the order of their event numbers.
    pub const ALL: [Self; 13] = [
        Self::CBadStreamid,
        Self::FSteFetch,
        Self::CBadSte,
        Self::FBadAtsTreq,
        Self::FStreamDisabled,
        Self::CBadSubstreamid,
        Self::FCdFetch,
        Self::CBadCd,
        Self::FWalkEabt,
        Self::FTranslation,
        Self::FAddrSize,
        Self::FAccess,
        Self::FPermission,
    ];

    /// The specification's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::CBadStreamid => "C_BAD_STREAMID",
            Self::FSteFetch => "F_STE_FETCH",
            Self::CBadSte => "C_BAD_STE",
            Self::FBadAtsTreq => "F_BAD_ATS_TREQ",
            Self::FStreamDisabled => "F_STREAM_DISABLED",
            Self::CBadSubstreamid => "C_BAD_SUBSTREAMID",
            Self::FCdFetch => "F_CD_FETCH",
            Self::CBadCd => "C_BAD_CD",
            Self::FWalkEabt => "F_WALK_EABT",
            Self::FTranslation => "F_TRANSLATION",
            Self::FAddrSize => "F_ADDR_SIZE",
            Self::FAccess => "F_ACCESS",
            Self::FPermission => "F_PERMISSION",
        }
    }

    /// The reason that all models share.
    #[must_use]
    pub const fn reason(self) -> FaultReason {
        match self {
            Self::FSteFetch | Self::FCdFetch | Self::FWalkEabt => FaultReason::External,
            Self::FTranslation => FaultReason::Translation,
            Self::FAddrSize => FaultReason::AddressSize,
            Self::FAccess => FaultReason::AccessFlag,
            Self::FPermission => FaultReason::Permission,
            _ => FaultReason::Configuration,
        }
    }

    /// Whether it is one of the four kinds that may stall (§5.5).
    #[must_use]
    pub const fn is_translation_related(self) -> bool {
        matches!(
            self,
            Self::FTranslation | Self::FAddrSize | Self::FAccess | Self::FPermission
        )
    }
}

/// Fields of an event that do not come from the request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Event {
    /// Event number.
    pub kind: EventKind,
    /// Address of a structure or descriptor, or an intermediate physical
    /// address.
    pub address: u64,
    /// The fault is of stage 2.
    pub stage2: bool,
    /// Purpose of the access.
    pub class: Class,
    /// TTRnW: reading a descriptor, not updating it.
    pub table_read: bool,
}

impl Event {
    /// An event about configuration.
    pub(super) const fn configuration(kind: EventKind) -> Self {
        Self::fetch(kind, 0)
    }

    /// An event about a structure at `address`.
    pub(super) const fn fetch(kind: EventKind, address: u64) -> Self {
        Self {
            kind,
            address,
            stage2: false,
            class: Class::Input,
            table_read: false,
        }
    }

    /// The event of a walk that faults.
    pub(super) const fn walk(fault: &WalkFault) -> Self {
        let kind = match fault.cause {
            Cause::Translation => EventKind::FTranslation,
            Cause::AddressSize => EventKind::FAddrSize,
            Cause::AccessFlag => EventKind::FAccess,
            Cause::Permission => EventKind::FPermission,
            Cause::External => EventKind::FWalkEabt,
        };
        Self {
            kind,
            address: match fault.cause {
                Cause::External => fault.fetch.0,
                _ => fault.ipa.0,
            },
            stage2: fault.stage2,
            class: fault.class,
            table_read: !fault.table_write,
        }
    }

    /// The record of the event for `request`. `stag` identifies a stalled
    /// transaction.
    pub(super) fn record(&self, request: &Request, stag: Option<u16>) -> RawEvent {
        let mut record = RawEvent::ZERO;
        let mut put = |field: Field<RawEvent>, value: u64| field.put(&mut record, value);
        put(event::NUMBER, u64::from(self.kind as u8));
        put(event::SID, u64::from(request.stream.0));
        let substream = match self.kind {
            // The record has no SSV and always has the index of the CD
            // (§7.3.9).
            EventKind::CBadSubstreamid => {
                put(event::SSID, u64::from(request.substream.unwrap_or(0)));
                None
            }
            EventKind::FStreamDisabled => None,
            _ => request.substream,
        };
        if let Some(substream) = substream {
            put(event::SSV, 1);
            put(event::SSID, u64::from(substream));
        }
        let read = u64::from(request.access == Access::Read);
        match self.kind {
            EventKind::CBadStreamid
            | EventKind::CBadSte
            | EventKind::FStreamDisabled
            | EventKind::CBadSubstreamid
            | EventKind::CBadCd => {}
            EventKind::FSteFetch | EventKind::FCdFetch => put(event::FETCH, self.address >> 3),
            EventKind::FBadAtsTreq => {
                put(event::TREQ_R, 1);
                put(event::TREQ_W, 1 - read);
                put(event::INPUT, request.iova.0);
            }
            EventKind::FWalkEabt
            | EventKind::FTranslation
            | EventKind::FAddrSize
            | EventKind::FAccess
            | EventKind::FPermission => {
                put(event::RNW, read);
                put(event::S2, u64::from(self.stage2));
                put(event::CLASS, u64::from(self.class as u8));
                put(event::INPUT, request.iova.0);
                if self.kind == EventKind::FWalkEabt {
                    put(event::FETCH, self.address >> 3);
                } else {
                    put(event::IPA, self.address >> 12);
                    let table_read = self.kind == EventKind::FPermission && self.table_read;
                    put(event::TTRNW, u64::from(table_read));
                }
            }
        }
        if let Some(stag) = stag {
            put(event::STALL, 1);
            put(event::STAG, u64::from(stag));
        }
        record
    }
}
