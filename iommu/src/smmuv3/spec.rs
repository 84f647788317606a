//! The layouts of IHI 0070: registers, structures, commands and records.
//! Nothing else.

/// A field of a structure that is read as 64-bit little-endian words.
#[derive(Clone, Copy, Debug)]
pub struct Field {
    word: usize,
    low: u32,
    bits: u32,
}

impl Field {
    /// Bits `high` down to `low` of the structure, both inclusive and in the
    /// same 64-bit word.
    const fn new(high: u32, low: u32) -> Self {
        assert!(high / 64 == low / 64 && high >= low);
        Self {
            word: (low / 64) as usize,
            low: low % 64,
            bits: high - low + 1,
        }
    }

    const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits)
    }

    /// The value of the field, at the bottom of the word.
    #[must_use]
    pub const fn of<const N: usize>(self, words: &[u64; N]) -> u64 {
        (words[self.word] >> self.low) & self.mask()
    }

    /// The value of a field of at most 32 bits.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "used for fields of at most 32 bits, and asserted"
    )]
    pub const fn of32<const N: usize>(self, words: &[u64; N]) -> u32 {
        assert!(self.bits <= 32);
        self.of(words) as u32
    }

    /// The value of a field of at most 16 bits.
    #[must_use]
    #[expect(
        clippy::cast_possible_truncation,
        reason = "used for fields of at most 16 bits, and asserted"
    )]
    pub const fn of16<const N: usize>(self, words: &[u64; N]) -> u16 {
        assert!(self.bits <= 16);
        self.of(words) as u16
    }

    /// Whether any bit of the field is set.
    #[must_use]
    pub const fn is_set<const N: usize>(self, words: &[u64; N]) -> bool {
        self.of(words) != 0
    }

    /// The bits of the field where they stand, the rest of the word zero: for
    /// addresses.
    #[must_use]
    pub const fn in_place<const N: usize>(self, words: &[u64; N]) -> u64 {
        words[self.word] & (self.mask() << self.low)
    }

    /// Sets the field to `value`, of which the bits that do not fit are lost.
    pub const fn put<const N: usize>(self, words: &mut [u64; N], value: u64) {
        let mask = self.mask() << self.low;
        words[self.word] = words[self.word] & !mask | (value << self.low) & mask;
    }
}

/// Registers (§6.2, §6.3): offsets in page 0, in bytes.
pub mod reg {
    /// Offset of page 1 (§6.2).
    pub const PAGE_1: u64 = 0x1_0000;
    /// §6.3.1
    pub const IDR0: u64 = 0x00;
    /// §6.3.2
    pub const IDR1: u64 = 0x04;
    /// §6.3.4
    pub const IDR3: u64 = 0x0c;
    /// §6.3.6
    pub const IDR5: u64 = 0x14;
    /// §6.3.8
    pub const AIDR: u64 = 0x1c;
    /// §6.3.9
    pub const CR0: u64 = 0x20;
    /// §6.3.10
    pub const CR0ACK: u64 = 0x24;
    /// §6.3.11
    pub const CR1: u64 = 0x28;
    /// §6.3.12
    pub const CR2: u64 = 0x2c;
    /// §6.3.14
    pub const GBPA: u64 = 0x44;
    /// §6.3.17
    pub const IRQ_CTRL: u64 = 0x50;
    /// §6.3.18
    pub const IRQ_CTRLACK: u64 = 0x54;
    /// §6.3.19
    pub const GERROR: u64 = 0x60;
    /// §6.3.20
    pub const GERRORN: u64 = 0x64;
    /// §6.3.21, 64 bits
    pub const GERROR_IRQ_CFG0: u64 = 0x68;
    /// §6.3.22
    pub const GERROR_IRQ_CFG1: u64 = 0x70;
    /// §6.3.23
    pub const GERROR_IRQ_CFG2: u64 = 0x74;
    /// §6.3.24, 64 bits
    pub const STRTAB_BASE: u64 = 0x80;
    /// §6.3.25
    pub const STRTAB_BASE_CFG: u64 = 0x88;
    /// §6.3.26, 64 bits
    pub const CMDQ_BASE: u64 = 0x90;
    /// §6.3.27
    pub const CMDQ_PROD: u64 = 0x98;
    /// §6.3.28
    pub const CMDQ_CONS: u64 = 0x9c;
    /// §6.3.29, 64 bits
    pub const EVENTQ_BASE: u64 = 0xa0;
    /// §6.3.30; it and CONS belong to page 1
    pub const EVENTQ_PROD: u64 = 0xa8;
    /// §6.3.31
    pub const EVENTQ_CONS: u64 = 0xac;
    /// §6.3.32, 64 bits
    pub const EVENTQ_IRQ_CFG0: u64 = 0xb0;
    /// §6.3.33
    pub const EVENTQ_IRQ_CFG1: u64 = 0xb8;
    /// §6.3.34
    pub const EVENTQ_IRQ_CFG2: u64 = 0xbc;
    /// §6.3.35, 64 bits
    pub const PRIQ_BASE: u64 = 0xc0;
    /// §6.3.36; it and CONS belong to page 1
    pub const PRIQ_PROD: u64 = 0xc8;
    /// §6.3.37
    pub const PRIQ_CONS: u64 = 0xcc;
    /// §6.3.38, 64 bits
    pub const PRIQ_IRQ_CFG0: u64 = 0xd0;
    /// §6.3.39
    pub const PRIQ_IRQ_CFG1: u64 = 0xd8;
    /// §6.3.40
    pub const PRIQ_IRQ_CFG2: u64 = 0xdc;
    /// End of the registers that hold something, in bytes.
    pub const END: u64 = 0x100;
    /// CIDR0 to CIDR3 (§6.2, CoreSight identification).
    pub const CIDR0: u64 = 0xff0;
}

