//! Registers (IHI 0070 §6.2, §6.3).

/// Registers (§6.2, §6.3): offsets in page 0, in bytes.
pub(crate) mod reg {
    /// Offset of page 1 (§6.2).
    pub(crate) const PAGE_1: u64 = 0x1_0000;
    /// §6.3.1
    pub(crate) const IDR0: u64 = 0x00;
    /// §6.3.2
    pub(crate) const IDR1: u64 = 0x04;
    /// §6.3.4
    pub(crate) const IDR3: u64 = 0x0c;
    /// §6.3.6
    pub(crate) const IDR5: u64 = 0x14;
    /// §6.3.8
    pub(crate) const AIDR: u64 = 0x1c;
    /// §6.3.9
    pub(crate) const CR0: u64 = 0x20;
    /// §6.3.10
    pub(crate) const CR0ACK: u64 = 0x24;
    /// §6.3.11
    pub(crate) const CR1: u64 = 0x28;
    /// §6.3.12
    pub(crate) const CR2: u64 = 0x2c;
    /// §6.3.14
    pub(crate) const GBPA: u64 = 0x44;
    /// §6.3.17
    pub(crate) const IRQ_CTRL: u64 = 0x50;
    /// §6.3.18
    pub(crate) const IRQ_CTRLACK: u64 = 0x54;
    /// §6.3.19
    pub(crate) const GERROR: u64 = 0x60;
    /// §6.3.20
    pub(crate) const GERRORN: u64 = 0x64;
    /// §6.3.21, 64 bits
    pub(crate) const GERROR_IRQ_CFG0: u64 = 0x68;
    /// §6.3.22
    pub(crate) const GERROR_IRQ_CFG1: u64 = 0x70;
    /// §6.3.23
    pub(crate) const GERROR_IRQ_CFG2: u64 = 0x74;
    /// §6.3.24, 64 bits
    pub(crate) const STRTAB_BASE: u64 = 0x80;
    /// §6.3.25
    pub(crate) const STRTAB_BASE_CFG: u64 = 0x88;
    /// §6.3.26, 64 bits
    pub(crate) const CMDQ_BASE: u64 = 0x90;
    /// §6.3.27
    pub(crate) const CMDQ_PROD: u64 = 0x98;
    /// §6.3.28
    pub(crate) const CMDQ_CONS: u64 = 0x9c;
    /// §6.3.29, 64 bits
    pub(crate) const EVENTQ_BASE: u64 = 0xa0;
    /// §6.3.30; it and CONS belong to page 1
    pub(crate) const EVENTQ_PROD: u64 = 0xa8;
    /// §6.3.31
    pub(crate) const EVENTQ_CONS: u64 = 0xac;
    /// §6.3.32, 64 bits
    pub(crate) const EVENTQ_IRQ_CFG0: u64 = 0xb0;
    /// §6.3.33
    pub(crate) const EVENTQ_IRQ_CFG1: u64 = 0xb8;
    /// §6.3.34
    pub(crate) const EVENTQ_IRQ_CFG2: u64 = 0xbc;
    /// §6.3.35, 64 bits
    pub(crate) const PRIQ_BASE: u64 = 0xc0;
    /// §6.3.36; it and CONS belong to page 1
    pub(crate) const PRIQ_PROD: u64 = 0xc8;
    /// §6.3.37
    pub(crate) const PRIQ_CONS: u64 = 0xcc;
    /// §6.3.38, 64 bits
    pub(crate) const PRIQ_IRQ_CFG0: u64 = 0xd0;
    /// §6.3.39
    pub(crate) const PRIQ_IRQ_CFG1: u64 = 0xd8;
    /// §6.3.40
    pub(crate) const PRIQ_IRQ_CFG2: u64 = 0xdc;
    /// End of the implemented registers, exclusive, in bytes.
    pub(crate) const END: u64 = 0x100;
    /// CIDR0 to CIDR3 (§6.2, CoreSight identification).
    pub(crate) const CIDR0: u64 = 0xff0;
}

