//! The registers (IHI 0070 §6): writable bits and their guards; global errors
//! and the interrupts that they request.

use serde::{Deserialize, Serialize};

use super::config::{STREAM_BITS, SmmuConfig};
use super::spec::{
    MSI_ADDRESS, cr0, cr2, gbpa, gerror, idr0, idr1, idr3, idr5, irq_ctrl, queue, reg,
};
use crate::addr::Gpa;

/// Words of the register file.
const WORDS: usize = (reg::END / 4) as usize;
/// AIDR of SMMUv3.2.
const AIDR: u32 = 2;
/// `CIDR0` to `CIDR3` of a CoreLink component.
const CIDR: [u32; 4] = [0x0d, 0xf0, 0x05, 0xb1];
/// Entries of the queues, as powers of two. Linux allocates the largest size,
/// so these also decide the memory that a guest spends on them.
const CMDQS: u32 = 12;
const EVENTQS: u32 = 10;
const PRIQS: u32 = 10;
/// Upper bound on stalled transactions (IDR5.STALL_MAX).
pub(super) const STALL_MAX: u32 = 32;

/// Condition under which the guest may write a register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Guard {
    /// Always.
    None,
    /// While a bit of CR0 is clear.
    Cr0(u32),
    /// While a bit of IRQ_CTRL is clear.
    Irq(u32),
}

/// Words that the guest may write: offset, writable bits, guard.
const WRITABLE: [(u64, u32, Guard); 33] = {
    use Guard::{Cr0, Irq, None};
    const LOW_BASE: u32 = 0xffff_ffe0;
    const HIGH_BASE: u32 = 0x400f_ffff;
    const MSI_LOW: u32 = 0xffff_fffc;
    const MSI_HIGH: u32 = 0x000f_ffff;
    const SIZE: u32 = 0x1f;
    [
        (
            reg::CR0,
            cr0::SMMUEN | cr0::PRIQEN | cr0::EVENTQEN | cr0::CMDQEN | cr0::ATSCHK | cr0::VMW,
            None,
        ),
        (reg::CR1, 0xfff, None),
        (
            reg::CR2,
            cr2::E2H | cr2::RECINVSID | cr2::PTM | cr2::REC_CFG_ATS,
            Cr0(cr0::SMMUEN),
        ),
        (
            reg::GBPA,
            gbpa::ABORT | gbpa::ATTRIBUTES | gbpa::UPDATE,
            None,
        ),
        (
            reg::IRQ_CTRL,
            irq_ctrl::GERROR | irq_ctrl::PRIQ | irq_ctrl::EVENTQ,
            None,
        ),
        (reg::GERRORN, gerror::ALL, None),
        (reg::GERROR_IRQ_CFG0, MSI_LOW, Irq(irq_ctrl::GERROR)),
        (reg::GERROR_IRQ_CFG0 + 4, MSI_HIGH, Irq(irq_ctrl::GERROR)),
        (reg::GERROR_IRQ_CFG1, u32::MAX, Irq(irq_ctrl::GERROR)),
        (reg::GERROR_IRQ_CFG2, 0x3f, Irq(irq_ctrl::GERROR)),
        (reg::STRTAB_BASE, 0xffff_ffc0, Cr0(cr0::SMMUEN)),
        (reg::STRTAB_BASE + 4, HIGH_BASE, Cr0(cr0::SMMUEN)),
        (reg::STRTAB_BASE_CFG, 0x3_07ff, Cr0(cr0::SMMUEN)),
        (reg::CMDQ_BASE, LOW_BASE | SIZE, Cr0(cr0::CMDQEN)),
        (reg::CMDQ_BASE + 4, HIGH_BASE, Cr0(cr0::CMDQEN)),
        (reg::CMDQ_PROD, queue::INDEX, None),
        (reg::CMDQ_CONS, queue::INDEX, Cr0(cr0::CMDQEN)),
        (reg::EVENTQ_BASE, LOW_BASE | SIZE, Cr0(cr0::EVENTQEN)),
        (reg::EVENTQ_BASE + 4, HIGH_BASE, Cr0(cr0::EVENTQEN)),
        (
            reg::EVENTQ_PROD,
            queue::INDEX | queue::OVERFLOW,
            Cr0(cr0::EVENTQEN),
        ),
        (reg::EVENTQ_CONS, queue::INDEX | queue::OVERFLOW, None),
        (reg::EVENTQ_IRQ_CFG0, MSI_LOW, Irq(irq_ctrl::EVENTQ)),
        (reg::EVENTQ_IRQ_CFG0 + 4, MSI_HIGH, Irq(irq_ctrl::EVENTQ)),
        (reg::EVENTQ_IRQ_CFG1, u32::MAX, Irq(irq_ctrl::EVENTQ)),
        (reg::EVENTQ_IRQ_CFG2, 0x3f, Irq(irq_ctrl::EVENTQ)),
        (reg::PRIQ_BASE, LOW_BASE | SIZE, Cr0(cr0::PRIQEN)),
        (reg::PRIQ_BASE + 4, HIGH_BASE, Cr0(cr0::PRIQEN)),
        (
            reg::PRIQ_PROD,
            queue::INDEX | queue::OVERFLOW,
            Cr0(cr0::PRIQEN),
        ),
        (reg::PRIQ_CONS, queue::INDEX | queue::OVERFLOW, None),
        (reg::PRIQ_IRQ_CFG0, MSI_LOW, Irq(irq_ctrl::PRIQ)),
        (reg::PRIQ_IRQ_CFG0 + 4, MSI_HIGH, Irq(irq_ctrl::PRIQ)),
        (reg::PRIQ_IRQ_CFG1, u32::MAX, Irq(irq_ctrl::PRIQ)),
        (reg::PRIQ_IRQ_CFG2, 0x8000_003f, Irq(irq_ctrl::PRIQ)),
    ]
};