/// IDR0 (§6.3.1).
pub mod idr0 {
    /// Stage 2.
    pub const S2P: u32 = 1 << 0;
    /// Stage 1.
    pub const S1P: u32 = 1 << 1;
    /// Tables in the AArch64 format.
    pub const TTF_AARCH64: u32 = 2 << 2;
    /// Walks and queues are coherent with the CPUs' caches.
    pub const COHACC: u32 = 1 << 4;
    /// Hardware updates access flag and dirty state.
    pub const HTTU_DIRTY: u32 = 2 << 6;
    /// EL2 commands and StreamWorlds.
    pub const HYP: u32 = 1 << 9;
    /// ATS.
    pub const ATS: u32 = 1 << 10;
    /// ATS at all stages only: no split-stage ATS.
    pub const NS1ATS: u32 = 1 << 11;
    /// 16-bit ASIDs.
    pub const ASID16: u32 = 1 << 12;
    /// The SMMU's own interrupts may be messages.
    pub const MSI: u32 = 1 << 13;
    /// PRI.
    pub const PRI: u32 = 1 << 16;
    /// VMID wildcards.
    pub const VMW: u32 = 1 << 17;
    /// 16-bit VMIDs.
    pub const VMID16: u32 = 1 << 18;
    /// 2-level context descriptor tables.
    pub const CD2L: u32 = 1 << 19;
    /// Tables are little-endian.
    pub const TTENDIAN_LITTLE: u32 = 2 << 21;
    /// `CR2.REC_CFG_ATS` works.
    pub const ATSRECERR: u32 = 1 << 23;
    /// Faulting accesses that are terminated are aborted, never RAZ/WI.
    pub const TERM_MODEL: u32 = 1 << 26;
    /// 2-level stream tables.
    pub const ST_LEVEL_2: u32 = 1 << 27;
}

/// IDR1 (§6.3.2): shifts of the size fields.
pub mod idr1 {
    /// Bits of a StreamID.
    pub const SIDSIZE: u32 = 0;
    /// Bits of a SubstreamID.
    pub const SSIDSIZE: u32 = 6;
    /// Most entries of the PRI queue, as a power of two.
    pub const PRIQS: u32 = 11;
    /// Most entries of the event queue, as a power of two.
    pub const EVENTQS: u32 = 16;
    /// Most entries of the command queue, as a power of two.
    pub const CMDQS: u32 = 21;
    /// Mask of the three size fields of queues.
    pub const QUEUE_SIZE: u32 = 0x1f;
}

