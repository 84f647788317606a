//! Circular queues in guest memory (IHI 0070 §3.5).

use vm_memory::{Bytes as _, GuestMemoryBackend as _, VolatileMemory as _};

use super::registers::Registers;
use super::spec::command::RawCommand;
use super::spec::event::RawEvent;
use super::spec::pri::RawPageRequest;
use super::spec::{Raw, idr1, queue, reg};
use crate::addr::Gpa;
use crate::ram::GuestRam;

/// The registers of a queue, by their offsets, and the size of its entries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct QueueRegisters {
    base: u64,
    /// Producer index.
    pub prod: u64,
    /// Consumer index.
    pub cons: u64,
    /// Shift of the field of IDR1 with the largest LOG2SIZE.
    largest: u32,
    /// Bytes of an entry.
    entry: u64,
}

/// The command queue (§6.3.26 to §6.3.28).
pub(super) const CMDQ: QueueRegisters = QueueRegisters {
    base: reg::CMDQ_BASE,
    prod: reg::CMDQ_PROD,
    cons: reg::CMDQ_CONS,
    largest: idr1::CMDQS,
    entry: RawCommand::SIZE,
};

/// The event queue (§6.3.29 to §6.3.31).
pub(super) const EVENTQ: QueueRegisters = QueueRegisters {
    base: reg::EVENTQ_BASE,
    prod: reg::EVENTQ_PROD,
    cons: reg::EVENTQ_CONS,
    largest: idr1::EVENTQS,
    entry: RawEvent::SIZE,
};

/// The PRI queue (§6.3.35 to §6.3.37).
pub(super) const PRIQ: QueueRegisters = QueueRegisters {
    base: reg::PRIQ_BASE,
    prod: reg::PRIQ_PROD,
    cons: reg::PRIQ_CONS,
    largest: idr1::PRIQS,
    entry: RawPageRequest::SIZE,
};

/// Location and size of a queue, from its base register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Queue {
    base: u64,
    log2size: u32,
    entry: u64,
}

/// Error of a write to a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueueWriteError {
    /// The queue is full.
    Full,
    /// The memory is not RAM.
    Abort,
}

impl Queue {
    /// The queue that `of` describes. LOG2SIZE is capped at the value in IDR1
    /// (§6.3.26), the address cut to `address_bits`, the OAS (§3.4.3), and
    /// aligned to the larger of the capped size and 32 bytes.
    pub(super) fn new(registers: &Registers, of: &QueueRegisters, address_bits: u32) -> Self {
        let value = registers.get64(of.base);
        let largest = registers.get(reg::IDR1) >> of.largest & idr1::QUEUE_SIZE;
        let log2size = u32::try_from(value & queue::LOG2SIZE).unwrap_or(0);
        let log2size = log2size.min(largest);
        let size = of.entry << log2size;
        let reach = (1_u64 << address_bits) - 1;
        Self {
            base: value & queue::ADDRESS & reach & !(size - 1),
            log2size,
            entry: of.entry,
        }
    }

    /// Mask of an index including its wrap bit.
    pub(super) const fn mask(&self) -> u32 {
        (2 << self.log2size) - 1
    }

    /// Number of entries from `cons` to `prod`.
    pub(super) const fn used(&self, prod: u32, cons: u32) -> u32 {
        prod.wrapping_sub(cons) & self.mask()
    }

    /// The index after `index`; bits outside of the mask are unchanged.
    pub(super) const fn next(&self, index: u32) -> u32 {
        index & !queue::INDEX | index.wrapping_add(1) & self.mask()
    }

    const fn address(&self, index: u32) -> Gpa {
        Gpa(self.base + (index & (self.mask() >> 1)) as u64 * self.entry)
    }

    /// Whether no entry may be written.
    pub(super) const fn is_full(&self, prod: u32, cons: u32) -> bool {
        self.used(prod, cons) >= 1 << self.log2size
    }

    /// A copy of the entry at `index`, or `None` outside of RAM.
    pub(super) fn read<T: Raw>(&self, ram: &GuestRam, index: u32) -> Option<T> {
        read_raw(ram, self.address(index))
    }

    fn write<T: Raw>(&self, ram: &GuestRam, index: u32, entry: &T) -> Result<(), QueueWriteError> {
        let mut address = self.address(index);
        for word in entry.words() {
            let bytes = word.to_le_bytes();
            ram.write_slice(&bytes, address.into())
                .map_err(|_| QueueWriteError::Abort)?;
            address = address.checked_add(8).ok_or(QueueWriteError::Abort)?;
        }
        Ok(())
    }
}

/// A queue that the SMMU writes: the event or PRI queue.
#[derive(Clone, Copy, Debug)]
pub(super) struct Producer {
    registers: QueueRegisters,
    address_bits: u32,
}

impl Producer {
    /// The producer of the queue that `registers` describe, in memory of
    /// `address_bits` bits.
    pub(super) const fn new(registers: QueueRegisters, address_bits: u32) -> Self {
        Self {
            registers,
            address_bits,
        }
    }

    /// Whether no entry may be written until the guest consumes one.
    pub(super) fn is_full(&self, registers: &Registers) -> bool {
        let queue = Queue::new(registers, &self.registers, self.address_bits);
        let index = |register| registers.get(register);
        queue.is_full(index(self.registers.prod), index(self.registers.cons))
    }

    /// Writes an entry and advances PROD.
    ///
    /// # Errors
    /// [`QueueWriteError`]; PROD is unchanged.
    pub(super) fn push<T: Raw>(
        &self,
        registers: &mut Registers,
        ram: &GuestRam,
        entry: &T,
    ) -> Result<(), QueueWriteError> {
        let queue = Queue::new(registers, &self.registers, self.address_bits);
        let index = registers.get(self.registers.prod);
        if queue.is_full(index, registers.get(self.registers.cons)) {
            return Err(QueueWriteError::Full);
        }
        queue.write(ram, index, entry)?;
        registers.set(self.registers.prod, queue.next(index));
        Ok(())
    }

    /// Whether the guest has not acknowledged an overflow (§7.4, §8.1).
    pub(super) fn is_overflowing(&self, registers: &Registers) -> bool {
        let index = |register| registers.get(register);
        (index(self.registers.prod) ^ index(self.registers.cons)) & queue::OVERFLOW != 0
    }

    /// Marks that a record was discarded because the queue is full (OVFLG).
    pub(super) fn overflow(&self, registers: &mut Registers) {
        if !self.is_overflowing(registers) {
            let prod = registers.get(self.registers.prod) ^ queue::OVERFLOW;
            registers.set(self.registers.prod, prod);
        }
    }
}

/// A copy of a structure in guest memory, or `None` outside of RAM.
pub(super) fn read_raw<T: Raw>(ram: &GuestRam, address: Gpa) -> Option<T> {
    let mut raw = T::ZERO;
    let size = usize::try_from(T::SIZE).ok()?;
    let slice = ram.get_slice(address.into(), size).ok()?;
    for (word, offset) in raw.words_mut().iter_mut().zip((0..size).step_by(8)) {
        *word = u64::from_le(slice.get_ref(offset).ok()?.load());
    }
    Some(raw)
}
