//! The SMMUv3's registers and interrupts (IHI 0070 §6, §3.18) around the model
//! of [`iommu::smmuv3`].
//!
//! A write of CMDQ_PROD executes the commands on the vCPU thread of the write,
//! so a driver finds CMDQ_CONS advanced at its first read.

use std::sync::Arc;

use iommu::Gpa;
use iommu::smmuv3::{Smmu, SmmuLine, SmmuWires};

use crate::bus::{BusDevice, read_words, write_words};
use crate::interrupt::IrqLine;
use crate::pause::{Deferral, Resumable};

/// The wired interrupts (§3.18). Each is edge-triggered.
pub struct SmmuLines {
    /// Event queue not empty.
    pub eventq: Box<dyn IrqLine>,
    /// PRI queue not empty.
    pub priq: Box<dyn IrqLine>,
    /// A CMD_SYNC completed.
    pub cmdq_sync: Box<dyn IrqLine>,
    /// A global error.
    pub gerror: Box<dyn IrqLine>,
    /// Interrupts the command queue for a pause.
    pub deferral: Deferral,
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

    /// Refuses the message: the SMMU has no DeviceID at the ITS. Its messages
    /// reach only RAM, where Linux polls for CMD_SYNC, and its interrupts are
    /// wired.
    fn message(&self, _address: Gpa, _data: u32) -> bool {
        false
    }

    fn interrupts(&self) -> bool {
        self.deferral.interrupts()
    }
}

/// Register pages 0 and 1 as a device on the memory bus.
pub struct SmmuRegisters(pub Arc<Smmu>);

impl Resumable for SmmuRegisters {
    fn resume(&self) {
        self.0.resume();
    }
}

impl BusDevice for SmmuRegisters {
    /// An aligned access of one or two words is one access to the model (§6.2).
    /// Other accesses are illegal: they read the bytes of the touched words.
    fn read(&self, offset: u64, data: &mut [u8]) {
        match <&mut [u8; 8]>::try_from(&mut *data) {
            Ok(both) if offset.is_multiple_of(8) => *both = self.0.read64(offset).to_le_bytes(),
            _ => read_words(offset, data, |word| self.0.read(word)),
        }
    }

    /// As for reads, but accesses other than whole words write nothing.
    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(both), true) = (<[u8; 8]>::try_from(data), offset.is_multiple_of(8)) {
            self.0.write64(offset, u64::from_le_bytes(both));
            return;
        }
        let whole = data.len().is_multiple_of(4) && offset.is_multiple_of(4);
        write_words(offset, data, |word, value, _| {
            if whole {
                self.0.write(word, value);
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::thread;

    use iommu::GuestRam;
    use iommu::smmuv3::SmmuConfig;
    use vm_memory::{Bytes as _, GuestAddress};

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
            deferral: Deferral::default(),
        };
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).unwrap();
        // All of RAM has CMD_SYNC commands without a signal.
        for entry in (0..RAM_SIZE as u64).step_by(16) {
            ram.write_obj(0x46_u64.to_le(), GuestAddress(entry))
                .unwrap();
        }
        let model = Smmu::new(SmmuConfig::default(), Arc::new(ram), Arc::new(lines));
        SmmuRegisters(Arc::new(model))
    }

    const RAM_SIZE: usize = 16 << QUEUE_LOG2;
    /// The largest queue that IDR1 allows.
    const QUEUE_LOG2: u32 = 12;
    const CR0: u64 = 0x20;
    const CR0_CMDQEN: u32 = 1 << 3;
    const CMDQ_BASE: u64 = 0x90;
    const CMDQ_PROD: u64 = 0x98;
    const CMDQ_CONS: u64 = 0x9c;

    fn word(registers: &SmmuRegisters, offset: u64) -> u32 {
        let mut data = [0; 4];
        registers.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set_word(registers: &SmmuRegisters, offset: u64, value: u32) {
        registers.write(offset, &value.to_le_bytes());
    }

    /// Reads CMDQ_CONS until `done`. Returns how often it decreased.
    fn steps_back(registers: &SmmuRegisters, done: &AtomicBool) -> usize {
        let (mut last, mut back) = (0, 0);
        while !done.load(Ordering::Acquire) {
            let cons = word(registers, CMDQ_CONS);
            back += usize::from(cons < last);
            last = cons;
        }
        back
    }

    #[test]
    fn consumer_index_read_during_a_drain_never_goes_back() {
        const ROUNDS: usize = 50;
        let registers = registers();
        let start = Barrier::new(2);
        let end = Barrier::new(2);
        let done = AtomicBool::new(false);
        let back: usize = thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let round = |_| {
                    start.wait();
                    let back = steps_back(&registers, &done);
                    end.wait();
                    back
                };
                (0..ROUNDS).map(round).sum()
            });
            for _ in 0..ROUNDS {
                // An empty queue at index 0: the indices of a round do not wrap.
                set_word(&registers, CR0, 0);
                set_word(&registers, CMDQ_BASE, QUEUE_LOG2);
                set_word(&registers, CMDQ_PROD, 0);
                set_word(&registers, CMDQ_CONS, 0);
                set_word(&registers, CR0, CR0_CMDQEN);
                done.store(false, Ordering::Release);
                start.wait();
                set_word(&registers, CMDQ_PROD, 1 << QUEUE_LOG2);
                done.store(true, Ordering::Release);
                end.wait();
                assert_eq!(word(&registers, CMDQ_CONS), 1 << QUEUE_LOG2);
            }
            reader.join().unwrap()
        });
        assert_eq!(back, 0);
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
