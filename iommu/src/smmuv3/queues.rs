//! Circular queues in guest memory (IHI 0070 §3.5).

use vm_memory::{Bytes as _, GuestAddress};

use super::registers::Registers;
use super::spec::queue;
use crate::GuestRam;

/// A queue by its registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Queue {
    base: u64,
    log2size: u32,
    entry: u64,
}

/// The producer cannot write now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unwritten {
    /// The queue is full.
    Full,
    /// The memory is not RAM.
    Abort,
}

impl Queue {
    /// The queue whose base register is at `base`, with entries of `entry`
    /// bytes. A size beyond what IDR1 says is cut to an index's 19 bits, an
    /// address to the SMMU's own size (§3.4.3).
    #[must_use]
    pub fn new(registers: &Registers, base: u64, entry: u64, address_bits: u32) -> Self {
        let value = registers.get64(base);
        let log2size = u32::try_from(value & queue::LOG2SIZE).unwrap_or(0).min(19);
        let size = entry << log2size;
        let reach = (1_u64 << address_bits) - 1;
        Self {
            base: value & queue::ADDRESS & reach & !(size - 1),
            log2size,
            entry,
        }
    }

    /// The bits of an index and its wrap bit.
    #[must_use]
    pub const fn mask(&self) -> u32 {
        (2 << self.log2size) - 1
    }

    /// How many entries lie between two indices.
    #[must_use]
    pub const fn used(&self, prod: u32, cons: u32) -> u32 {
        prod.wrapping_sub(cons) & self.mask()
    }

    /// The index after `index`, its other bits kept.
    #[must_use]
    pub const fn next(&self, index: u32) -> u32 {
        index & !queue::INDEX | index.wrapping_add(1) & self.mask()
    }

    const fn address(&self, index: u32) -> u64 {
        self.base + (index & (self.mask() >> 1)) as u64 * self.entry
    }

    /// Whether nothing more may be written.
    #[must_use]
    pub const fn is_full(&self, prod: u32, cons: u32) -> bool {
        self.used(prod, cons) >= 1 << self.log2size
    }

    /// A copy of the entry at `index`, or `None` outside of RAM.
    #[must_use]
    pub fn read<const N: usize>(&self, ram: &GuestRam, index: u32) -> Option<[u64; N]> {
        read_words(ram, self.address(index))
    }

    /// Writes the entry at `index`.
    ///
    /// # Errors
    /// [`Unwritten`].
    pub fn write<const N: usize>(
        &self,
        ram: &GuestRam,
        (prod, cons): (u32, u32),
        words: &[u64; N],
    ) -> Result<(), Unwritten> {
        if self.is_full(prod, cons) {
            return Err(Unwritten::Full);
        }
        let mut address = self.address(prod);
        for word in words {
            let bytes = word.to_le_bytes();
            ram.write_slice(&bytes, GuestAddress(address))
                .map_err(|_| Unwritten::Abort)?;
            address += 8;
        }
        Ok(())
    }
}

/// A copy of `N` words in guest memory, or `None` outside of RAM.
#[must_use]
pub fn read_words<const N: usize>(ram: &GuestRam, address: u64) -> Option<[u64; N]> {
    let mut words = [0; N];
    let mut next = address;
    for word in &mut words {
        let mut bytes = [0; 8];
        ram.read_slice(&mut bytes, GuestAddress(next)).ok()?;
        *word = u64::from_le_bytes(bytes);
        next = next.checked_add(8)?;
    }
    Some(words)
}
