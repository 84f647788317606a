//! An address space of device registers: port I/O, or memory-mapped I/O.
//!
//! A [`Bus`] maps ranges of addresses to devices. vCPU threads call
//! [`Bus::read`] and [`Bus::write`]; a lookup holds a read lock while it clones
//! an `Arc`, and no bus lock is held during the device's access. A device may
//! therefore move its own ranges (a BAR written through its own configuration
//! space) and may access the same bus again.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use iommu::lock::{LEAF, RankedRwLock};
use thiserror::Error;

/// Registers on a [`Bus`].
///
/// Methods take `&self`: several vCPUs call them at the same time, and each
/// device has its own interior lock, taken after and never around a bus lookup.
/// `offset` counts bytes from the start of the range the device was inserted
/// with, and `offset + data.len()` never exceeds that range's length.
///
/// Accesses come from the guest. An access that the device does not implement
/// reads as all ones (or zero, where its specification says so) and writes
/// nothing.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with the `data.len()` bytes at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// Writes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Bytes of a register in [`read_words`] and [`write_words`].
const WORD: u64 = 4;

/// Reads `data.len()` bytes at `offset` of registers that are little-endian
/// 32-bit words. `read` is called once for each word that the access touches,
/// in ascending order, with the word's offset in bytes: an aligned access of a
/// register's width is one read of the model, so it never mixes two values.
pub fn read_words(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u32) {
    for_lanes(offset, data.len(), |word, lanes, bytes| {
        let value = read(word).to_le_bytes();
        if let (Some(to), Some(from)) = (data.get_mut(bytes), value.get(lanes)) {
            to.copy_from_slice(from);
        }
    });
}

/// Writes `data` at `offset` of registers that are little-endian 32-bit words.
/// `write` is called once for each word that the access touches, in ascending
/// order, with the word's offset in bytes, the bytes at their position in the
/// word, and a mask of the bits that the access covers.
pub fn write_words(offset: u64, data: &[u8], mut write: impl FnMut(u64, u32, u32)) {
    for_lanes(offset, data.len(), |word, lanes, bytes| {
        let (mut value, mut mask) = ([0; 4], [0; 4]);
        if let (Some(to), Some(covered), Some(from)) = (
            value.get_mut(lanes.clone()),
            mask.get_mut(lanes),
            data.get(bytes),
        ) {
            to.copy_from_slice(from);
            covered.fill(0xff);
        }
        write(word, u32::from_le_bytes(value), u32::from_le_bytes(mask));
    });
}

/// Reads bytes of `image` at `offset`; bytes beyond it read as zeros.
pub(crate) fn read_image(image: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let bytes = image.get(start..).unwrap_or_default().iter();
    let bytes = bytes.chain(std::iter::repeat(&0));
    data.iter_mut()
        .zip(bytes)
        .for_each(|(to, &from)| *to = from);
}

/// Splits an access at the boundaries of words: calls `visit` with a word's
/// offset, the byte lanes of it that the access covers, and the range of these
/// bytes in the access.
fn for_lanes(offset: u64, len: usize, mut visit: impl FnMut(u64, Range<usize>, Range<usize>)) {
    let mut done = 0;
    let mut at = offset;
    while done < len {
        let first = usize::try_from(at % WORD).unwrap_or(0);
        let lanes = first..4.min(first + (len - done));
        let count = lanes.len();
        visit(at - at % WORD, lanes, done..done + count);
        done += count;
        // A range of a bus may end at the last address, where this wraps to 0.
        at = at.wrapping_add(count as u64);
    }
}

/// Error of a change of the bus's ranges.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum BusError {
    /// The length is zero, or the range goes beyond the last 64-bit address.
    #[error("bus range {base:#x} + {len:#x} is empty or goes beyond 64 bits")]
    Invalid {
        /// First address.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Another device has addresses in the range.
    #[error("bus range {base:#x} + {len:#x} overlaps the range at {other:#x}")]
    Overlap {
        /// First requested address.
        base: u64,
        /// Requested length in bytes.
        len: u64,
        /// First address of the range that overlaps.
        other: u64,
    },
    /// No range starts at this address.
    #[error("no bus range starts at {0:#x}")]
    Unknown(u64),
}

