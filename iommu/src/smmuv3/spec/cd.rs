//! Context descriptors and level 1 context descriptors (IHI 0070 §5.3, §5.4).

use super::field::{Field, raw};

raw! {
    /// A context descriptor as it is in memory.
    RawCd, 8
}
raw! {
    /// A level 1 context descriptor as it is in memory (§5.3).
    RawL1Cd, 1
}

/// Valid.
pub(crate) const L1_V: Field<RawL1Cd> = Field::new(0, 0);
/// Address of the level 2 table: bits 55:12, not shifted.
pub(crate) const L2PTR: Field<RawL1Cd> = Field::new(55, 12);
/// 64 minus the bits of an input address of TTB0.
pub(crate) const T0SZ: Field<RawCd> = Field::new(5, 0);
/// Granule of TTB0.
pub(crate) const TG0: Field<RawCd> = Field::new(7, 6);
/// No walks through TTB0.
pub(crate) const EPD0: Field<RawCd> = Field::new(14, 14);
/// Big-endian tables.
pub(crate) const ENDI: Field<RawCd> = Field::new(15, 15);
/// 64 minus the bits of an input address of TTB1.
pub(crate) const T1SZ: Field<RawCd> = Field::new(21, 16);
/// Granule of TTB1.
pub(crate) const TG1: Field<RawCd> = Field::new(23, 22);
/// No walks through TTB1.
pub(crate) const EPD1: Field<RawCd> = Field::new(30, 30);
/// Valid.
pub(crate) const V: Field<RawCd> = Field::new(31, 31);
/// Encoded size of an intermediate physical address.
pub(crate) const IPS: Field<RawCd> = Field::new(34, 32);
/// A clear access flag does not fault.
pub(crate) const AFFD: Field<RawCd> = Field::new(35, 35);
/// The top byte of TTB0's addresses is ignored.
pub(crate) const TBI0: Field<RawCd> = Field::new(38, 38);
/// The top byte of TTB1's addresses is ignored.
pub(crate) const TBI1: Field<RawCd> = Field::new(39, 39);
/// AArch64 tables.
pub(crate) const AA64: Field<RawCd> = Field::new(41, 41);
/// The SMMU updates dirty state.
pub(crate) const HD: Field<RawCd> = Field::new(42, 42);
/// The SMMU updates the access flag.
pub(crate) const HA: Field<RawCd> = Field::new(43, 43);
/// Faults stall.
pub(crate) const S: Field<RawCd> = Field::new(44, 44);
/// Faults are recorded.
pub(crate) const R: Field<RawCd> = Field::new(45, 45);
/// Faults abort.
pub(crate) const A: Field<RawCd> = Field::new(46, 46);
pub(crate) const ASID: Field<RawCd> = Field::new(63, 48);
/// Attributes in table descriptors of TTB0 are ignored.
pub(crate) const HAD0: Field<RawCd> = Field::new(65, 65);
/// Address of TTB0, in place.
pub(crate) const TTB0: Field<RawCd> = Field::new(115, 68);
/// Attributes in table descriptors of TTB1 are ignored.
pub(crate) const HAD1: Field<RawCd> = Field::new(129, 129);
/// Address of TTB1, in place.
pub(crate) const TTB1: Field<RawCd> = Field::new(179, 132);