/// The SMMU's interrupts (§3.18).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SmmuLine {
    /// Event queue not empty.
    Eventq,
    /// The PRI queue is not empty.
    Priq,
    /// A CMD_SYNC completed.
    CmdSync,
    /// A global error.
    Gerror,
}

/// An interrupt that is sent when the state is unlocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct InterruptRequest {
    /// The wire.
    pub line: SmmuLine,
    /// Address and data of a message, instead of the wire or, for CMD_SYNC, in
    /// addition to it.
    pub message: Option<(Gpa, u32)>,
}

/// The values of all registers, and the requested interrupts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Registers {
    words: Vec<u32>,
    #[serde(skip)]
    requested: Vec<InterruptRequest>,
}

impl Registers {
    /// The registers after a reset.
    pub(super) fn new(config: &SmmuConfig) -> Self {
        let mut registers = Self {
            words: vec![0; WORDS],
            requested: Vec::new(),
        };
        for (offset, value) in identification(config) {
            registers.set(offset, value);
        }
        registers.set(reg::GBPA, gbpa::RESET);
        registers
    }

    fn index(offset: u64) -> usize {
        usize::try_from(offset / 4).unwrap_or(usize::MAX)
    }

    /// The 32-bit word at `offset` of page 0; 0 beyond the registers.
    pub(super) fn get(&self, offset: u64) -> u32 {
        self.words.get(Self::index(offset)).copied().unwrap_or(0)
    }

    /// The 64-bit register at `offset`.
    pub(super) fn get64(&self, offset: u64) -> u64 {
        u64::from(self.get(offset)) | u64::from(self.get(offset + 4)) << 32
    }

    /// Sets a word regardless of its guard and writable bits.
    pub(super) fn set(&mut self, offset: u64, value: u32) {
        if let Some(word) = self.words.get_mut(Self::index(offset)) {
            *word = value;
        }
    }