/// IDR3 (§6.3.4).
pub mod idr3 {
    /// `CD.HAD0` and `CD.HAD1` work.
    pub const HAD: u32 = 1 << 2;
    /// Stage 2 has separate execute permissions.
    pub const XNX: u32 = 1 << 4;
    /// Automatic page responses carry the PASID of the request.
    pub const PPS: u32 = 1 << 5;
    /// `STE.S2FWB` works.
    pub const FWB: u32 = 1 << 8;
    /// Range invalidation and level hints.
    pub const RIL: u32 = 1 << 10;
    /// Break-before-make level 2.
    pub const BBML2: u32 = 2 << 11;
}

/// IDR5 (§6.3.6).
pub mod idr5 {
    /// Granules of 4, 16 and 64 KiB.
    pub const GRANULES: u32 = 7 << 4;
    /// 52-bit virtual addresses.
    pub const VAX_52: u32 = 1 << 10;
    /// Shift of the largest number of stalled transactions.
    pub const STALL_MAX: u32 = 16;
}

/// CR0 (§6.3.9).
pub mod cr0 {
    /// Translation.
    pub const SMMUEN: u32 = 1 << 0;
    /// The PRI queue.
    pub const PRIQEN: u32 = 1 << 1;
    /// The event queue.
    pub const EVENTQEN: u32 = 1 << 2;
    /// The command queue.
    pub const CMDQEN: u32 = 1 << 3;
    /// Checks of translated accesses.
    pub const ATSCHK: u32 = 1 << 4;
    /// VMID wildcards: how many low bits are ignored.
    pub const VMW: u32 = 7 << 6;
    /// Shift of [`VMW`].
    pub const VMW_SHIFT: u32 = 6;
}

/// CR2 (§6.3.12).
pub mod cr2 {
    /// EL2 has ASIDs and two tables.
    pub const E2H: u32 = 1 << 0;
    /// `C_BAD_STREAMID` is recorded.
    pub const RECINVSID: u32 = 1 << 1;
    /// Private TLB maintenance: without `IDR0.BTM`, nothing.
    pub const PTM: u32 = 1 << 2;
    /// Configuration errors of ATS requests are recorded.
    pub const REC_CFG_ATS: u32 = 1 << 3;
}

/// GBPA (§6.3.14).
pub mod gbpa {
    /// Accesses are aborted while `SMMUEN` is 0.
    pub const ABORT: u32 = 1 << 20;
    /// The write is an update; reads as 0 when it is complete.
    pub const UPDATE: u32 = 1 << 31;
    /// Memory attributes, kept and not used: every access is coherent.
    pub const ATTRIBUTES: u32 = 0x000f_3f1f;
    /// "Use incoming" attributes, no abort.
    pub const RESET: u32 = 1 << 12;
}

/// IRQ_CTRL (§6.3.17).
pub mod irq_ctrl {
    /// Global errors.
    pub const GERROR: u32 = 1 << 0;
    /// The PRI queue.
    pub const PRIQ: u32 = 1 << 1;
    /// The event queue.
    pub const EVENTQ: u32 = 1 << 2;
}

/// GERROR and GERRORN (§6.3.19, §7.5).
pub mod gerror {
    /// A command cannot be carried out.
    pub const CMDQ: u32 = 1 << 0;
    /// The event queue cannot be written.
    pub const EVENTQ_ABT: u32 = 1 << 2;
    /// The PRI queue cannot be written.
    pub const PRIQ_ABT: u32 = 1 << 3;
    /// CMD_SYNC's message cannot be written.
    pub const MSI_CMDQ_ABT: u32 = 1 << 4;
    /// The event queue's message cannot be written.
    pub const MSI_EVENTQ_ABT: u32 = 1 << 5;
    /// The PRI queue's message cannot be written.
    pub const MSI_PRIQ_ABT: u32 = 1 << 6;
    /// The message of a global error cannot be written.
    pub const MSI_GERROR_ABT: u32 = 1 << 7;
    /// Bits that exist.
    pub const ALL: u32 = 0xfd;
}

