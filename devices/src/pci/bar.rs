//! Base address registers of a type 0 header (PCIe 6.0 §7.5.1.2.1).

use iommu::Gpa;

/// Number of base address registers; a 64-bit BAR occupies two.
const REGISTERS: usize = 6;
/// Offset of the first register in configuration space.
const FIRST: u16 = 0x10;
/// Bits 3:0 of a memory BAR's register: its kind, read-only.
const KIND: u32 = 0xf;
/// Bit of the kind of a 64-bit BAR.
const WIDE: u32 = 0b0100;

/// Address width of a memory BAR, and whether it is prefetchable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Below 2^32.
    Memory32 = 0b0000,
    /// Below 2^64; occupies the next register too.
    Memory64 = 0b0100,
    /// Below 2^32, prefetchable.
    Prefetchable32 = 0b1000,
    /// Below 2^64, prefetchable; occupies the next register too.
    Prefetchable64 = 0b1100,
}

/// Error of adding a BAR.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BarError {
    /// A register of the BAR belongs to another BAR, or there is none.
    #[error("BAR {0} does not exist or is taken")]
    Register(usize),
    /// The size or the address is not possible.
    #[error("BAR {index} cannot have {size:#x} bytes at {base}")]
    Extent {
        /// Number of the BAR.
        index: usize,
        /// Size in bytes.
        size: u64,
        /// First address.
        base: Gpa,
    },
}

/// Change of a BAR's address by a write to configuration space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarMove {
    /// Number of the BAR: that of its first register, 0 to 5.
    pub index: usize,
    /// Size in bytes.
    pub size: u64,
    /// The new address; `None` when the BAR is not decoded.
    pub to: Option<Gpa>,
}

#[derive(Clone, Copy, Debug)]
struct Bar {
    kind: BarKind,
    size: u64,
    /// Address after a reset.
    base: Gpa,
    /// Present address; `None` while the BAR is not decoded.
    decoded: Option<Gpa>,
}

impl Bar {
    /// Number of registers that it occupies.
    fn registers(&self) -> usize {
        if self.kind as u32 & WIDE == 0 { 1 } else { 2 }
    }
}

/// The BARs of one function, each at the index of its first register.
#[derive(Debug, Default)]
pub struct Bars([Option<Bar>; REGISTERS]);

impl Bars {
    /// Adds BAR `index` of `size` bytes, a power of two of at least 16. `base`,
    /// a multiple of the size, is its address after a reset.
    ///
    /// # Errors
    /// A register is taken, or size or address do not fit the kind.
    pub fn add(
        &mut self,
        index: usize,
        kind: BarKind,
        size: u64,
        base: Gpa,
    ) -> Result<(), BarError> {
        let bar = Bar {
            kind,
            size,
            base,
            decoded: None,
        };
        let end = index.saturating_add(bar.registers());
        let mut taken = self.0.iter().enumerate().filter_map(|(at, bar)| {
            let bar = bar.as_ref()?;
            Some(at..at + bar.registers())
        });
        if end > REGISTERS || taken.any(|other| other.start < end && index < other.end) {
            return Err(BarError::Register(index));
        }
        let max = u64::MAX >> (64 - 32 * bar.registers());
        let valid = size.is_power_of_two() && size > u64::from(KIND) && size <= max;
        if !valid || base.0 & (size - 1) != 0 || base.0 > max {
            return Err(BarError::Extent { index, size, base });
        }
        if let Some(free) = self.0.get_mut(index) {
            *free = Some(bar);
        }
        Ok(())
    }

    /// The registers after a reset: offset, value, and the bits that software
    /// can write. A write of ones therefore reads back as the size.
    pub(super) fn registers(&self) -> impl Iterator<Item = (u16, u32, u32)> {
        let bars = (FIRST..).step_by(4).zip(&self.0);
        bars.filter_map(|(at, bar)| Some((at, bar.as_ref()?)))
            .flat_map(|(at, bar)| {
                let (low, high) = halves(bar.base.0 | bar.kind as u64);
                let (low_mask, high_mask) = halves(!(bar.size - 1));
                let registers = [(at, low, low_mask & !KIND), (at + 4, high, high_mask)];
                registers.into_iter().take(bar.registers())
            })
    }

    /// The BARs whose address has changed since the last call. They are decoded
    /// while `enabled`, at the addresses in their registers; `word` reads one.
    pub(super) fn moves(&mut self, enabled: bool, word: impl Fn(u16) -> u32) -> Vec<BarMove> {
        let mut moves = Vec::new();
        for ((index, at), bar) in (0..).zip((FIRST..).step_by(4)).zip(&mut self.0) {
            let Some(bar) = bar else { continue };
            let high = if bar.registers() == 2 {
                word(at + 4)
            } else {
                0
            };
            let base = u64::from(word(at) & !KIND) | u64::from(high) << 32;
            let to = enabled.then_some(Gpa(base));
            if to != bar.decoded {
                bar.decoded = to;
                let size = bar.size;
                moves.push(BarMove { index, size, to });
            }
        }
        moves
    }
}

/// Splits a value into its low and high double word.
pub(crate) fn halves(value: u64) -> (u32, u32) {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    (
        u32::from_le_bytes([a, b, c, d]),
        u32::from_le_bytes([e, f, g, h]),
    )
}

#[cfg(test)]
mod tests;
