//! The SMMUv3's registers and interrupts (IHI 0070 §6, §3.18) around the model
//! of [`iommu::smmuv3`].
//!
//! A write of the command queue's producer index runs the commands, on the
//! vCPU that wrote it: the first look of a driver at the consumer index finds
//! them done.

use std::sync::Arc;

use iommu::Gpa;
use iommu::smmuv3::{Smmu, SmmuLine, SmmuWires};

use crate::bus::BusDevice;
use crate::interrupt::IrqLine;

/// Bytes of a register as the model has them.
const WORD: u64 = 4;

/// The wired interrupts. Each is an edge.
pub struct SmmuLines {
    /// The event queue is not empty.
    pub eventq: Box<dyn IrqLine>,
    /// The PRI queue is not empty.
    pub priq: Box<dyn IrqLine>,
    /// A CMD_SYNC completed.
    pub cmdq_sync: Box<dyn IrqLine>,
    /// A global error.
    pub gerror: Box<dyn IrqLine>,
}

impl SmmuWires for SmmuLines {
    fn pulse(&self, line: SmmuLine) {
        let line = match line {
            SmmuLine::Eventq => &self.eventq,
            SmmuLine::Priq => &self.priq,
            SmmuLine::CmdSync => &self.cmdq_sync,
            SmmuLine::Gerror => &self.gerror,
        };
        line.set(true);
        line.set(false);
    }

    /// The SMMU has no DeviceID at the ITS: its messages reach RAM only, where
    /// Linux waits for CMD_SYNC. Its interrupts are wired.
    fn message(&self, _address: Gpa, _data: u32) -> bool {
        false
    }
}

/// The register pages, for the memory bus.
pub struct SmmuRegisters(pub Arc<Smmu>);

impl BusDevice for SmmuRegisters {
    fn read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let lane = usize::try_from(at % WORD).unwrap_or(0);
            // Accesses are of one or two whole words (§6.2); anything else is
            // answered byte by byte.
            let word = self.0.read(at - at % WORD).to_le_bytes();
            *byte = word.get(lane).copied().unwrap_or(0);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Others than whole words are not permitted (§6.2) and do nothing.
        let (words, rest) = data.as_chunks::<4>();
        if !offset.is_multiple_of(WORD) || !rest.is_empty() {
            return;
        }
        for (at, word) in (offset..).step_by(4).zip(words) {
            self.0.write(at, u32::from_le_bytes(*word));
        }
    }
}

#[cfg(test)]
mod tests {
    use iommu::GuestRam;
    use iommu::smmuv3::SmmuConfig;
    use vm_memory::GuestAddress;

    use super::*;

    struct Unconnected;

    impl IrqLine for Unconnected {
        fn set(&self, _high: bool) {}
    }

    fn registers() -> SmmuRegisters {
        let lines = SmmuLines {
            eventq: Box::new(Unconnected),
            priq: Box::new(Unconnected),
            cmdq_sync: Box::new(Unconnected),
            gerror: Box::new(Unconnected),
        };
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let model = Smmu::new(SmmuConfig::default(), Arc::new(ram), Arc::new(lines));
        SmmuRegisters(Arc::new(model))
    }

    /// STRTAB_BASE, whose low word has reserved bits and whose high word has
    /// RA in bit 30.
    const STRTAB_BASE: u64 = 0x80;

    #[test]
    fn double_word_is_two_words() {
        let registers = registers();
        let value = 0x4000_0012_3456_7fc0_u64;
        registers.write(STRTAB_BASE, &value.to_le_bytes());
        let mut whole = [0; 8];
        registers.read(STRTAB_BASE, &mut whole);
        let mut high = [0; 4];
        registers.read(STRTAB_BASE + 4, &mut high);
        assert_eq!(u64::from_le_bytes(whole), value);
        assert_eq!(high, whole[4..]);
    }

    #[test]
    fn write_of_less_than_a_word_does_nothing() {
        let registers = registers();
        registers.write(STRTAB_BASE, &[0xff; 2]);
        registers.write(STRTAB_BASE + 2, &[0xff; 4]);
        let mut word = [0xff; 4];
        registers.read(STRTAB_BASE, &mut word);
        assert_eq!(word, [0; 4]);
    }
}
