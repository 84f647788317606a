//! A copy of the kernel's IOTLB of one vhost file.
//!
//! `drivers/vhost/iotlb.c` has a list in the order of insertion. A full list
//! drops its oldest entry for a new one; an invalidation deletes every entry
//! that it overlaps as a whole; an update does not check existing entries. The
//! shadow equals this list as long as every message is applied to it. It has no
//! lock and sends no message.

use std::collections::BTreeMap;

use iommu::{Hva, Iova, IovaRange, Perm};

/// Entries of a kernel IOTLB: the default of the module parameter.
pub const DEFAULT_LIMIT: usize = 2048;

/// One translation of the kernel's IOTLB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// I/O virtual addresses, both ends inclusive; never all 2^64.
    pub iova: IovaRange,
    /// Virtual address in this process of the first address.
    pub hva: Hva,
    /// Accesses that the device may make.
    pub perm: Perm,
}

impl Entry {
    /// Whether the two have the same offset and permission; their ranges may
    /// differ.
    #[must_use]
    pub fn agrees_with(&self, other: &Self) -> bool {
        let offset = |entry: &Self| entry.hva.0.wrapping_sub(entry.iova.first().0);
        offset(self) == offset(other) && self.perm == other.perm
    }

    /// The part of the entry in `range`, or `None` when they do not overlap.
    #[must_use]
    pub fn clipped(&self, range: IovaRange) -> Option<Self> {
        let iova = self.iova.intersection(range)?;
        let hva = self.hva.checked_add(iova.first().0 - self.iova.first().0)?;
        Some(Self { iova, hva, ..*self })
    }

    /// The parts of the entry outside of `gone`, which must be sorted and not
    /// adjacent: see [`merged`].
    pub fn without<'a>(&self, gone: &'a [IovaRange]) -> impl Iterator<Item = Self> + use<'a> {
        let entry = *self;
        let start = gone.partition_point(|range| range.last() < entry.iova.first());
        let gone = gone.get(start..).unwrap_or_default().iter();
        let gone = gone.take_while(move |range| range.first() <= entry.iova.last());
        // The parts below each range, and the one above the last.
        let mut from = Some(entry.iova.first());
        let before = gone.map(Some).chain([None]).map(move |range| {
            let first = from?;
            let last = match range {
                Some(range) => {
                    from = range.last().checked_add(1);
                    range.first().0.checked_sub(1).map(Iova)?
                }
                None => entry.iova.last(),
            };
            entry.clipped(IovaRange::new(first, last).ok()?)
        });
        before.flatten()
    }
}

/// The ranges in ascending order, with overlapping and adjacent ones joined.
#[must_use]
pub fn merged(ranges: &[IovaRange]) -> Vec<IovaRange> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<IovaRange> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            // No range is above one that ends with the address space.
            Some(last)
                if last
                    .last()
                    .checked_add(1)
                    .is_none_or(|next| range.first() <= next) =>
            {
                let end = last.last().max(range.last());
                *last = IovaRange::new(last.first(), end).unwrap_or(*last);
            }
            _ => merged.push(range),
        }
    }
    merged
}

/// An entry and its insertion numbers. Most entries have one: a second copy is
/// sent only to wake a queue.
#[derive(Debug)]
struct Held {
    entry: Entry,
    turns: Vec<u64>,
}

/// The list. Two entries are equal or do not overlap: the sender invalidates an
/// overlapping entry before an update.
#[derive(Debug)]
pub struct Shadow {
    limit: usize,
    turn: u64,
    order: BTreeMap<u64, Iova>,
    held: BTreeMap<Iova, Held>,
    /// Number of entries that were read, for the tests of bounds.
    #[cfg(test)]
    pub looks: std::cell::Cell<usize>,
}

impl Shadow {
    /// An empty IOTLB of at most `limit` entries; 0 is no limit, as in the
    /// kernel.
    #[must_use]
    pub fn new(limit: usize) -> Self {
        Self {
            limit,
            turn: 0,
            order: BTreeMap::new(),
            held: BTreeMap::new(),
            #[cfg(test)]
            looks: std::cell::Cell::new(0),
        }
    }

    fn count_look(&self) {
        #[cfg(test)]
        self.looks.set(self.looks.get() + 1);
    }

    /// Number of entries in the kernel, copies included.
    #[must_use]
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether the kernel has no entry.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The entry that the next [`add`](Self::add) drops; `None` when there is
    /// room or a copy of it remains.
    #[must_use]
    pub fn next_victim(&self) -> Option<Entry> {
        if self.limit == 0 || self.order.len() < self.limit {
            return None;
        }
        let (_, first) = self.order.first_key_value()?;
        let held = self.held.get(first)?;
        (held.turns.len() == 1).then_some(held.entry)
    }

