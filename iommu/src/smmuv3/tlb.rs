//! The TLB and its invalidation (IHI 0070 §3.17, §4.4).
//!
//! The model's state lock protects the TLB and every walk that fills it. So no
//! walk that began before an invalidation can insert after it.

use std::cmp::Ordering;
use std::collections::{BTreeMap, VecDeque};
use std::ops::RangeInclusive;

use super::config::Stages;
use super::ste::StreamWorld;
use crate::addr::Gpa;
use crate::mapping::Perm;

/// Upper bound on entries; the oldest insertion is evicted first.
pub(super) const MAX_ENTRIES: usize = 4096;

/// Tag of a translation. The order is by VMID and ASID, so that an invalidation finds
/// the tags that it selects without a search through the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Tag {
    /// Regime of the translation.
    pub world: StreamWorld,
    /// VMID; 0 outside of EL1.
    pub vmid: u16,
    /// ASID; 0 where there is none.
    pub asid: u16,
    /// Which stages translate.
    pub stages: Stages,
}

impl Tag {
    /// One number to compare, because an invalidation compares many tags.
    const fn key(self) -> u64 {
        let (world, stages) = (self.world as u64, self.stages as u64);
        world << 48 | (self.vmid as u64) << 32 | (self.asid as u64) << 16 | stages
    }
}

impl Ord for Tag {
    fn cmp(&self, other: &Self) -> Ordering {
        self.key().cmp(&other.key())
    }
}

impl PartialOrd for Tag {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// Summary of all translations with one tag that a cache or consumer may hold.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct TagSummary {
    /// Some translations are valid for every ASID.
    pub global: bool,
    /// An address may have aliases (TBI).
    pub aliases: bool,
    /// Size of the largest page, block or contiguous group, as a shift.
    pub shift: u32,
    /// Some translations are of contiguous groups.
    pub grouped: bool,
}

impl TagSummary {
    /// Summary of the translations of both.
    pub(super) const fn and(self, other: Self) -> Self {
        Self {
            global: self.global || other.global,
            aliases: self.aliases || other.aliases,
            grouped: self.grouped || other.grouped,
            shift: if self.shift > other.shift {
                self.shift
            } else {
                other.shift
            },
        }
    }
}

/// ASIDs that an invalidation selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AsidScope {
    /// Every ASID.
    Any,
    /// This ASID, without global translations.
    Only(u16),
    /// This ASID, and translations that are valid for every ASID.
    OrGlobal(u16),
}

/// Stages that an invalidation selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StageScope {
    /// Stage 1, alone or nested.
    First,
    /// Stage 2, by intermediate physical address. Nested translations cannot
    /// be found by it: all of them are removed.
    Second,
    /// Every stage.
    Any,
}

/// Addresses that an invalidation selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// First address, inclusive.
    pub first: u64,
    /// Last address, inclusive.
    pub last: u64,
    /// Size of the largest page or block that is selected, as a shift (TTL).
    pub limit: u32,
    /// Entries of a contiguous group, as a power of two.
    pub group: u32,
}

impl Span {
    /// The range extended to whole pages, blocks or groups of the sizes in
    /// `held`: an invalidation of one address of a block removes all of it.
    /// Both ends are inclusive.
    pub(super) const fn grown(self, held: TagSummary) -> (u64, u64) {
        let limit = if held.grouped {
            self.limit.saturating_add(self.group)
        } else {
            self.limit
        };
        let shift = if held.shift < limit {
            held.shift
        } else {
            limit
        };
        let mask = if shift >= 64 {
            u64::MAX
        } else {
            (1 << shift) - 1
        };
        (self.first & !mask, self.last | mask)
    }
}

