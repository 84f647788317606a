//! The mappings of a domain, each as the driver created it.
//!
//! A tree has chunks of up to `CHUNK` sorted mappings, by the lowest address
//! that each chunk may have. An insertion or removal moves the mappings of one
//! chunk; the removal of a range removes whole chunks. A mapping costs 32 bytes
//! in a full chunk. Chunks between the first and the last are at least 3/8
//! full, so a mapping costs at most 87 bytes. Empty chunks are freed later, a
//! bounded number at a time.

use std::collections::BTreeMap;
use std::ops::Bound::{Excluded, Included, Unbounded};

use super::spec::Status;
use crate::addr::{Iova, IovaRange};
use crate::mapping::Mapping;

/// Mappings that do not overlap, in the order of their addresses.
#[derive(Clone, Debug, Default)]
pub(super) struct Mappings<const CHUNK: usize = 128> {
    /// Chunks by the lowest address at which a mapping of the chunk may start:
    /// a chunk ends where the next one begins. The first key is 0, and only its
    /// chunk may be empty.
    chunks: BTreeMap<Iova, Vec<Mapping>>,
    len: usize,
}

/// Chunks whose mappings are removed and whose memory is not yet freed. Freeing
/// 2^20 mappings takes longer than a request may.
#[derive(Debug, Default)]
pub(super) struct Removed {
    chunks: Vec<Vec<Mapping>>,
    len: usize,
}

impl Removed {
    /// Number of mappings whose memory is not yet freed.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Frees up to `count` chunks.
    pub(super) fn free(&mut self, count: usize) {
        let kept = self.chunks.len().saturating_sub(count);
        for chunk in self.chunks.drain(kept..) {
            self.len -= chunk.len();
        }
        if kept == 0 {
            self.chunks = Vec::new();
        }
    }

    fn push(&mut self, chunk: Vec<Mapping>) {
        self.len += chunk.len();
        self.chunks.push(chunk);
    }
}

/// Number of mappings of a chunk that start at or below `iova`.
fn count_up_to(chunk: &[Mapping], iova: Iova) -> usize {
    chunk.partition_point(|mapping| mapping.iova.first() <= iova)
}

/// Number of mappings of a chunk that start below `iova`.
fn count_below(chunk: &[Mapping], iova: Iova) -> usize {
    chunk.partition_point(|mapping| mapping.iova.first() < iova)
}

/// Inserts into a chunk that is not full. The capacity doubles, up to `CHUNK`.
fn put<const CHUNK: usize>(chunk: &mut Vec<Mapping>, at: usize, mapping: Mapping) {
    let len = chunk.len();
    if len == chunk.capacity() {
        chunk.reserve_exact(len.max(4).min(CHUNK.saturating_sub(len)));
    }
    chunk.insert(at, mapping);
}

impl<const CHUNK: usize> Mappings<CHUNK> {
    /// Minimum length: shorter chunks are joined with a neighbour.
    const LEAST: usize = CHUNK * 3 / 8;
    /// Maximum length after joining two chunks. Half of a longer one is not
    /// shorter than `LEAST`.
    const JOINED: usize = CHUNK * 3 / 4;

    /// Number of mappings.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The mapping that contains `iova`.
    pub(super) fn find(&self, iova: Iova) -> Option<Mapping> {
        self.last_up_to(iova)
            .filter(|mapping| mapping.iova.contains(iova))
            .copied()
    }

    /// Adds a mapping (§5.13.6.5.2).
    ///
    /// # Errors
    /// `INVAL`: it overlaps another mapping.
    pub(super) fn insert(&mut self, mapping: Mapping) -> Result<(), Status> {
        let iova = mapping.iova;
        let below = self.last_up_to(iova.last());
        if below.is_some_and(|below| below.iova.last() >= iova.first()) {
            return Err(Status::Inval);
        }
        match self.chunks.range_mut(..=iova.first()).next_back() {
            Some((_, chunk)) if chunk.len() < CHUNK => {
                put::<CHUNK>(chunk, count_below(chunk, iova.first()), mapping);
            }
            Some((&key, _)) => self.insert_into_full(key, mapping),
            None => {
                self.chunks.insert(Iova(0), vec![mapping]);
            }
        }
        self.len += 1;
        Ok(())
    }

    /// Removes every mapping in `range` (§5.13.6.6.2). Returns their number;
    /// the memory of whole chunks goes to `removed`.
    ///
    /// # Errors
    /// `RANGE`: the range would split a mapping; none is removed.
    pub(super) fn remove(
        &mut self,
        range: IovaRange,
        removed: &mut Removed,
    ) -> Result<usize, Status> {
        let (first, last) = (range.first(), range.last());
        let Some(highest) = self.last_up_to(last).map(|mapping| mapping.iova) else {
            return Ok(0);
        };
        if highest.last() < first {
            return Ok(0);
        }
        let reaches_in = |below: u64| self.find(Iova(below)).filter(|m| m.iova.last() >= first);
        let below = first.0.checked_sub(1).filter(|_| highest.first() != first);
        if highest.last() > last || below.and_then(reaches_in).is_some() {
            return Err(Status::Range);
        }
        let before = self.len;
        let Some((&lowest, chunk)) = self.chunks.range_mut(..=first).next_back() else {
            return Ok(0);
        };
        let inside = count_below(chunk, first)..count_up_to(chunk, last);
        let goes_on = inside.end == chunk.len();
        self.len -= chunk.drain(inside).len();
        let is_short = chunk.len() < Self::LEAST;
        if goes_on {
            self.remove_chunks(lowest, last, removed);
        }
        if is_short {
            self.refill(lowest);
        }
        Ok(before - self.len)
    }