/// IDR0 (§6.3.1).
pub(crate) mod idr0 {
    /// Stage 2.
    pub(crate) const S2P: u32 = 1 << 0;
    /// Stage 1.
    pub(crate) const S1P: u32 = 1 << 1;
    /// Tables in the AArch64 format.
    pub(crate) const TTF_AARCH64: u32 = 2 << 2;
    /// Walks and queues are coherent with the CPUs' caches.
    pub(crate) const COHACC: u32 = 1 << 4;
    /// Hardware updates access flag and dirty state.
    pub(crate) const HTTU_DIRTY: u32 = 2 << 6;
    /// EL2 commands and StreamWorlds.
    pub(crate) const HYP: u32 = 1 << 9;
    pub(crate) const ATS: u32 = 1 << 10;
    /// No split-stage ATS: a translation request uses all enabled stages.
    pub(crate) const NS1ATS: u32 = 1 << 11;
    /// 16-bit ASIDs.
    pub(crate) const ASID16: u32 = 1 << 12;
    /// The SMMU's own interrupts may be messages.
    pub(crate) const MSI: u32 = 1 << 13;
    pub(crate) const PRI: u32 = 1 << 16;
    /// VMID wildcards.
    pub(crate) const VMW: u32 = 1 << 17;
    /// 16-bit VMIDs.
    pub(crate) const VMID16: u32 = 1 << 18;
    /// 2-level context descriptor tables.
    pub(crate) const CD2L: u32 = 1 << 19;
    /// Tables are little-endian.
    pub(crate) const TTENDIAN_LITTLE: u32 = 2 << 21;
    /// `CR2.REC_CFG_ATS` is implemented.
    pub(crate) const ATSRECERR: u32 = 1 << 23;
    /// Faulting accesses that are terminated are aborted, never RAZ/WI.
    pub(crate) const TERM_MODEL: u32 = 1 << 26;
    /// 2-level stream tables.
    pub(crate) const ST_LEVEL_2: u32 = 1 << 27;
}

/// IDR1 (§6.3.2): shifts of the size fields.
pub(crate) mod idr1 {
    /// Bits of a StreamID.
    pub(crate) const SIDSIZE: u32 = 0;
    /// Bits of a SubstreamID.
    pub(crate) const SSIDSIZE: u32 = 6;
    /// Maximum size of the PRI queue, as a power of two.
    pub(crate) const PRIQS: u32 = 11;
    /// Maximum size of the event queue, as a power of two.
    pub(crate) const EVENTQS: u32 = 16;
    /// Maximum size of the command queue, as a power of two.
    pub(crate) const CMDQS: u32 = 21;
    /// Mask of the three size fields of queues.
    pub(crate) const QUEUE_SIZE: u32 = 0x1f;
}

/// IDR3 (§6.3.4).
pub(crate) mod idr3 {
    /// `CD.HAD0` and `CD.HAD1` are implemented.
    pub(crate) const HAD: u32 = 1 << 2;
    /// Stage 2 has separate execute permissions.
    pub(crate) const XNX: u32 = 1 << 4;
    /// Automatic page responses carry the PASID of the request.
    pub(crate) const PPS: u32 = 1 << 5;
    /// `STE.S2FWB` is implemented.
    pub(crate) const FWB: u32 = 1 << 8;
    /// Range invalidation and level hints.
    pub(crate) const RIL: u32 = 1 << 10;
    /// Break-before-make level 2.
    pub(crate) const BBML2: u32 = 2 << 11;
}

/// IDR5 (§6.3.6).
pub(crate) mod idr5 {
    /// Granules of 4, 16 and 64 KiB.
    pub(crate) const GRANULES: u32 = 7 << 4;
    /// 52-bit virtual addresses.
    pub(crate) const VAX_52: u32 = 1 << 10;
    /// Shift of the maximum number of stalled transactions.
    pub(crate) const STALL_MAX: u32 = 16;
}

/// CR0 (§6.3.9).
pub(crate) mod cr0 {
    /// Enables translation.
    pub(crate) const SMMUEN: u32 = 1 << 0;
    /// Enables the PRI queue.
    pub(crate) const PRIQEN: u32 = 1 << 1;
    /// Enables the event queue.
    pub(crate) const EVENTQEN: u32 = 1 << 2;
    /// Enables the command queue.
    pub(crate) const CMDQEN: u32 = 1 << 3;
    /// Enables checks of translated accesses.
    pub(crate) const ATSCHK: u32 = 1 << 4;
    /// VMID wildcards: number of low bits that are ignored.
    pub(crate) const VMW: u32 = 7 << 6;
    pub(crate) const VMW_SHIFT: u32 = 6;
}

