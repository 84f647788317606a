//! Event records (§7.3).

use super::field::{Field, raw};

raw! {
    /// An event record as it is in the queue.
    RawEvent, 4
}

/// Event number.
pub(crate) const NUMBER: Field<RawEvent> = Field::new(7, 0);
/// SSID is valid.
pub(crate) const SSV: Field<RawEvent> = Field::new(11, 11);
/// SubstreamID.
pub(crate) const SSID: Field<RawEvent> = Field::new(31, 12);
/// StreamID.
pub(crate) const SID: Field<RawEvent> = Field::new(63, 32);
/// Tag of the stalled transaction.
pub(crate) const STAG: Field<RawEvent> = Field::new(79, 64);
/// The transaction is stalled.
pub(crate) const STALL: Field<RawEvent> = Field::new(95, 95);
/// The transaction reads.
pub(crate) const RNW: Field<RawEvent> = Field::new(99, 99);
/// The fault arose at stage 2.
pub(crate) const S2: Field<RawEvent> = Field::new(103, 103);
/// Purpose of the access that faulted: CD, table or input address.
pub(crate) const CLASS: Field<RawEvent> = Field::new(105, 104);
/// The faulting access to a descriptor was a read, not an update.
pub(crate) const TTRNW: Field<RawEvent> = Field::new(108, 108);
/// `F_BAD_ATS_TREQ`: write permission was requested.
pub(crate) const TREQ_W: Field<RawEvent> = Field::new(98, 98);
/// `F_BAD_ATS_TREQ`: read permission was requested.
pub(crate) const TREQ_R: Field<RawEvent> = Field::new(99, 99);
/// Address of the transaction.
pub(crate) const INPUT: Field<RawEvent> = Field::new(191, 128);
/// Intermediate physical address, in place from bit 12.
pub(crate) const IPA: Field<RawEvent> = Field::new(243, 204);
/// Address of a structure, in place from bit 3.
pub(crate) const FETCH: Field<RawEvent> = Field::new(243, 195);
