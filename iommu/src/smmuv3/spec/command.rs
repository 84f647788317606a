//! Commands (IHI 0070 §4).

use super::field::{Field, raw};

raw! {
    /// A command as it is in the queue.
    RawCommand, 2
}

/// CMDQ_CONS.ERR (§7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Cerror {
    /// The command is illegal.
    Ill = 1,
    /// The command could not be fetched.
    Abt = 2,
}

/// Opcode (§4.1.1).
pub(crate) const OPCODE: Field<RawCommand> = Field::new(7, 0);
/// The StreamID is secure.
pub(crate) const SSEC: Field<RawCommand> = Field::new(10, 10);
/// SSID is valid.
pub(crate) const SSV: Field<RawCommand> = Field::new(11, 11);
/// SubstreamID.
pub(crate) const SSID: Field<RawCommand> = Field::new(31, 12);
/// StreamID.
pub(crate) const SID: Field<RawCommand> = Field::new(63, 32);
/// `CMD_CFGI_STE_RANGE`: `2 << RANGE` StreamIDs.
pub(crate) const RANGE: Field<RawCommand> = Field::new(68, 64);
/// Range invalidation: number of units minus one.
pub(crate) const NUM: Field<RawCommand> = Field::new(16, 12);
/// Range invalidation: units of `1 << SCALE` granules.
pub(crate) const SCALE: Field<RawCommand> = Field::new(24, 20);
pub(crate) const VMID: Field<RawCommand> = Field::new(47, 32);
pub(crate) const ASID: Field<RawCommand> = Field::new(63, 48);
/// Level hint.
pub(crate) const TTL: Field<RawCommand> = Field::new(73, 72);
/// Granule; 0 when the command is for one address.
pub(crate) const TG: Field<RawCommand> = Field::new(75, 74);
/// Address, in place.
pub(crate) const ADDRESS: Field<RawCommand> = Field::new(127, 76);
/// Intermediate physical address, in place.
pub(crate) const IPA: Field<RawCommand> = Field::new(115, 76);
/// `CMD_ATC_INV`: `1 << SIZE` pages.
pub(crate) const ATC_SIZE: Field<RawCommand> = Field::new(69, 64);
/// `CMD_PRI_RESP`: page request group index.
pub(crate) const PRG_INDEX: Field<RawCommand> = Field::new(72, 64);
/// `CMD_PRI_RESP`: encoded response.
pub(crate) const PRI_RESP: Field<RawCommand> = Field::new(77, 76);
/// `CMD_RESUME`: retry.
pub(crate) const RESUME_RETRY: Field<RawCommand> = Field::new(12, 12);
/// `CMD_RESUME`: tag of the stalled transaction.
pub(crate) const STAG: Field<RawCommand> = Field::new(79, 64);
/// `CMD_SYNC`: completion signal (§4.7.3).
pub(crate) const CS: Field<RawCommand> = Field::new(13, 12);
/// `CMD_SYNC`: data of the message.
pub(crate) const MSI_DATA: Field<RawCommand> = Field::new(63, 32);
/// `CMD_SYNC`: address of the message, in place.
pub(crate) const MSI_ADDRESS: Field<RawCommand> = Field::new(115, 66);

/// Opcodes (§4.1.1).
pub(crate) mod op {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub(crate) const PREFETCH_CONFIG: u64 = 0x01;
    pub(crate) const PREFETCH_ADDR: u64 = 0x02;
    pub(crate) const CFGI_STE: u64 = 0x03;
    pub(crate) const CFGI_STE_RANGE: u64 = 0x04;
    pub(crate) const CFGI_CD: u64 = 0x05;
    pub(crate) const CFGI_CD_ALL: u64 = 0x06;
    pub(crate) const TLBI_NH_ALL: u64 = 0x10;
    pub(crate) const TLBI_NH_ASID: u64 = 0x11;
    pub(crate) const TLBI_NH_VA: u64 = 0x12;
    pub(crate) const TLBI_NH_VAA: u64 = 0x13;
    pub(crate) const TLBI_EL2_ALL: u64 = 0x20;
    pub(crate) const TLBI_EL2_ASID: u64 = 0x21;
    pub(crate) const TLBI_EL2_VA: u64 = 0x22;
    pub(crate) const TLBI_EL2_VAA: u64 = 0x23;
    pub(crate) const TLBI_S12_VMALL: u64 = 0x28;
    pub(crate) const TLBI_S2_IPA: u64 = 0x2a;
    pub(crate) const TLBI_NSNH_ALL: u64 = 0x30;
    pub(crate) const ATC_INV: u64 = 0x40;
    pub(crate) const PRI_RESP: u64 = 0x41;
    pub(crate) const RESUME: u64 = 0x44;
    pub(crate) const STALL_TERM: u64 = 0x45;
    pub(crate) const SYNC: u64 = 0x46;
}