#[derive(Clone)]
struct Entry {
    /// Last address, inclusive.
    last: u64,
    device: Arc<dyn BusDevice>,
}

type Ranges = BTreeMap<u64, Entry>;

/// One address space of device registers. See the module documentation for
/// the locks.
#[derive(Default)]
pub struct Bus {
    ranges: RankedRwLock<Ranges, LEAF>,
}

impl Bus {
    /// An empty address space.
    pub fn new() -> Self {
        Self::default()
    }

    /// Maps `len` bytes that start at `base` to `device`.
    ///
    /// # Errors
    /// The range is invalid or overlaps another.
    pub fn insert(&self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let last = len
            .checked_sub(1)
            .and_then(|extent| base.checked_add(extent))
            .ok_or(BusError::Invalid { base, len })?;
        let mut ranges = self.ranges.write();
        // Ranges do not overlap each other, so only the one that starts last
        // at or before `last` can reach into the new one.
        if let Some((&other, entry)) = ranges.range(..=last).next_back()
            && entry.last >= base
        {
            return Err(BusError::Overlap { base, len, other });
        }
        ranges.insert(base, Entry { last, device });
        Ok(())
    }

    /// Removes the range that starts at `base`. An access that began earlier
    /// may still run in the device when this returns.
    ///
    /// # Errors
    /// No range starts at `base`.
    pub fn remove(&self, base: u64) -> Result<(), BusError> {
        let removed = self.ranges.write().remove(&base);
        removed.map(drop).ok_or(BusError::Unknown(base))
    }

    /// Reads `data.len()` bytes at `address`. Unmapped addresses, and accesses
    /// that exceed the range they start in, read as all ones. Returns whether a
    /// device was read.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Writes `data` at `address`. Ignored unless one range has all of the
    /// bytes. Returns whether a device was written.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let last = address.checked_add(u64::try_from(len).ok()?.checked_sub(1)?)?;
        let ranges = self.ranges.read();
        let (base, entry) = ranges.range(..=address).next_back()?;
        (last <= entry.last).then(|| (address - base, Arc::clone(&entry.device)))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Reads as its tag plus the offset; records writes.
    #[derive(Default)]
    struct Probe {
        tag: u8,
        written: Mutex<Vec<(u64, Vec<u8>)>>,
    }

