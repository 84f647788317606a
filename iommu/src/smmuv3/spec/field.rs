//! Structures of 64-bit little-endian words, and their fields.

use std::marker::PhantomData;

/// A structure of 64-bit words, in the byte order of this machine.
pub(crate) trait Raw: Copy {
    /// All words zero.
    const ZERO: Self;
    /// Bytes of the structure.
    const SIZE: u64;
    /// The words, in order.
    fn words(&self) -> &[u64];
    /// The words for modification, in order.
    fn words_mut(&mut self) -> &mut [u64];
}

macro_rules! raw {
    ($(#[$doc:meta])* $name:ident, $words:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) struct $name(pub(crate) [u64; $words]);

        impl $crate::smmuv3::spec::field::Raw for $name {
            const ZERO: Self = Self([0; $words]);
            const SIZE: u64 = 8 * $words;

            fn words(&self) -> &[u64] {
                &self.0
            }

            fn words_mut(&mut self) -> &mut [u64] {
                &mut self.0
            }
        }
    };
}
pub(super) use raw;

/// A field of the structure `T`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Field<T> {
    word: usize,
    low: u32,
    bits: u32,
    structure: PhantomData<T>,
}

impl<T: Raw> Field<T> {
    /// Bits `high` down to `low` of the structure, both inclusive and in the
    /// same 64-bit word.
    pub(super) const fn new(high: u32, low: u32) -> Self {
        assert!(high / 64 == low / 64 && high >= low);
        Self {
            word: (low / 64) as usize,
            low: low % 64,
            bits: high - low + 1,
            structure: PhantomData,
        }
    }

    const fn mask(self) -> u64 {
        u64::MAX >> (64 - self.bits)
    }

    fn word(self, raw: &T) -> u64 {
        raw.words().get(self.word).copied().unwrap_or(0)
    }

    /// The value of the field, shifted to bit 0.
    pub(crate) fn of(self, raw: &T) -> u64 {
        (self.word(raw) >> self.low) & self.mask()
    }

    /// The value of a field of at most 32 bits.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "used for fields of at most 32 bits, and asserted"
    )]
    pub(crate) fn of32(self, raw: &T) -> u32 {
        assert!(self.bits <= 32);
        self.of(raw) as u32
    }

    /// The value of a field of at most 16 bits.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "used for fields of at most 16 bits, and asserted"
    )]
    pub(crate) fn of16(self, raw: &T) -> u16 {
        assert!(self.bits <= 16);
        self.of(raw) as u16
    }

    /// Whether any bit of the field is set.
    pub(crate) fn is_set(self, raw: &T) -> bool {
        self.of(raw) != 0
    }

    /// The bits of the field at their position in the word, the others zero: for
    /// addresses.
    pub(crate) fn in_place(self, raw: &T) -> u64 {
        self.word(raw) & (self.mask() << self.low)
    }

    /// Sets the field to the low bits of `value`.
    pub(crate) fn put(self, raw: &mut T, value: u64) {
        let mask = self.mask() << self.low;
        if let Some(word) = raw.words_mut().get_mut(self.word) {
            *word = *word & !mask | (value << self.low) & mask;
        }
    }
}