    /// Moves the memory of all mappings to `removed`.
    pub(super) fn discard(self, removed: &mut Removed) {
        self.chunks
            .into_values()
            .for_each(|chunk| removed.push(chunk));
    }

    /// The mappings that overlap `range`, in ascending order.
    pub(super) fn iter(&self, range: IovaRange) -> impl Iterator<Item = Mapping> + '_ {
        let reaching_in = self.find(range.first());
        let first = reaching_in.map_or(range.first(), |mapping| mapping.iova.first());
        let chunk = self.chunks.range(..=first).next_back();
        let key = chunk.map_or(first, |(key, _)| *key);
        let chunks = self.chunks.range(key..=range.last());
        chunks.flat_map(move |(_, chunk)| {
            let inside = count_below(chunk, first)..count_up_to(chunk, range.last());
            chunk.get(inside).unwrap_or_default().iter().copied()
        })
    }

    /// The mapping with the highest start that is not above `iova`.
    fn last_up_to(&self, iova: Iova) -> Option<&Mapping> {
        let mut chunks = self.chunks.range(..=iova).rev();
        chunks.find_map(|(_, chunk)| chunk.get(..count_up_to(chunk, iova))?.last())
    }

    /// Inserts into the full chunk of `key`. At either end of all mappings this
    /// starts a new chunk, so that a driver that maps in order fills its
    /// chunks; elsewhere it splits the chunk.
    fn insert_into_full(&mut self, key: Iova, mapping: Mapping) {
        let first = mapping.iova.first();
        let is_last = self.chunks.range((Excluded(key), Unbounded)).next();
        let is_last = is_last.is_none();
        let Some(chunk) = self.chunks.get_mut(&key) else {
            return;
        };
        let at = count_below(chunk, first);
        if at == chunk.len() && is_last {
            self.chunks.insert(first, vec![mapping]);
        } else if at == 0 && key == Iova(0) {
            let above = std::mem::replace(chunk, vec![mapping]);
            self.insert_chunk(above);
        } else {
            let mut above = chunk.split_off(CHUNK / 2);
            match at.checked_sub(CHUNK / 2) {
                Some(at @ 1..) => put::<CHUNK>(&mut above, at, mapping),
                _ => put::<CHUNK>(chunk, at, mapping),
            }
            self.insert_chunk(above);
        }
    }

    /// Removes the mappings in chunks above that of `lowest`, up to `last`.
    /// Only the highest of these chunks may have more mappings: the others are
    /// removed whole.
    fn remove_chunks(&mut self, lowest: Iova, last: Iova, removed: &mut Removed) {
        let reached = self.chunks.range((Excluded(lowest), Included(last)));
        let mut keys: Vec<Iova> = reached.map(|(key, _)| *key).collect();
        let Some(highest) = keys.pop() else {
            return;
        };
        for key in keys {
            let chunk = self.chunks.remove(&key).unwrap_or_default();
            self.len -= chunk.len();
            removed.push(chunk);
        }
        let mut rest = self.chunks.remove(&highest).unwrap_or_default();
        let inside = count_up_to(&rest, last);
        self.len -= inside;
        if inside == rest.len() {
            removed.push(rest);
            return;
        }
        rest.drain(..inside);
        let is_short = rest.len() < Self::LEAST;
        self.chunks.insert(highest, rest);
        if is_short {
            self.refill(highest);
        }
    }

    /// Joins the chunk of `key` with neighbours until it has at least `LEAST`
    /// mappings or is the only one.
    fn refill(&mut self, key: Iova) {
        let is_short = |chunk: &Vec<Mapping>| chunk.len() < Self::LEAST;
        while self.chunks.get(&key).is_some_and(is_short) {
            let above = self.chunks.range((Excluded(key), Unbounded)).next();
            let above = above.map(|(above, _)| (key, *above));
            let below = || self.chunks.range(..key).next_back();
            let Some((low, high)) = above.or_else(|| below().map(|(below, _)| (*below, key)))
            else {
                return;
            };
            let mut above = self.chunks.remove(&high).unwrap_or_default();
            let chunk = self.chunks.entry(low).or_default();
            chunk.append(&mut above);
            if chunk.len() > Self::JOINED {
                above = chunk.split_off(chunk.len() / 2);
            }
            chunk.shrink_to(CHUNK);
            self.insert_chunk(above);
        }
    }

    /// Adds a chunk that is not the first one; an empty one is dropped.
    fn insert_chunk(&mut self, chunk: Vec<Mapping>) {
        if let Some(lowest) = chunk.first() {
            self.chunks.insert(lowest.iova.first(), chunk);
        }
    }
}

#[cfg(test)]
mod tests;
