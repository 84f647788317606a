//! Stream table entries and level 1 stream table descriptors (IHI 0070 §5.1,
//! §5.2).

use super::field::{Field, raw};

raw! {
    /// A stream table entry as it is in memory.
    RawSte, 8
}
raw! {
    /// A level 1 stream table descriptor as it is in memory (§5.1).
    RawL1Std, 1
}

/// The level 2 table has `1 << (SPAN - 1)` STEs.
pub(crate) const SPAN: Field<RawL1Std> = Field::new(4, 0);
/// Address of the level 2 table, in place.
pub(crate) const L2PTR: Field<RawL1Std> = Field::new(51, 6);
/// Valid.
pub(crate) const V: Field<RawSte> = Field::new(0, 0);
/// Abort, bypass, or the stages that translate.
pub(crate) const CONFIG: Field<RawSte> = Field::new(3, 1);
/// Format of the CD table.
pub(crate) const S1FMT: Field<RawSte> = Field::new(5, 4);
/// Address of the CD table, in place.
pub(crate) const S1CONTEXTPTR: Field<RawSte> = Field::new(55, 6);
/// Bits of a SubstreamID.
pub(crate) const S1CDMAX: Field<RawSte> = Field::new(63, 59);
/// Treatment of accesses without a SubstreamID.
pub(crate) const S1DSS: Field<RawSte> = Field::new(65, 64);
/// Stage 2 memory attributes are forced.
pub(crate) const S2FWB: Field<RawSte> = Field::new(89, 89);
/// Stage 1 must not stall.
pub(crate) const S1STALLD: Field<RawSte> = Field::new(91, 91);
/// Encoded permission for ATS.
pub(crate) const EATS: Field<RawSte> = Field::new(93, 92);
/// StreamWorld.
pub(crate) const STRW: Field<RawSte> = Field::new(95, 94);
/// VMID.
pub(crate) const S2VMID: Field<RawSte> = Field::new(143, 128);
/// 64 minus the bits of an intermediate physical address.
pub(crate) const S2T0SZ: Field<RawSte> = Field::new(165, 160);
/// Level at which a walk starts.
pub(crate) const S2SL0: Field<RawSte> = Field::new(167, 166);
/// Granule.
pub(crate) const S2TG: Field<RawSte> = Field::new(175, 174);
/// Encoded size of a physical address.
pub(crate) const S2PS: Field<RawSte> = Field::new(178, 176);
/// AArch64 tables.
pub(crate) const S2AA64: Field<RawSte> = Field::new(179, 179);
/// Big-endian tables.
pub(crate) const S2ENDI: Field<RawSte> = Field::new(180, 180);
/// A clear access flag does not fault.
pub(crate) const S2AFFD: Field<RawSte> = Field::new(181, 181);
/// Stage 1 walks must not go to Device memory.
pub(crate) const S2PTW: Field<RawSte> = Field::new(182, 182);
/// The SMMU updates dirty state.
pub(crate) const S2HD: Field<RawSte> = Field::new(183, 183);
/// The SMMU updates the access flag.
pub(crate) const S2HA: Field<RawSte> = Field::new(184, 184);
/// Faults stall.
pub(crate) const S2S: Field<RawSte> = Field::new(185, 185);
/// Faults are recorded.
pub(crate) const S2R: Field<RawSte> = Field::new(186, 186);
/// Address of the table, in place.
pub(crate) const S2TTB: Field<RawSte> = Field::new(243, 196);