/// STRTAB_BASE and STRTAB_BASE_CFG (§6.3.24, §6.3.25).
pub mod strtab {
    /// Address of the table, in place.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_ffc0;
    /// Mask of LOG2SIZE.
    pub const LOG2SIZE: u32 = 0x3f;
    /// Shift of SPLIT.
    pub const SPLIT: u32 = 6;
    /// Shift of FMT.
    pub const FMT: u32 = 16;
    /// FMT of a 2-level table.
    pub const FMT_2_LEVEL: u32 = 1;
}

/// Queue registers (§6.3.26 ff.).
pub mod queue {
    /// Address of a queue, in place.
    pub const ADDRESS: u64 = 0x000f_ffff_ffff_ffe0;
    /// Mask of LOG2SIZE in a base register.
    pub const LOG2SIZE: u64 = 0x1f;
    /// An index with its wrap bit, at most.
    pub const INDEX: u32 = 0x000f_ffff;
    /// OVFLG and OVACKFLG.
    pub const OVERFLOW: u32 = 1 << 31;
    /// Shift of CMDQ_CONS.ERR.
    pub const ERR: u32 = 24;
    /// Mask of CMDQ_CONS.ERR.
    pub const ERR_MASK: u32 = 0x7f << ERR;
}

/// Address field of the `*_IRQ_CFG0` registers and of CMD_SYNC, in place.
pub const MSI_ADDRESS: u64 = 0x000f_ffff_ffff_fffc;

/// CMDQ_CONS.ERR (§7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Cerror {
    /// The command is illegal.
    Ill = 1,
    /// The command could not be fetched.
    Abt = 2,
}

/// Level 1 stream table descriptor (§5.1).
pub mod l1std {
    use super::Field;
    /// How many STEs the level 2 table has: `1 << (SPAN - 1)`.
    pub const SPAN: Field = Field::new(4, 0);
    /// Address of the level 2 table, in place.
    pub const L2PTR: Field = Field::new(51, 6);
}

/// Stream table entry (§5.2).
pub mod ste {
    use super::Field;
    /// 64-bit words of an STE.
    pub const WORDS: usize = 8;
    /// Valid.
    pub const V: Field = Field::new(0, 0);
    /// Which stages translate.
    pub const CONFIG: Field = Field::new(3, 1);
    /// Format of the CD table.
    pub const S1FMT: Field = Field::new(5, 4);
    /// Address of the CD table, in place.
    pub const S1CONTEXTPTR: Field = Field::new(55, 6);
    /// Bits of a SubstreamID.
    pub const S1CDMAX: Field = Field::new(63, 59);
    /// What becomes of accesses without a SubstreamID.
    pub const S1DSS: Field = Field::new(65, 64);
    /// Stage 2 memory attributes are forced.
    pub const S2FWB: Field = Field::new(89, 89);
    /// Stage 1 must not stall.
    pub const S1STALLD: Field = Field::new(91, 91);
    /// ATS.
    pub const EATS: Field = Field::new(93, 92);
    /// StreamWorld.
    pub const STRW: Field = Field::new(95, 94);
    /// VMID.
    pub const S2VMID: Field = Field::new(143, 128);
    /// Size of the intermediate address space.
    pub const S2T0SZ: Field = Field::new(165, 160);
    /// Level at which a walk starts.
    pub const S2SL0: Field = Field::new(167, 166);
    /// Granule.
    pub const S2TG: Field = Field::new(175, 174);
    /// Physical address size.
    pub const S2PS: Field = Field::new(178, 176);
    /// AArch64 tables.
    pub const S2AA64: Field = Field::new(179, 179);
    /// Big-endian tables.
    pub const S2ENDI: Field = Field::new(180, 180);
    /// The access flag does not fault.
    pub const S2AFFD: Field = Field::new(181, 181);
    /// Stage 1 walks must not go to Device memory.
    pub const S2PTW: Field = Field::new(182, 182);
    /// The SMMU updates dirty state.
    pub const S2HD: Field = Field::new(183, 183);
    /// The SMMU updates the access flag.
    pub const S2HA: Field = Field::new(184, 184);
    /// Faults stall.
    pub const S2S: Field = Field::new(185, 185);
    /// Faults are recorded.
    pub const S2R: Field = Field::new(186, 186);
    /// Address of the table, in place.
    pub const S2TTB: Field = Field::new(243, 196);
}