/// Translations that an invalidation selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Scope {
    /// `true` selects EL1, `false` the EL2 regimes.
    pub el1: bool,
    /// Of the EL2 regimes, `true` selects EL2-E2H and `false` EL2.
    pub e2h: Option<bool>,
    /// VMID and the mask of its significant bits; `None` selects every VMID.
    pub vmid: Option<(u16, u16)>,
    /// Selected ASIDs.
    pub asid: AsidScope,
    /// Selected stages.
    pub stages: StageScope,
    /// Selected addresses; `None` for all.
    pub span: Option<Span>,
}

/// The part of a tag's translations that an invalidation removes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InvalidationExtent {
    /// Every translation of the tag.
    All,
    /// A range, both ends inclusive.
    Range(u64, u64),
}

impl Scope {
    /// Range that has every tag that the scope selects. `has_global`: some
    /// translations are valid for every ASID.
    pub(super) fn tags(&self, has_global: bool) -> RangeInclusive<Tag> {
        let (lowest, highest) = match (self.el1, self.e2h) {
            (true, _) => (StreamWorld::El1, StreamWorld::El1),
            (false, None) => (StreamWorld::El2, StreamWorld::El2E2h),
            (false, Some(false)) => (StreamWorld::El2, StreamWorld::El2),
            (false, Some(true)) => (StreamWorld::El2E2h, StreamWorld::El2E2h),
        };
        let vmids = self
            .vmid
            .map_or((0, u16::MAX), |(vmid, mask)| (vmid & mask, vmid | !mask));
        let asids = match self.asid {
            _ if lowest != highest || vmids.0 != vmids.1 => (0, u16::MAX),
            AsidScope::Only(asid) => (asid, asid),
            AsidScope::OrGlobal(asid) if !has_global => (asid, asid),
            AsidScope::OrGlobal(_) | AsidScope::Any => (0, u16::MAX),
        };
        let tag = |world, vmid, asid, stages| Tag {
            world,
            vmid,
            asid,
            stages,
        };
        tag(lowest, vmids.0, asids.0, Stages::One)..=tag(highest, vmids.1, asids.1, Stages::Nested)
    }

    /// The part of the translations with `tag` that is removed; `None` for no
    /// part.
    pub(super) fn extent(&self, tag: &Tag, held: TagSummary) -> Option<InvalidationExtent> {
        let world = match tag.world {
            StreamWorld::El1 => self.el1,
            StreamWorld::El2 => !self.el1 && self.e2h != Some(true),
            StreamWorld::El2E2h => !self.el1 && self.e2h != Some(false),
        };
        let vmid = self
            .vmid
            .is_none_or(|(vmid, mask)| (vmid ^ tag.vmid) & mask == 0);
        let asid = match self.asid {
            AsidScope::Any => true,
            AsidScope::Only(asid) => asid == tag.asid,
            AsidScope::OrGlobal(asid) => asid == tag.asid || held.global,
        };
        if !world || !vmid || !asid {
            return None;
        }
        match (self.stages, tag.stages) {
            (StageScope::First, Stages::Two) | (StageScope::Second, Stages::One) => None,
            (StageScope::Second, Stages::Nested) => Some(InvalidationExtent::All),
            _ => Some(match self.span {
                None => InvalidationExtent::All,
                Some(_) if held.aliases => InvalidationExtent::All,
                Some(span) => {
                    let (first, last) = span.grown(held);
                    InvalidationExtent::Range(first, last)
                }
            }),
        }
    }
}

/// A contiguous range of addresses with one translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    /// First address, inclusive; sign-extended where the top byte is ignored.
    pub first: u64,
    /// Last address, inclusive.
    pub last: u64,
    /// Output address of `first`.
    pub output: Gpa,
    /// Accesses that are permitted.
    pub perm: Perm,
}

/// Disjoint entries by first address, each with its insertion number.
#[derive(Debug, Default)]
struct Entries(BTreeMap<u64, (Entry, u64)>);

impl Entries {
    fn len(&self) -> usize {
        self.0.len()
    }

    /// The entry that contains `address`.
    fn find(&self, address: u64) -> Option<Entry> {
        let (_, (entry, _)) = self.0.range(..=address).next_back()?;
        (address <= entry.last).then_some(*entry)
    }

