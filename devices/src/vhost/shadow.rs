//! What the kernel's IOTLB of one vhost file holds, known without asking.
//!
//! `drivers/vhost/iotlb.c` keeps a list in the order of adding. A full list
//! drops its oldest entry for a new one, used or not; an invalidation deletes
//! every entry that it overlaps, a large one whole; an update looks at nothing
//! that is there. This is the same list, exact to the entry, as long as every
//! message goes through it. It holds no lock and sends nothing.

use std::collections::BTreeMap;

use iommu::{Hva, Iova, IovaRange, Perm};

/// Entries of a kernel IOTLB, where the module parameter says nothing else.
pub const DEFAULT_LIMIT: usize = 2048;

/// One translation as the kernel keeps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The addresses that it translates; never all of the address space.
    pub iova: IovaRange,
    /// Where the first of them lies in this process.
    pub hva: Hva,
    /// What the device may do there.
    pub perm: Perm,
}

impl Entry {
    /// Whether the two translate alike, whatever their extents.
    #[must_use]
    pub fn agrees_with(&self, other: &Self) -> bool {
        let offset = |entry: &Self| entry.hva.0.wrapping_sub(entry.iova.first().0);
        offset(self) == offset(other) && self.perm == other.perm
    }

    /// The part of the entry that lies in `range`.
    #[must_use]
    pub fn clipped(&self, range: IovaRange) -> Option<Self> {
        let iova = self.iova.intersection(range)?;
        let hva = self.hva.checked_add(iova.first().0 - self.iova.first().0)?;
        Some(Self { iova, hva, ..*self })
    }

    /// What remains of the entry without `gone`, which are sorted and do not
    /// touch: see [`merged`].
    pub fn without<'a>(&self, gone: &'a [IovaRange]) -> impl Iterator<Item = Self> + use<'a> {
        let entry = *self;
        let start = gone.partition_point(|range| range.last() < entry.iova.first());
        let gone = gone.get(start..).unwrap_or_default().iter();
        let gone = gone.take_while(move |range| range.first() <= entry.iova.last());
        // The parts before each range, and the one after the last.
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

/// The ranges in order, those that overlap or touch as one.
#[must_use]
pub fn merged(ranges: &[IovaRange]) -> Vec<IovaRange> {
    let mut sorted = ranges.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<IovaRange> = Vec::new();
    for range in sorted {
        match merged.last_mut() {
            // Nothing lies above a range that ends with the address space.
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

/// An entry, and the turns at which it was added. Most have one: a second copy
/// only wakes a queue.
#[derive(Debug)]
struct Held {
    entry: Entry,
    turns: Vec<u64>,
}

/// The list. Entries are the same as one another or do not overlap: whoever
/// sends an update that would overlap another sends an invalidation first.
#[derive(Debug)]
pub struct Shadow {
    limit: usize,
    turn: u64,
    order: BTreeMap<u64, Iova>,
    held: BTreeMap<Iova, Held>,
    /// Entries that were looked at, for the tests of bounds.
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

    /// How many entries the kernel holds, copies counted.
    #[must_use]
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether the kernel holds nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The entry that the next [`add`](Self::add) loses, if it loses one.
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

    /// The entries that overlap `range`, the lowest first.
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

    /// An update was sent.
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

    /// An invalidation of `range` was sent. Returns the entries that are gone,
    /// which may reach beyond the range.
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

    /// The kernel has a new, empty IOTLB.
    pub fn clear(&mut self) {
        self.order.clear();
        self.held.clear();
    }

    /// The fewest invalidations that take away what is held of `ranges` and
    /// touch no other entry: nothing for what is not held, one for neighbours
    /// and for ranges with nothing held between them. None is all of the
    /// address space.
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

    /// `low` and `high` (which does not begin below `low`) as one range, if
    /// nothing is held between them.
    fn merged_over_nothing(&self, low: IovaRange, high: IovaRange) -> Option<IovaRange> {
        let last = low.last().max(high.last());
        let merged = IovaRange::new(low.first(), last).ok()?;
        merged.size()?;
        let between = low.last().checked_add(1).and_then(|first| {
            let last = Iova(high.first().0.checked_sub(1)?);
            IovaRange::new(first, last).ok()
        });
        let mut in_between = between.into_iter().flat_map(|gap| self.overlapping(gap));
        // An entry that reaches into the gap and is going anyway is no loss.
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

/// A range as ranges whose length fits 64 bits.
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
