//! Commands (IHI 0070 §4).

use super::field::{Field, raw};

raw! {
    /// A command as it is in the queue.
    RawCommand, 2
}

/// CMDQ_CONS.ERR (§7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cerror {
    /// The command is illegal.
    Ill = 1,
    /// The command could not be fetched.
    Abt = 2,
}

/// Opcode (§4.1.1).
pub const OPCODE: Field<RawCommand> = Field::new(7, 0);
/// The StreamID is secure.
pub const SSEC: Field<RawCommand> = Field::new(10, 10);
/// There is a SubstreamID.
pub const SSV: Field<RawCommand> = Field::new(11, 11);
/// SubstreamID.
pub const SSID: Field<RawCommand> = Field::new(31, 12);
/// StreamID.
pub const SID: Field<RawCommand> = Field::new(63, 32);
/// `CMD_CFGI_STE_RANGE`: `2 << RANGE` StreamIDs.
pub const RANGE: Field<RawCommand> = Field::new(68, 64);
/// Range invalidation: how many units, less one.
pub const NUM: Field<RawCommand> = Field::new(16, 12);
/// Range invalidation: units of `1 << SCALE` granules.
pub const SCALE: Field<RawCommand> = Field::new(24, 20);
/// VMID.
pub const VMID: Field<RawCommand> = Field::new(47, 32);
/// ASID.
pub const ASID: Field<RawCommand> = Field::new(63, 48);
/// Level hint.
pub const TTL: Field<RawCommand> = Field::new(73, 72);
/// Granule; 0 when the command is for one address.
pub const TG: Field<RawCommand> = Field::new(75, 74);
/// Address, in place.
pub const ADDRESS: Field<RawCommand> = Field::new(127, 76);
/// Intermediate physical address, in place.
pub const IPA: Field<RawCommand> = Field::new(115, 76);
/// `CMD_ATC_INV`: `1 << SIZE` pages.
pub const ATC_SIZE: Field<RawCommand> = Field::new(69, 64);
/// `CMD_PRI_RESP`: which group.
pub const PRG_INDEX: Field<RawCommand> = Field::new(72, 64);
/// `CMD_PRI_RESP`: the answer.
pub const PRI_RESP: Field<RawCommand> = Field::new(77, 76);
/// `CMD_RESUME`: retry.
pub const RESUME_RETRY: Field<RawCommand> = Field::new(12, 12);
/// `CMD_RESUME`: which transaction.
pub const STAG: Field<RawCommand> = Field::new(79, 64);
/// `CMD_SYNC`: how completion is signalled.
pub const CS: Field<RawCommand> = Field::new(13, 12);
/// `CMD_SYNC`: what is written.
pub const MSI_DATA: Field<RawCommand> = Field::new(63, 32);
/// `CMD_SYNC`: where it is written, in place.
pub const MSI_ADDRESS: Field<RawCommand> = Field::new(115, 66);

/// Opcodes (§4.1.1).
pub mod op {
    #![allow(missing_docs, reason = "the names are the specification's")]
    pub const PREFETCH_CONFIG: u64 = 0x01;
    pub const PREFETCH_ADDR: u64 = 0x02;
    pub const CFGI_STE: u64 = 0x03;
    pub const CFGI_STE_RANGE: u64 = 0x04;
    pub const CFGI_CD: u64 = 0x05;
    pub const CFGI_CD_ALL: u64 = 0x06;
    pub const TLBI_NH_ALL: u64 = 0x10;
    pub const TLBI_NH_ASID: u64 = 0x11;
    pub const TLBI_NH_VA: u64 = 0x12;
    pub const TLBI_NH_VAA: u64 = 0x13;
    pub const TLBI_EL2_ALL: u64 = 0x20;
    pub const TLBI_EL2_ASID: u64 = 0x21;
    pub const TLBI_EL2_VA: u64 = 0x22;
    pub const TLBI_EL2_VAA: u64 = 0x23;
    pub const TLBI_S12_VMALL: u64 = 0x28;
    pub const TLBI_S2_IPA: u64 = 0x2a;
    pub const TLBI_NSNH_ALL: u64 = 0x30;
    pub const ATC_INV: u64 = 0x40;
    pub const PRI_RESP: u64 = 0x41;
    pub const RESUME: u64 = 0x44;
    pub const STALL_TERM: u64 = 0x45;
    pub const SYNC: u64 = 0x46;
}