/// CR2 (§6.3.12).
pub(crate) mod cr2 {
    /// EL2 has ASIDs and two tables.
    pub(crate) const E2H: u32 = 1 << 0;
    /// `C_BAD_STREAMID` is recorded.
    pub(crate) const RECINVSID: u32 = 1 << 1;
    /// Private TLB maintenance: no effect without `IDR0.BTM`.
    pub(crate) const PTM: u32 = 1 << 2;
    /// Configuration errors of ATS requests are recorded.
    pub(crate) const REC_CFG_ATS: u32 = 1 << 3;
}

/// GBPA (§6.3.14).
pub(crate) mod gbpa {
    /// Accesses are aborted while `SMMUEN` is 0.
    pub(crate) const ABORT: u32 = 1 << 20;
    /// Requests an update; reads as 0 when the update is complete.
    pub(crate) const UPDATE: u32 = 1 << 31;
    /// Memory attributes: stored and ignored, as every access is coherent.
    pub(crate) const ATTRIBUTES: u32 = 0x000f_3f1f;
    /// "Use incoming" attributes, no abort.
    pub(crate) const RESET: u32 = 1 << 12;
}

/// IRQ_CTRL (§6.3.17).
pub(crate) mod irq_ctrl {
    /// Enables interrupts of global errors.
    pub(crate) const GERROR: u32 = 1 << 0;
    /// Enables interrupts of the PRI queue.
    pub(crate) const PRIQ: u32 = 1 << 1;
    /// Enables interrupts of the event queue.
    pub(crate) const EVENTQ: u32 = 1 << 2;
}

/// GERROR and GERRORN (§6.3.19, §7.5).
pub(crate) mod gerror {
    /// The command queue stopped at an error (CMDQ_CONS.ERR).
    pub(crate) const CMDQ: u32 = 1 << 0;
    /// The event queue cannot be written.
    pub(crate) const EVENTQ_ABT: u32 = 1 << 2;
    /// The PRI queue cannot be written.
    pub(crate) const PRIQ_ABT: u32 = 1 << 3;
    /// CMD_SYNC's message cannot be written.
    pub(crate) const MSI_CMDQ_ABT: u32 = 1 << 4;
    /// The event queue's message cannot be written.
    pub(crate) const MSI_EVENTQ_ABT: u32 = 1 << 5;
    /// The PRI queue's message cannot be written.
    pub(crate) const MSI_PRIQ_ABT: u32 = 1 << 6;
    /// The message of a global error cannot be written.
    pub(crate) const MSI_GERROR_ABT: u32 = 1 << 7;
    /// Mask of the implemented bits.
    pub(crate) const ALL: u32 = 0xfd;
}

/// STRTAB_BASE and STRTAB_BASE_CFG (§6.3.24, §6.3.25).
pub(crate) mod strtab {
    /// Address of the table, in place.
    pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_ffc0;
    /// Mask of LOG2SIZE.
    pub(crate) const LOG2SIZE: u32 = 0x3f;
    /// Shift of SPLIT.
    pub(crate) const SPLIT: u32 = 6;
    /// Shift of FMT.
    pub(crate) const FMT: u32 = 16;
    /// FMT of a 2-level table.
    pub(crate) const FMT_2_LEVEL: u32 = 1;
}

/// Queue registers (§6.3.26 ff.).
pub(crate) mod queue {
    /// Address of a queue, in place.
    pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_ffe0;
    /// Mask of LOG2SIZE in a base register.
    pub(crate) const LOG2SIZE: u64 = 0x1f;
    /// Mask of the largest index including its wrap bit.
    pub(crate) const INDEX: u32 = 0x000f_ffff;
    /// OVFLG and OVACKFLG.
    pub(crate) const OVERFLOW: u32 = 1 << 31;
    /// Shift of CMDQ_CONS.ERR.
    pub(crate) const ERR: u32 = 24;
    /// Mask of CMDQ_CONS.ERR.
    pub(crate) const ERR_MASK: u32 = 0x7f << ERR;
}

/// Address field of the `*_IRQ_CFG0` registers, in place.
pub(crate) const MSI_ADDRESS: u64 = 0x000f_ffff_ffff_fffc;
