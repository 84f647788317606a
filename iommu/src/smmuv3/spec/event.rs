//! Event records (§7.3).

use super::field::{Field, raw};

raw! {
    /// An event record as it is in the queue.
    RawEvent, 4
}

/// Event number.
pub const NUMBER: Field<RawEvent> = Field::new(7, 0);
/// There is a SubstreamID.
pub const SSV: Field<RawEvent> = Field::new(11, 11);
/// SubstreamID.
pub const SSID: Field<RawEvent> = Field::new(31, 12);
/// StreamID.
pub const SID: Field<RawEvent> = Field::new(63, 32);
/// Which stalled transaction.
pub const STAG: Field<RawEvent> = Field::new(79, 64);
/// The transaction is stalled.
pub const STALL: Field<RawEvent> = Field::new(95, 95);
/// The transaction reads.
pub const RNW: Field<RawEvent> = Field::new(99, 99);
/// The fault arose at stage 2.
pub const S2: Field<RawEvent> = Field::new(103, 103);
/// What caused the fault.
pub const CLASS: Field<RawEvent> = Field::new(105, 104);
/// Reading (not updating) a descriptor caused the fault.
pub const TTRNW: Field<RawEvent> = Field::new(108, 108);
/// `F_BAD_ATS_TREQ`: writing was asked for.
pub const TREQ_W: Field<RawEvent> = Field::new(98, 98);
/// `F_BAD_ATS_TREQ`: reading was asked for.
pub const TREQ_R: Field<RawEvent> = Field::new(99, 99);
/// Address of the transaction.
pub const INPUT: Field<RawEvent> = Field::new(191, 128);
/// Intermediate physical address, in place from bit 12.
pub const IPA: Field<RawEvent> = Field::new(243, 204);
/// Address of a structure, in place from bit 3.
pub const FETCH: Field<RawEvent> = Field::new(243, 195);
