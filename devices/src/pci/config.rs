//! Configuration space from tables (PCIe 6.0 §7.5): each double word has a value
//! and a mask of the bits that software can write. Accesses of any size are
//! split into words by the bus.

use std::ops::Range;

use super::bar::{BarMove, Bars};
use crate::bus::{read_words, write_words};

/// Bytes of a function's configuration space.
pub(super) const SIZE: u16 = 4096;
const WORDS: usize = SIZE as usize / 4;
/// Offset of the first extended capability (§7.6).
const EXTENDED: u16 = 0x100;
/// Registers of the type 0 header (§7.5.1).
const COMMAND: u16 = 0x04;
const CAPABILITIES: u16 = 0x34;
const FIRST_CAPABILITY: u16 = 0x40;
/// Command bits: memory space enable, bus master enable, INTx disable.
const MEMORY_SPACE: u32 = 1 << 1;
const BUS_MASTER: u32 = 1 << 2;
const INTX_DISABLE: u32 = 1 << 10;
/// Status bit: the list of capabilities exists.
const CAPABILITY_LIST: u32 = 1 << 20;

/// Identification registers of a function (§7.5.1).
#[derive(Clone, Copy, Debug)]
pub struct Ids {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Class, subclass and programming interface in bits 23:0.
    pub class: u32,
    /// Revision ID.
    pub revision: u8,
    /// Subsystem vendor ID.
    pub subsystem_vendor: u16,
    /// Subsystem ID.
    pub subsystem: u16,
}

/// The configuration space of one function.
#[derive(Debug)]
pub struct ConfigSpace {
    values: Box<[u32; WORDS]>,
    writable: Box<[u32; WORDS]>,
    /// Values after a reset.
    initial: Box<[u32; WORDS]>,
    bars: Bars,
    next_capability: u16,
    last_capability: u16,
    next_extended: u16,
    last_extended: Option<u16>,
}

impl ConfigSpace {
    /// A type 0 header with `bars` and without capabilities.
    #[must_use]
    pub fn new(ids: &Ids, bars: Bars) -> Self {
        let mut space = Self {
            values: Box::new([0; WORDS]),
            writable: Box::new([0; WORDS]),
            initial: Box::new([0; WORDS]),
            bars: Bars::default(),
            next_capability: FIRST_CAPABILITY,
            last_capability: CAPABILITIES,
            next_extended: EXTENDED,
            last_extended: None,
        };
        let word = |low: u16, high: u16| u32::from(low) | u32::from(high) << 16;
        space.set(0x00, word(ids.vendor, ids.device), 0);
        space.set(COMMAND, 0, MEMORY_SPACE | BUS_MASTER | INTX_DISABLE);
        space.set(0x08, u32::from(ids.revision) | ids.class << 8, 0);
        // The cache line size has no effect on the function (§7.5.1.1.7).
        space.set(0x0c, 0, 0xff);
        space.set(0x2c, word(ids.subsystem_vendor, ids.subsystem), 0);
        // The interrupt line has no effect on the function (§7.5.1.1.12).
        space.set(0x3c, 0, 0xff);
        for (at, value, writable) in bars.registers() {
            space.set(at, value, writable);
        }
        space.bars = bars;
        space
    }