    /// Whether a bit of CR0 is set.
    pub(super) fn enabled(&self, bit: u32) -> bool {
        self.get(reg::CR0) & bit != 0
    }

    /// Whether a bit of CR2 is set.
    pub(super) fn cr2(&self, bit: u32) -> bool {
        self.get(reg::CR2) & bit != 0
    }

    /// Whether a global error is active (§7.5).
    pub(super) fn error_active(&self, bit: u32) -> bool {
        (self.get(reg::GERROR) ^ self.get(reg::GERRORN)) & bit != 0
    }

    /// Activates a global error (§7.5), unless it is active.
    pub(super) fn global_error(&mut self, bit: u32) {
        if self.error_active(bit) {
            return;
        }
        self.set(reg::GERROR, self.get(reg::GERROR) ^ bit);
        if bit != gerror::MSI_GERROR_ABT {
            self.interrupt(SmmuLine::Gerror);
        }
    }

    /// Requests an interrupt according to IRQ_CTRL and the IRQ_CFG registers.
    pub(super) fn interrupt(&mut self, line: SmmuLine) {
        let (enable, base) = match line {
            SmmuLine::Eventq => (irq_ctrl::EVENTQ, reg::EVENTQ_IRQ_CFG0),
            SmmuLine::Priq => (irq_ctrl::PRIQ, reg::PRIQ_IRQ_CFG0),
            SmmuLine::Gerror => (irq_ctrl::GERROR, reg::GERROR_IRQ_CFG0),
            SmmuLine::CmdSync => return,
        };
        if self.get(reg::IRQ_CTRL) & enable == 0 {
            return;
        }
        let address = self.get64(base) & MSI_ADDRESS;
        let request = InterruptRequest {
            line,
            message: (address != 0).then_some((Gpa(address), self.get(base + 8))),
        };
        if !self.requested.contains(&request) {
            self.request(request);
        }
    }

    /// Requests an interrupt that does not depend on IRQ_CTRL.
    pub(super) fn request(&mut self, request: InterruptRequest) {
        self.requested.push(request);
    }

    /// Removes and returns the requested interrupts.
    pub(super) fn take_interrupts(&mut self) -> Vec<InterruptRequest> {
        std::mem::take(&mut self.requested)
    }

    /// Writes the word at `offset` for the guest, without other effects.
    /// Ignored where the guest may not write now.
    pub(super) fn write(&mut self, offset: u64, value: u32) {
        if let Some(value) = self.writable(offset, value) {
            self.set(offset, value);
        }
    }

    /// Writes IRQ_CTRL for the guest and acknowledges it (§6.3.17, §6.3.18).
    pub(super) fn write_irq_ctrl(&mut self, value: u32) {
        self.write(reg::IRQ_CTRL, value);
        self.set(reg::IRQ_CTRLACK, self.get(reg::IRQ_CTRL));
    }

    /// Copies CR0 to CR0ACK: the write is complete (§6.3.10).
    pub(super) fn acknowledge_cr0(&mut self) {
        self.set(reg::CR0ACK, self.get(reg::CR0));
    }

    /// Value of the word at `offset` after a write of `value`, or `None` when the
    /// guest may not write it now.
    fn writable(&self, offset: u64, value: u32) -> Option<u32> {
        let (_, mask, guard) = WRITABLE.iter().find(|(known, ..)| *known == offset)?;
        let free = match guard {
            Guard::None => true,
            Guard::Cr0(bit) => self.get(reg::CR0) & bit == 0,
            Guard::Irq(bit) => self.get(reg::IRQ_CTRL) & bit == 0,
        };
        let mask = mask & self.offered(offset);
        free.then_some(self.get(offset) & !mask | value & mask)
    }

