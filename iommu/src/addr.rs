//! A type per address space, so that the compiler rejects a mix-up.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! address {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(
            Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
        )]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The address `bytes` further on, or `None` beyond 2^64 - 1.
            #[must_use]
            pub const fn checked_add(self, bytes: u64) -> Option<Self> {
                match self.0.checked_add(bytes) {
                    Some(sum) => Some(Self(sum)),
                    None => None,
                }
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

address! {
    /// An I/O virtual address: the input of the IOMMU's translation.
    Iova
}
address! {
    /// A guest-physical address: the output of the IOMMU's translation.
    Gpa
}
address! {
    /// A virtual address of this process inside a mapping of guest RAM.
    Hva
}

impl From<Gpa> for vm_memory::GuestAddress {
    fn from(gpa: Gpa) -> Self {
        Self(gpa.0)
    }
}

/// Requester of a transaction, as its IOMMU sees it. For a PCI
/// function it is the requester ID: bus in bits 15:8, device in 7:3, function
/// in 2:0.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(transparent)]
pub struct StreamId(pub u32);

impl StreamId {
    /// The stream of PCI function `bus:device.function` on segment 0.
    #[must_use]
    pub const fn from_bdf(bus: u8, device: u8, function: u8) -> Self {
        Self((bus as u32) << 8 | ((device as u32) & 0x1f) << 3 | (function as u32) & 7)
    }
}

impl fmt::Display for StreamId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (bus, device, function) = (self.0 >> 8, (self.0 >> 3) & 0x1f, self.0 & 7);
        write!(f, "{bus:02x}:{device:02x}.{function}")
    }
}

/// Error for a range of zero bytes, or one that ends beyond 2^64 - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the range is empty or runs beyond 2^64 - 1")]
pub struct EmptyRange;

/// A range of I/O virtual addresses that is never empty. Both ends are
/// inclusive, so that the last byte of the address space can be named.
///
/// ```
/// use iommu::{Iova, IovaRange};
///
/// let page = IovaRange::from_len(Iova(0x1000), 0x1000)?;
/// assert_eq!(page.last(), Iova(0x1fff));
/// assert_eq!(IovaRange::block(Iova(0x1234), 12), page);
/// assert!(IovaRange::from_len(Iova(u64::MAX), 2).is_err());
/// # Ok::<(), iommu::EmptyRange>(())
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct IovaRange {
    first: Iova,
    last: Iova,
}

impl IovaRange {
    /// All 2^64 addresses.
    pub const ALL: Self = Self {
        first: Iova(0),
        last: Iova(u64::MAX),
    };

    /// The range from `first` to `last`, both inclusive.
    ///
    /// # Errors
    /// [`EmptyRange`] when `last` is below `first`.
    pub const fn new(first: Iova, last: Iova) -> Result<Self, EmptyRange> {
        if first.0 <= last.0 {
            Ok(Self { first, last })
        } else {
            Err(EmptyRange)
        }
    }

    /// The range of `bytes` bytes that starts at `first`.
    ///
    /// # Errors
    /// [`EmptyRange`] for zero bytes, or when the last byte would lie beyond
    /// 2^64 - 1.
    pub const fn from_len(first: Iova, bytes: u64) -> Result<Self, EmptyRange> {
        let Some(more) = bytes.checked_sub(1) else {
            return Err(EmptyRange);
        };
        match first.checked_add(more) {
            Some(last) => Ok(Self { first, last }),
            None => Err(EmptyRange),
        }
    }

    /// The naturally aligned block of `1 << shift` bytes that contains `iova`.
    /// A shift of 64 or more gives [`ALL`](Self::ALL).
    #[must_use]
    pub const fn block(iova: Iova, shift: u32) -> Self {
        if shift >= 64 {
            return Self::ALL;
        }
        let mask = (1_u64 << shift) - 1;
        Self {
            first: Iova(iova.0 & !mask),
            last: Iova(iova.0 | mask),
        }
    }

    /// The first address, inclusive.
    #[must_use]
    pub const fn first(self) -> Iova {
        self.first
    }

