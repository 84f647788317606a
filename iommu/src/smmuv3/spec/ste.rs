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

/// How many STEs the level 2 table has: `1 << (SPAN - 1)`.
pub const SPAN: Field<RawL1Std> = Field::new(4, 0);
/// Address of the level 2 table, in place.
pub const L2PTR: Field<RawL1Std> = Field::new(51, 6);
/// Valid.
pub const V: Field<RawSte> = Field::new(0, 0);
/// Which stages translate.
pub const CONFIG: Field<RawSte> = Field::new(3, 1);
/// Format of the CD table.
pub const S1FMT: Field<RawSte> = Field::new(5, 4);
/// Address of the CD table, in place.
pub const S1CONTEXTPTR: Field<RawSte> = Field::new(55, 6);
/// Bits of a SubstreamID.
pub const S1CDMAX: Field<RawSte> = Field::new(63, 59);
/// What becomes of accesses without a SubstreamID.
pub const S1DSS: Field<RawSte> = Field::new(65, 64);
/// Stage 2 memory attributes are forced.
pub const S2FWB: Field<RawSte> = Field::new(89, 89);
/// Stage 1 must not stall.
pub const S1STALLD: Field<RawSte> = Field::new(91, 91);
/// ATS.
pub const EATS: Field<RawSte> = Field::new(93, 92);
/// StreamWorld.
pub const STRW: Field<RawSte> = Field::new(95, 94);
/// VMID.
pub const S2VMID: Field<RawSte> = Field::new(143, 128);
/// Size of the intermediate address space.
pub const S2T0SZ: Field<RawSte> = Field::new(165, 160);
/// Level at which a walk starts.
pub const S2SL0: Field<RawSte> = Field::new(167, 166);
/// Granule.
pub const S2TG: Field<RawSte> = Field::new(175, 174);
/// Physical address size.
pub const S2PS: Field<RawSte> = Field::new(178, 176);
/// AArch64 tables.
pub const S2AA64: Field<RawSte> = Field::new(179, 179);
/// Big-endian tables.
pub const S2ENDI: Field<RawSte> = Field::new(180, 180);
/// The access flag does not fault.
pub const S2AFFD: Field<RawSte> = Field::new(181, 181);
/// Stage 1 walks must not go to Device memory.
pub const S2PTW: Field<RawSte> = Field::new(182, 182);
/// The SMMU updates dirty state.
pub const S2HD: Field<RawSte> = Field::new(183, 183);
/// The SMMU updates the access flag.
pub const S2HA: Field<RawSte> = Field::new(184, 184);
/// Faults stall.
pub const S2S: Field<RawSte> = Field::new(185, 185);
/// Faults are recorded.
pub const S2R: Field<RawSte> = Field::new(186, 186);
/// Address of the table, in place.
pub const S2TTB: Field<RawSte> = Field::new(243, 196);
