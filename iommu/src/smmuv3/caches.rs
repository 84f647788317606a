//! The configuration caches and the TLB (IHI 0070 §3.21, §3.17).

use std::collections::BTreeMap;

use super::cd::Cd;
use super::ste::Ste;
use super::tlb::{Entry, Scope, Tag, TagSummary, Tlb};
use crate::addr::StreamId;
use crate::mapping::Access;

/// Upper bound on cached STEs, and on cached CDs. A full cache is cleared.
const MAX_CACHED: usize = 1024;

/// The configuration caches and the TLB, protected by the state lock.
#[derive(Default)]
pub(super) struct Caches {
    stes: BTreeMap<StreamId, Ste>,
    cds: BTreeMap<(StreamId, u32), Cd>,
    tlb: Tlb,
    hits: u64,
    misses: u64,
}

impl Caches {
    pub(super) fn ste(&self, stream: StreamId) -> Option<Ste> {
        self.stes.get(&stream).copied()
    }

    pub(super) fn insert_ste(&mut self, stream: StreamId, ste: Ste) {
        insert(&mut self.stes, stream, ste);
    }

    /// The CD at `index` of a stream.
    pub(super) fn cd(&self, stream: StreamId, index: u32) -> Option<Cd> {
        self.cds.get(&(stream, index)).copied()
    }

    pub(super) fn insert_cd(&mut self, stream: StreamId, index: u32, cd: Cd) {
        insert(&mut self.cds, (stream, index), cd);
    }

    /// Drops the STEs and CDs of the streams `first` to `last`, both inclusive.
    pub(super) fn drop_streams(&mut self, first: StreamId, last: StreamId) {
        let streams = first..=last;
        self.stes.retain(|stream, _| !streams.contains(stream));
        self.cds.retain(|(stream, _), _| !streams.contains(stream));
    }

    /// Drops the CD at `index` of a stream, or all of its CDs.
    pub(super) fn drop_cds(&mut self, stream: StreamId, index: Option<u32>) {
        self.cds
            .retain(|key, _| key.0 != stream || index.is_some_and(|index| index != key.1));
    }

    /// Empties both configuration caches and the TLB.
    pub(super) fn clear(&mut self) {
        self.stes.clear();
        self.cds.clear();
        self.tlb = Tlb::default();
    }

    /// The TLB's entry for `address`, if it permits `access`.
    pub(super) fn peek(&self, tag: &Tag, address: u64, access: Access) -> Option<Entry> {
        let entry = self.tlb.find(tag, address);
        entry.filter(|entry| entry.perm.allows(access))
    }

    /// As [`peek`](Self::peek), and counts a hit or a miss.
    pub(super) fn find(&mut self, tag: &Tag, address: u64, access: Access) -> Option<Entry> {
        let entry = self.peek(tag, address, access);
        if entry.is_some() {
            self.hits += 1;
        } else {
            self.misses += 1;
        }
        entry
    }

    /// Inserts an entry into the TLB. Returns the summary of those with its tag.
    pub(super) fn insert(&mut self, tag: Tag, entry: Entry, summary: TagSummary) -> TagSummary {
        self.tlb.insert(tag, entry, summary)
    }

    /// Summary of the TLB's entries with one tag.
    pub(super) fn summary(&self, tag: &Tag) -> TagSummary {
        self.tlb.summary(tag)
    }

    /// Drops the TLB's entries that `scope` selects.
    pub(super) fn invalidate(&mut self, scope: &Scope) {
        self.tlb.invalidate(scope);
    }

    /// Hits and misses of the TLB since it was created.
    pub(super) const fn counts(&self) -> (u64, u64) {
        (self.hits, self.misses)
    }

    /// Entries in the TLB.
    pub(super) fn entries(&self) -> usize {
        self.tlb.entries()
    }
}

fn insert<K: Ord, V>(cache: &mut BTreeMap<K, V>, key: K, value: V) {
    if cache.len() >= MAX_CACHED {
        cache.clear();
    }
    cache.insert(key, value);
}