    /// The bits of a control register that the features of IDR0 define.
    fn offered(&self, offset: u64) -> u32 {
        let controls: &[(u64, u32, u32)] = &[
            (reg::CR0, idr0::PRI, cr0::PRIQEN),
            (reg::CR0, idr0::ATS, cr0::ATSCHK),
            (reg::CR0, idr0::VMW, cr0::VMW),
            (reg::CR2, idr0::HYP, cr2::E2H),
            (reg::CR2, idr0::ATSRECERR, cr2::REC_CFG_ATS),
        ];
        controls
            .iter()
            .filter(|(control, feature, _)| {
                *control == offset && self.get(reg::IDR0) & feature == 0
            })
            .fold(u32::MAX, |mask, (.., bits)| mask & !bits)
    }

    /// The word at `offset` of either page as the guest reads it.
    pub(super) fn read(&self, offset: u64) -> u32 {
        match offset {
            reg::CIDR0.. if offset < reg::CIDR0 + 16 => {
                let word = CIDR.get(Self::index(offset - reg::CIDR0));
                word.copied().unwrap_or(0)
            }
            _ => self.get(in_page_0(offset)),
        }
    }
}

/// The offset in page 0 of a register that may be in page 1: the indices of
/// the event and PRI queues (§6.2).
pub(super) const fn in_page_0(offset: u64) -> u64 {
    match offset.wrapping_sub(reg::PAGE_1) {
        page_1 @ (reg::EVENTQ_PROD | reg::EVENTQ_CONS | reg::PRIQ_PROD | reg::PRIQ_CONS) => page_1,
        _ => offset,
    }
}

/// Whether a 64-bit register starts at `offset` (§6.2.1). A write to one has no
/// other effects.
pub(super) const fn is_64_bit(offset: u64) -> bool {
    matches!(
        offset,
        reg::GERROR_IRQ_CFG0
            | reg::STRTAB_BASE
            | reg::CMDQ_BASE
            | reg::EVENTQ_BASE
            | reg::EVENTQ_IRQ_CFG0
            | reg::PRIQ_BASE
            | reg::PRIQ_IRQ_CFG0
    )
}

/// Values of the identification registers; every feature is implemented.
fn identification(config: &SmmuConfig) -> [(u64, u32); 5] {
    let when = |condition: bool, bits: u32| if condition { bits } else { 0 };
    let both = config.stage1() && config.stage2();
    let idr0 = idr0::TTF_AARCH64
        | idr0::COHACC
        | idr0::HTTU_DIRTY
        | idr0::ASID16
        | idr0::MSI
        | idr0::TTENDIAN_LITTLE
        | idr0::TERM_MODEL
        | idr0::ST_LEVEL_2
        | when(config.stage1(), idr0::S1P | idr0::CD2L)
        | when(config.stage2(), idr0::S2P | idr0::VMID16 | idr0::VMW)
        | when(config.hyp(), idr0::HYP)
        | when(config.ats, idr0::ATS | idr0::ATSRECERR)
        | when(config.ats && both, idr0::NS1ATS)
        | when(config.pri(), idr0::PRI);
    let idr1 = STREAM_BITS << idr1::SIDSIZE
        | config.substream_bits() << idr1::SSIDSIZE
        | when(config.pri(), PRIQS << idr1::PRIQS)
        | EVENTQS << idr1::EVENTQS
        | CMDQS << idr1::CMDQS;
    let idr3 = idr3::RIL
        | idr3::BBML2
        | when(config.stage1(), idr3::HAD)
        | when(config.stage2(), idr3::XNX | idr3::FWB)
        | when(config.pri() && config.stage1(), idr3::PPS);
    let oas = match config.address_bits() {
        52 => 6 | idr5::VAX_52,
        48 => 5,
        _ => 4,
    };
    let idr5 = oas | idr5::GRANULES | STALL_MAX << idr5::STALL_MAX;
    [
        (reg::IDR0, idr0),
        (reg::IDR1, idr1),
        (reg::IDR3, idr3),
        (reg::IDR5, idr5),
        (reg::AIDR, AIDR),
    ]
}