/// Level 1 context descriptor (§5.3).
pub mod l1cd {
    use super::Field;
    /// Valid.
    pub const V: Field = Field::new(0, 0);
    /// Address of the level 2 table, in place.
    pub const L2PTR: Field = Field::new(55, 12);
}

/// Context descriptor (§5.4).
pub mod cd {
    use super::Field;
    /// 64-bit words of a CD.
    pub const WORDS: usize = 8;
    /// Size of the space that TTB0 translates.
    pub const T0SZ: Field = Field::new(5, 0);
    /// Granule of TTB0.
    pub const TG0: Field = Field::new(7, 6);
    /// No walks through TTB0.
    pub const EPD0: Field = Field::new(14, 14);
    /// Big-endian tables.
    pub const ENDI: Field = Field::new(15, 15);
    /// Size of the space that TTB1 translates.
    pub const T1SZ: Field = Field::new(21, 16);
    /// Granule of TTB1.
    pub const TG1: Field = Field::new(23, 22);
    /// No walks through TTB1.
    pub const EPD1: Field = Field::new(30, 30);
    /// Valid.
    pub const V: Field = Field::new(31, 31);
    /// Size of the intermediate address space.
    pub const IPS: Field = Field::new(34, 32);
    /// The access flag does not fault.
    pub const AFFD: Field = Field::new(35, 35);
    /// The top byte of TTB0's addresses is ignored.
    pub const TBI0: Field = Field::new(38, 38);
    /// The top byte of TTB1's addresses is ignored.
    pub const TBI1: Field = Field::new(39, 39);
    /// AArch64 tables.
    pub const AA64: Field = Field::new(41, 41);
    /// The SMMU updates dirty state.
    pub const HD: Field = Field::new(42, 42);
    /// The SMMU updates the access flag.
    pub const HA: Field = Field::new(43, 43);
    /// Faults stall.
    pub const S: Field = Field::new(44, 44);
    /// Faults are recorded.
    pub const R: Field = Field::new(45, 45);
    /// Faults abort.
    pub const A: Field = Field::new(46, 46);
    /// ASID.
    pub const ASID: Field = Field::new(63, 48);
    /// Table descriptors of TTB0 carry no attributes.
    pub const HAD0: Field = Field::new(65, 65);
    /// Address of TTB0, in place.
    pub const TTB0: Field = Field::new(115, 68);
    /// Table descriptors of TTB1 carry no attributes.
    pub const HAD1: Field = Field::new(129, 129);
    /// Address of TTB1, in place.
    pub const TTB1: Field = Field::new(179, 132);
}