    /// Adds a capability (§7.5.3): its bytes after the two-byte header, and the
    /// mask of bits that software can write. Returns the offset of its header.
    ///
    /// # Panics
    /// When it does not fit: the capabilities of a function are fixed.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> u16 {
        let at = self.next_capability;
        let len = u16::try_from(body.len() + 2).expect("a capability is short");
        assert!(at + len <= EXTENDED, "no room for capability {id:#x}");
        let link = if self.last_capability == CAPABILITIES {
            self.set_bits(COMMAND, CAPABILITY_LIST);
            CAPABILITIES
        } else {
            self.last_capability + 1
        };
        let [low, _] = at.to_le_bytes();
        self.init(link, &[low], &[0]);
        self.init(at, &[id, 0], &[0, 0]);
        self.init(at + 2, body, writable);
        self.last_capability = at;
        self.next_capability = (at + len).next_multiple_of(4);
        at
    }

    /// Adds an extended capability (§7.6.3): its double words after the header,
    /// each with the mask of bits that software can write. Returns the offset
    /// of its header.
    ///
    /// # Panics
    /// When it does not fit.
    pub fn add_extended_capability(&mut self, id: u16, version: u8, body: &[(u32, u32)]) -> u16 {
        let at = self.next_extended;
        if let Some(last) = self.last_extended {
            self.set_bits(last, u32::from(at) << 20);
        }
        self.set(at, u32::from(id) | u32::from(version) << 16, 0);
        let mut next = at + 4;
        for &(value, writable) in body {
            self.set(next, value, writable);
            next += 4;
        }
        self.last_extended = Some(at);
        self.next_extended = next;
        at
    }

    /// Restores the values after a reset.
    pub fn reset(&mut self) {
        self.values.copy_from_slice(&*self.initial);
    }

    /// Reads at `offset` bytes; bytes beyond the space read as ones.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        read_words(offset.into(), data, |at| {
            let value = index(at).and_then(|at| self.values.get(at));
            value.copied().unwrap_or(u32::MAX)
        });
    }

    /// Writes at `offset` bytes; read-only bits and bytes beyond the space are
    /// ignored.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        write_words(offset.into(), data, |at, new, covered| {
            let word = index(at);
            if let (Some(value), Some(mask)) = (
                word.and_then(|at| self.values.get_mut(at)),
                word.and_then(|at| self.writable.get(at)),
            ) {
                let mask = mask & covered;
                *value = *value & !mask | new & mask;
            }
        });
    }

    /// The offsets of the double words that an access touches.
    #[must_use]
    pub fn words_of(offset: u16, len: usize) -> Range<u16> {
        let end = usize::from(offset).saturating_add(len).next_multiple_of(4);
        let end = u16::try_from(end).unwrap_or(SIZE).min(SIZE);
        (offset & !3).min(end)..end
    }

    /// The offsets of all double words.
    #[must_use]
    pub const fn all_words() -> Range<u16> {
        0..SIZE
    }

    /// The double word at `offset`, a multiple of 4.
    #[must_use]
    pub fn word(&self, offset: u16) -> u32 {
        word_of(&self.values, offset)
    }

    /// The changes of the BARs' addresses since the last call. A BAR is decoded
    /// while memory space is enabled.
    #[must_use]
    pub fn bar_moves(&mut self) -> Vec<BarMove> {
        let values = &self.values;
        let word = |at| word_of(values, at);
        self.bars.moves(word(COMMAND) & MEMORY_SPACE != 0, word)
    }

    /// Whether the function may access memory and send MSIs (bus master
    /// enable).
    #[must_use]
    pub fn bus_master(&self) -> bool {
        self.word(COMMAND) & BUS_MASTER != 0
    }

    fn init(&mut self, offset: u16, bytes: &[u8], writable: &[u8]) {
        let bytes = bytes.iter().zip(writable);
        for (at, (&byte, &mask)) in (usize::from(offset)..).zip(bytes) {
            let shift = 8 * (at % 4);
            if let (Some(value), Some(mask_word)) =
                (self.values.get_mut(at / 4), self.writable.get_mut(at / 4))
            {
                *value = *value & !(0xff << shift) | u32::from(byte) << shift;
                *mask_word |= u32::from(mask) << shift;
            }
        }
        self.initial.copy_from_slice(&*self.values);
    }

    fn set(&mut self, offset: u16, value: u32, writable: u32) {
        self.init(offset, &value.to_le_bytes(), &writable.to_le_bytes());
    }

    fn set_bits(&mut self, offset: u16, bits: u32) {
        if let Some(value) = self.values.get_mut(usize::from(offset) / 4) {
            *value |= bits;
        }
        self.initial.copy_from_slice(&*self.values);
    }
}

fn word_of(values: &[u32; WORDS], offset: u16) -> u32 {
    let word = values.get(usize::from(offset) / 4);
    word.copied().unwrap_or(u32::MAX)
}

/// The index of the double word at `offset` bytes.
fn index(offset: u64) -> Option<usize> {
    usize::try_from(offset / 4).ok()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use iommu::Gpa;

    use super::super::bar::BarKind;
    use super::*;

    const BAR0: u16 = 0x10;
    const IDS: Ids = Ids {
        vendor: 0x1af4,
        device: 0x1041,
        class: 0x02_0000,
        revision: 1,
        subsystem_vendor: 0x1af4,
        subsystem: 0x40,
    };

    fn space() -> ConfigSpace {
        let mut bars = Bars::default();
        bars.add(0, BarKind::Prefetchable64, 0x8000, Gpa(0x40_0000_0000))
            .unwrap();
        ConfigSpace::new(&IDS, bars)
    }

    #[test]
    fn identity_cannot_be_written() {
        let mut space = space();
        space.write(0, &[0xff; 4]);
        assert_eq!(space.word(0), 0x1041_1af4);
    }

    #[test]
    fn bar_is_sized_and_moved() {
        let mut space = space();
        assert_eq!(space.bar_moves(), [], "memory space is off at first");
        space.write(BAR0, &[0xff; 8]);
        assert_eq!(space.word(BAR0), 0xffff_800c);
        assert_eq!(space.word(BAR0 + 4), 0xffff_ffff);
        space.write(BAR0, &0x41_0000_0000_u64.to_le_bytes());
        space.write(COMMAND, &[2]);
        let moved = BarMove {
            index: 0,
            size: 0x8000,
            to: Some(Gpa(0x41_0000_0000)),
        };
        assert_eq!(space.bar_moves(), [moved]);
    }

    #[test]
    fn capabilities_are_a_list() {
        let mut space = space();
        let first = space.add_capability(0x11, &[0; 10], &[0; 10]);
        let second = space.add_capability(0x09, &[14; 14], &[0; 14]);
        assert_eq!(space.word(COMMAND) & CAPABILITY_LIST, CAPABILITY_LIST);
        assert_eq!(space.word(CAPABILITIES), u32::from(first));
        assert_eq!(space.word(first) & 0xffff, 0x11 | u32::from(second) << 8);
        assert_eq!(space.word(second) & 0xffff, 0x09);
        let ats = space.add_extended_capability(0x0f, 1, &[(0x20, 0x8000_0000)]);
        assert_eq!(space.word(ats), 0x0001_000f);
    }

    proptest! {
        #[test]
        fn access_in_pieces_is_the_access(
            offset in 0_u16..4096, value in any::<u32>(), cut in 1_usize..4,
        ) {
            let (mut whole, mut pieces) = (space(), space());
            let bytes = value.to_le_bytes();
            whole.write(offset, &bytes);
            pieces.write(offset, &bytes[..cut]);
            pieces.write(offset + u16::try_from(cut).unwrap(), &bytes[cut..]);
            prop_assert_eq!(whole.values, pieces.values);
        }
    }
}