    /// Adds an entry that overlaps no other.
    fn insert(&mut self, entry: Entry, age: u64) {
        self.0.insert(entry.first, (entry, age));
    }

    /// Removes the entries that overlap the range, both ends inclusive. Returns
    /// their number.
    fn remove(&mut self, first: u64, last: u64) -> usize {
        let mut removed = 0;
        while let Some((&key, (entry, _))) = self.0.range(..=last).next_back() {
            if entry.last < first {
                break;
            }
            self.0.remove(&key);
            removed += 1;
            if key <= first {
                break;
            }
        }
        removed
    }

    /// Removes the entry that starts at `first` if `age` is its insertion number.
    fn remove_aged(&mut self, first: u64, age: u64) -> bool {
        let is_that = self.0.get(&first).is_some_and(|(_, its)| *its == age);
        is_that && self.0.remove(&first).is_some()
    }
}

#[derive(Debug, Default)]
struct Context {
    held: TagSummary,
    entries: Entries,
}

/// Translations by tag, up to a fixed number; the oldest entry is evicted first.
#[derive(Debug, Default)]
pub(super) struct Tlb {
    contexts: BTreeMap<Tag, Context>,
    /// A translation that was inserted since there was none is valid for every ASID.
    has_global: bool,
    /// Insertions, oldest first, including those of removed entries.
    order: VecDeque<(Tag, u64, u64)>,
    count: usize,
    age: u64,
}

impl Tlb {
    /// The entry that contains `address`.
    pub(super) fn find(&self, tag: &Tag, address: u64) -> Option<Entry> {
        self.contexts.get(tag)?.entries.find(address)
    }

    /// Summary of the translations with one tag.
    pub(super) fn summary(&self, tag: &Tag) -> TagSummary {
        self.contexts
            .get(tag)
            .map_or_else(TagSummary::default, |context| context.held)
    }

    /// Inserts an entry and removes those that overlap it. Returns the summary of
    /// the translations with its tag.
    pub(super) fn insert(&mut self, tag: Tag, entry: Entry, held: TagSummary) -> TagSummary {
        self.age += 1;
        let context = self.contexts.entry(tag).or_default();
        self.count -= context.entries.remove(entry.first, entry.last);
        let summary = context.held.and(held);
        context.held = summary;
        self.has_global |= held.global;
        context.entries.insert(entry, self.age);
        self.count += 1;
        self.order.push_back((tag, entry.first, self.age));
        while self.count > MAX_ENTRIES || self.order.len() > 2 * MAX_ENTRIES {
            self.evict();
        }
        summary
    }

    /// Drops the oldest insertion that was not removed.
    fn evict(&mut self) {
        let Some((tag, first, age)) = self.order.pop_front() else {
            return;
        };
        if let Some(context) = self.contexts.get_mut(&tag)
            && context.entries.remove_aged(first, age)
        {
            self.count -= 1;
            if context.entries.len() == 0 {
                self.contexts.remove(&tag);
            }
        }
    }

    /// Drops the entries that `scope` selects.
    pub(super) fn invalidate(&mut self, scope: &Scope) {
        let mut emptied = Vec::new();
        let selected = scope.tags(self.has_global);
        for (tag, context) in self.contexts.range_mut(selected) {
            match scope.extent(tag, context.held) {
                None => continue,
                Some(InvalidationExtent::All) => {
                    self.count -= context.entries.len();
                    context.entries = Entries::default();
                }
                Some(InvalidationExtent::Range(first, last)) => {
                    self.count -= context.entries.remove(first, last);
                }
            }
            if context.entries.len() == 0 {
                emptied.push(*tag);
            }
        }
        for tag in emptied {
            self.contexts.remove(&tag);
        }
        self.has_global &= !self.contexts.is_empty();
    }

    /// Number of entries.
    pub(super) fn entries(&self) -> usize {
        self.count
    }
}