/// Commands (§4).
pub mod cmd {
    use super::Field;
    /// Bytes of a command.
    pub const SIZE: u64 = 16;
    /// 64-bit words of a command.
    pub const WORDS: usize = 2;
    /// Opcode (§4.1.1).
    pub const OPCODE: Field = Field::new(7, 0);
    /// The StreamID is secure.
    pub const SSEC: Field = Field::new(10, 10);
    /// There is a SubstreamID.
    pub const SSV: Field = Field::new(11, 11);
    /// SubstreamID.
    pub const SSID: Field = Field::new(31, 12);
    /// StreamID.
    pub const SID: Field = Field::new(63, 32);
    /// `CMD_CFGI_STE_RANGE`: `2 << RANGE` StreamIDs.
    pub const RANGE: Field = Field::new(68, 64);
    /// Range invalidation: how many units, less one.
    pub const NUM: Field = Field::new(16, 12);
    /// Range invalidation: units of `1 << SCALE` granules.
    pub const SCALE: Field = Field::new(24, 20);
    /// VMID.
    pub const VMID: Field = Field::new(47, 32);
    /// ASID.
    pub const ASID: Field = Field::new(63, 48);
    /// Level hint.
    pub const TTL: Field = Field::new(73, 72);
    /// Granule; 0 when the command is for one address.
    pub const TG: Field = Field::new(75, 74);
    /// Address, in place.
    pub const ADDRESS: Field = Field::new(127, 76);
    /// Intermediate physical address, in place.
    pub const IPA: Field = Field::new(115, 76);
    /// `CMD_ATC_INV`: `1 << SIZE` pages.
    pub const ATC_SIZE: Field = Field::new(69, 64);
    /// `CMD_PRI_RESP`: which group.
    pub const PRG_INDEX: Field = Field::new(72, 64);
    /// `CMD_PRI_RESP`: the answer.
    pub const PRI_RESP: Field = Field::new(77, 76);
    /// `CMD_RESUME`: retry.
    pub const RESUME_RETRY: Field = Field::new(12, 12);
    /// `CMD_RESUME`: which transaction.
    pub const STAG: Field = Field::new(79, 64);
    /// `CMD_SYNC`: how completion is signalled.
    pub const CS: Field = Field::new(13, 12);
    /// `CMD_SYNC`: what is written.
    pub const MSI_DATA: Field = Field::new(63, 32);
    /// `CMD_SYNC`: where it is written, in place.
    pub const MSI_ADDRESS: Field = Field::new(115, 66);

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
}

/// Event records (§7.3).
pub mod event {
    use super::Field;
    /// Bytes of a record.
    pub const SIZE: u64 = 32;
    /// 64-bit words of a record.
    pub const WORDS: usize = 4;
    /// Event number.
    pub const NUMBER: Field = Field::new(7, 0);
    /// There is a SubstreamID.
    pub const SSV: Field = Field::new(11, 11);
    /// SubstreamID.
    pub const SSID: Field = Field::new(31, 12);
    /// StreamID.
    pub const SID: Field = Field::new(63, 32);
    /// Which stalled transaction.
    pub const STAG: Field = Field::new(79, 64);
    /// The transaction is stalled.
    pub const STALL: Field = Field::new(95, 95);
    /// The transaction reads.
    pub const RNW: Field = Field::new(99, 99);
    /// The fault arose at stage 2.
    pub const S2: Field = Field::new(103, 103);
    /// What caused the fault.
    pub const CLASS: Field = Field::new(105, 104);
    /// Reading (not updating) a descriptor caused the fault.
    pub const TTRNW: Field = Field::new(108, 108);
    /// `F_BAD_ATS_TREQ`: writing was asked for.
    pub const TREQ_W: Field = Field::new(98, 98);
    /// `F_BAD_ATS_TREQ`: reading was asked for.
    pub const TREQ_R: Field = Field::new(99, 99);
    /// Address of the transaction.
    pub const INPUT: Field = Field::new(191, 128);
    /// Intermediate physical address, in place from bit 12.
    pub const IPA: Field = Field::new(243, 204);
    /// Address of a structure, in place from bit 3.
    pub const FETCH: Field = Field::new(243, 195);
}

/// Records of the PRI queue (§8).
pub mod pri {
    use super::Field;
    /// Bytes of a record.
    pub const SIZE: u64 = 16;
    /// 64-bit words of a record.
    pub const WORDS: usize = 2;
    /// StreamID.
    pub const SID: Field = Field::new(31, 0);
    /// SubstreamID.
    pub const SSID: Field = Field::new(51, 32);
    /// Reading is asked for.
    pub const READ: Field = Field::new(60, 60);
    /// Writing is asked for.
    pub const WRITE: Field = Field::new(61, 61);
    /// Last of its group.
    pub const LAST: Field = Field::new(62, 62);
    /// There is a SubstreamID.
    pub const SSV: Field = Field::new(63, 63);
    /// Group.
    pub const PRG_INDEX: Field = Field::new(72, 64);
    /// Address, in place.
    pub const ADDRESS: Field = Field::new(127, 76);
}