    /// The last address, inclusive.
    #[must_use]
    pub const fn last(self) -> Iova {
        self.last
    }

    /// The length in bytes minus one, which fits 64 bits for every range.
    #[must_use]
    pub const fn extent(self) -> u64 {
        self.last.0 - self.first.0
    }

    /// The length in bytes, or `None` for 2^64.
    #[must_use]
    pub const fn size(self) -> Option<u64> {
        self.extent().checked_add(1)
    }

    /// Whether `iova` is in the range, both ends included.
    #[must_use]
    pub const fn contains(self, iova: Iova) -> bool {
        self.first.0 <= iova.0 && iova.0 <= self.last.0
    }

    /// Whether every address of `other` is in the range.
    #[must_use]
    pub const fn covers(self, other: Self) -> bool {
        self.first.0 <= other.first.0 && other.last.0 <= self.last.0
    }

    /// Whether the two share an address.
    #[must_use]
    pub const fn overlaps(self, other: Self) -> bool {
        self.first.0 <= other.last.0 && other.first.0 <= self.last.0
    }

    /// Addresses that are in both, or `None` without a common one.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        Self::new(self.first.max(other.first), self.last.min(other.last)).ok()
    }

    /// The union, or `None` when they neither overlap nor are adjacent.
    #[must_use]
    pub fn joined(self, other: Self) -> Option<Self> {
        let (low, high) = if self.first <= other.first {
            (self, other)
        } else {
            (other, self)
        };
        let touches = match low.last.checked_add(1) {
            Some(next) => high.first <= next,
            None => true,
        };
        touches.then(|| Self {
            first: low.first,
            last: low.last.max(high.last),
        })
    }

    /// Appends the range to `ranges`, or joins it with the last one where they
    /// overlap or are adjacent.
    pub(crate) fn push_joined(self, ranges: &mut Vec<Self>) {
        match ranges
            .last_mut()
            .and_then(|last| Some((last.joined(self)?, last)))
        {
            Some((joined, last)) => *last = joined,
            None => ranges.push(self),
        }
    }
}

impl fmt::Debug for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}..={:#x}", self.first.0, self.last.0)
    }
}

impl fmt::Display for IovaRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn range(first: u64, last: u64) -> IovaRange {
        IovaRange::new(Iova(first), Iova(last)).unwrap()
    }

    #[test]
    fn length_that_is_zero_or_overflows_is_refused() {
        assert_eq!(IovaRange::from_len(Iova(5), 0), Err(EmptyRange));
        assert_eq!(IovaRange::from_len(Iova(2), u64::MAX), Err(EmptyRange));
        assert_eq!(
            IovaRange::from_len(Iova(1), u64::MAX),
            Ok(range(1, u64::MAX))
        );
    }

    #[test]
    fn whole_space_has_no_length_in_64_bits() {
        assert_eq!(IovaRange::ALL.size(), None);
        assert_eq!(IovaRange::block(Iova(77), 64), IovaRange::ALL);
    }

    #[test]
    fn adjacent_ranges_join_and_separate_ones_do_not() {
        assert_eq!(range(0, 9).joined(range(10, 19)), Some(range(0, 19)));
        assert_eq!(range(10, 19).joined(range(0, 8)), None);
        assert_eq!(range(5, u64::MAX).joined(range(0, 4)), Some(IovaRange::ALL));
    }

    proptest! {
        #[test]
        fn intersection_has_exactly_the_addresses_in_both(
            a in 0_u64..64, b in 0_u64..64, c in 0_u64..64, d in 0_u64..64, x in 0_u64..64,
        ) {
            let one = range(a.min(b), a.max(b));
            let two = range(c.min(d), c.max(d));
            let both = one.intersection(two);
            prop_assert_eq!(both.is_some(), one.overlaps(two));
            prop_assert_eq!(
                both.is_some_and(|r| r.contains(Iova(x))),
                one.contains(Iova(x)) && two.contains(Iova(x))
            );
        }
    }
}