    /// The entry that translates `iova`.
    #[must_use]
    pub fn holder(&self, iova: Iova) -> Option<Entry> {
        self.count_look();
        let (_, held) = self.held.range(..=iova).next_back()?;
        held.entry.iova.contains(iova).then_some(held.entry)
    }

    /// The entries that overlap `range`, in ascending order.
    pub fn overlapping(&self, range: IovaRange) -> impl Iterator<Item = Entry> + '_ {
        let first = self.holder(range.first());
        let first = first.map_or(range.first(), |entry| entry.iova.first());
        let held = self.held.range(first..=range.last());
        held.map(|(_, held)| {
            self.count_look();
            held.entry
        })
    }

    /// Whether any entry overlaps `range`.
    #[must_use]
    pub fn overlaps(&self, range: IovaRange) -> bool {
        self.overlapping(range).next().is_some()
    }

    /// Applies an update that was sent.
    pub fn add(&mut self, entry: Entry) {
        debug_assert!(self.overlapping(entry.iova).all(|held| held == entry));
        if self.limit != 0 && self.order.len() >= self.limit {
            self.drop_oldest();
        }
        self.order.insert(self.turn, entry.iova.first());
        let held = self.held.entry(entry.iova.first()).or_insert_with(|| Held {
            entry,
            turns: Vec::new(),
        });
        held.turns.push(self.turn);
        self.turn += 1;
    }

    /// Applies an invalidation of `range` that was sent. Returns the removed
    /// entries, which may exceed the range.
    pub fn remove(&mut self, range: IovaRange) -> Vec<Entry> {
        let gone: Vec<_> = self.overlapping(range).collect();
        for entry in &gone {
            if let Some(held) = self.held.remove(&entry.iova.first()) {
                for turn in held.turns {
                    self.order.remove(&turn);
                }
            }
        }
        gone
    }

    /// Removes every entry: the kernel has a new IOTLB.
    pub fn clear(&mut self) {
        self.order.clear();
        self.held.clear();
    }

    /// The fewest invalidations that remove the entries in `ranges` and no
    /// others: none for a range without entries, one for adjacent ranges and
    /// for ranges without entries between them. None of them has 2^64 bytes.
    #[must_use]
    pub fn invalidations(&self, ranges: &[IovaRange]) -> Vec<IovaRange> {
        let mut ranges = ranges.to_vec();
        ranges.sort_unstable();
        let mut messages: Vec<IovaRange> = Vec::new();
        for range in ranges.into_iter().flat_map(halves) {
            if !self.overlaps(range) {
                continue;
            }
            let merged = messages
                .last()
                .and_then(|last| self.merged_over_nothing(*last, range));
            match (messages.last_mut(), merged) {
                (Some(last), Some(merged)) => *last = merged,
                _ => messages.push(range),
            }
        }
        messages
    }

    /// `low` and `high` (which does not begin below `low`) as one range, if no
    /// other entry is between them.
    fn merged_over_nothing(&self, low: IovaRange, high: IovaRange) -> Option<IovaRange> {
        let last = low.last().max(high.last());
        let merged = IovaRange::new(low.first(), last).ok()?;
        merged.size()?;
        let between = low.last().checked_add(1).and_then(|first| {
            let last = Iova(high.first().0.checked_sub(1)?);
            IovaRange::new(first, last).ok()
        });
        let mut in_between = between.into_iter().flat_map(|gap| self.overlapping(gap));
        // An entry that overlaps `low` or `high` is removed anyway.
        in_between
            .all(|entry| entry.iova.overlaps(low) || entry.iova.overlaps(high))
            .then_some(merged)
    }

    fn drop_oldest(&mut self) {
        let Some((turn, first)) = self.order.pop_first() else {
            return;
        };
        if let Some(held) = self.held.get_mut(&first) {
            held.turns.retain(|&kept| kept != turn);
            if held.turns.is_empty() {
                self.held.remove(&first);
            }
        }
    }

    /// The entries in the kernel's order, copies included.
    #[cfg(test)]
    pub fn in_order(&self) -> Vec<Entry> {
        let first = self.order.values();
        first.map(|first| self.held[first].entry).collect()
    }
}

/// Splits a range into ranges whose length fits 64 bits.
fn halves(range: IovaRange) -> impl Iterator<Item = IovaRange> {
    const MIDDLE: u64 = 1 << 63;
    let (low, high) = if range.size().is_some() {
        (Some(range), None)
    } else {
        (
            IovaRange::new(Iova(0), Iova(MIDDLE - 1)).ok(),
            IovaRange::new(Iova(MIDDLE), Iova(u64::MAX)).ok(),
        )
    };
    low.into_iter().chain(high)
}

#[cfg(test)]
mod tests;