    impl Probe {
        fn tagged(tag: u8) -> Arc<Self> {
            Arc::new(Self {
                tag,
                ..Self::default()
            })
        }
    }

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.tag + u8::try_from(offset).unwrap());
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.written.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn byte_at(bus: &Bus, address: u64) -> u8 {
        let mut data = [0];
        bus.read(address, &mut data);
        data[0]
    }

    #[test]
    fn an_access_reaches_the_device_that_owns_the_address() {
        let bus = Bus::new();
        let second = Probe::tagged(0x40);
        bus.insert(0x1000, 0x10, Probe::tagged(0x20)).unwrap();
        bus.insert(0x1010, 0x10, second.clone()).unwrap();
        assert_eq!(byte_at(&bus, 0x1000), 0x20);
        assert_eq!(byte_at(&bus, 0x100f), 0x2f);
        assert_eq!(byte_at(&bus, 0x1012), 0x42);
        assert!(bus.write(0x101c, &[1, 2, 3, 4]));
        assert_eq!(*second.written.lock().unwrap(), [(0xc, vec![1, 2, 3, 4])]);
    }

    /// The words of the tests: each is its offset in every byte.
    fn pattern(word: u64) -> u32 {
        u32::from_le_bytes([u8::try_from(word).unwrap(); 4])
    }

    #[test]
    fn each_word_that_an_access_touches_is_read_once() {
        for (offset, len, words) in [
            (8, 4, vec![8]),
            (8, 8, vec![8, 12]),
            (8, 1, vec![8]),
            (11, 1, vec![8]),
            (10, 2, vec![8]),
            (10, 4, vec![8, 12]),
            (11, 8, vec![8, 12, 16]),
        ] {
            let (mut data, mut seen) = (vec![0xee; len], Vec::new());
            read_words(offset, &mut data, |word| {
                seen.push(word);
                pattern(word)
            });
            assert_eq!(seen, words, "{len} bytes at {offset}");
            let bytes = (offset..)
                .take(len)
                .map(|at| pattern(at & !3).to_le_bytes()[0]);
            assert!(data.iter().copied().eq(bytes), "{data:?}");
        }
    }

    #[test]
    fn each_word_that_an_access_touches_is_written_once() {
        let mut seen = Vec::new();
        let mut take = |word, value, mask| seen.push((word, value, mask));
        write_words(8, &[1, 2, 3, 4], &mut take);
        write_words(6, &[1, 2, 3, 4], &mut take);
        write_words(0xd, &[7], &mut take);
        assert_eq!(
            seen,
            [
                (8, 0x0403_0201, u32::MAX),
                (4, 0x0201_0000, 0xffff_0000),
                (8, 0x0000_0403, 0x0000_ffff),
                (0xc, 0x0000_0700, 0x0000_ff00),
            ]
        );
    }

    #[test]
    fn unclaimed_and_straddling_reads_are_all_ones() {
        let bus = Bus::new();
        bus.insert(0x1000, 0x10, Probe::tagged(0)).unwrap();
        for address in [0, 0xfff, 0x100d, 0x1010, u64::MAX - 1] {
            let mut data = [0; 4];
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert_eq!(data, [0xff; 4], "{address:#x}");
            assert!(!bus.write(address, &data), "{address:#x}");
        }
    }

    #[test]
    fn overlapping_empty_and_wrapping_ranges_are_refused() {
        let bus = Bus::new();
        bus.insert(0x1000, 0x1000, Probe::tagged(0)).unwrap();
        for (base, len) in [(0x1000, 1), (0xfff, 2), (0x1fff, 0x1000), (0, 0x4000)] {
            assert_eq!(
                bus.insert(base, len, Probe::tagged(0)),
                Err(BusError::Overlap {
                    base,
                    len,
                    other: 0x1000
                })
            );
        }
        for (base, len) in [(0, 0), (u64::MAX, 2)] {
            assert_eq!(
                bus.insert(base, len, Probe::tagged(0)),
                Err(BusError::Invalid { base, len })
            );
        }
        bus.insert(u64::MAX, 1, Probe::tagged(7)).unwrap();
        assert_eq!(byte_at(&bus, u64::MAX), 7);
    }

    #[test]
    fn a_removed_range_reads_as_ones() {
        let bus = Bus::new();
        bus.insert(0x1000, 0x100, Probe::tagged(0x10)).unwrap();
        assert_eq!(byte_at(&bus, 0x1001), 0x11);
        bus.remove(0x1000).unwrap();
        assert_eq!(byte_at(&bus, 0x1001), 0xff);
        assert_eq!(bus.remove(0x1000), Err(BusError::Unknown(0x1000)));
    }

    #[test]
    fn a_device_may_move_itself_while_it_is_being_written() {
        struct Mover(Arc<Bus>);
        impl BusDevice for Mover {
            fn read(&self, _: u64, data: &mut [u8]) {
                data.fill(0x55);
            }
            fn write(&self, _: u64, _: &[u8]) {
                self.0.remove(0x1000).unwrap();
                self.0
                    .insert(0x9000, 4, Arc::new(Probe::default()))
                    .unwrap();
            }
        }
        let bus = Arc::new(Bus::new());
        bus.insert(0x1000, 4, Arc::new(Mover(bus.clone()))).unwrap();
        bus.write(0x1000, &[0]);
        assert_eq!((byte_at(&bus, 0x1000), byte_at(&bus, 0x9000)), (0xff, 0));
    }
}
