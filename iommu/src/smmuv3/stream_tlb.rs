//! The latest answers of each stream. A hit takes the lock of a group of streams and
//! not the state lock, so accesses of different streams do not wait for each other.
//!
//! The cache has a part of what [`Streams`](super::streams::Streams) records as held by
//! the stream's consumers, and is changed only under the state lock: an invalidation
//! drops from it what it adds to the pending invalidations of the stream.

use std::collections::BTreeMap;

use crate::addr::{Iova, IovaRange, StreamId};
use crate::lock::LeafMutex;
use crate::mapping::Mapping;
use crate::translate::{Request, RequestKind};

/// Locks; the functions 0 of all devices of a bus have different ones.
const GROUPS: usize = 64;
/// Upper bound on entries per stream. A full cache is cleared.
const MAX_ENTRIES: usize = 128;

#[derive(Default)]
struct Group {
    /// Disjoint answers of each stream, in the order of their addresses.
    streams: BTreeMap<StreamId, Vec<Mapping>>,
    hits: u64,
}

/// Index of the first answer that ends at or above `iova`.
fn position(answers: &[Mapping], iova: Iova) -> usize {
    answers.partition_point(|answer| answer.iova.last() < iova)
}

/// Removes the answers that overlap `range`. Returns the index after those below.
fn remove(answers: &mut Vec<Mapping>, range: IovaRange) -> usize {
    let first = position(answers, range.first());
    let reached = answers.get(first..).unwrap_or_default().iter();
    let count = reached
        .take_while(|answer| answer.iova.overlaps(range))
        .count();
    if count != 0 {
        answers.drain(first..first + count);
    }
    first
}

/// Answers to accesses without a SubstreamID, by stream.
pub(super) struct StreamTlbs {
    groups: [LeafMutex<Group>; GROUPS],
}

impl Default for StreamTlbs {
    fn default() -> Self {
        Self {
            groups: std::array::from_fn(|_| LeafMutex::default()),
        }
    }
}

/// Whether answers to requests like this one are cached.
fn is_cached(request: &Request) -> bool {
    request.substream.is_none() && request.kind == RequestKind::Untranslated
}

impl StreamTlbs {
    fn group(&self, stream: StreamId) -> Option<&LeafMutex<Group>> {
        let mixed = stream.0 ^ stream.0 >> 3;
        self.groups.get(mixed as usize % GROUPS)
    }

    /// The answer to a request; counted as a hit if `count` is set.
    pub(super) fn find(&self, request: &Request, count: bool) -> Option<Mapping> {
        if !is_cached(request) {
            return None;
        }
        let mut group = self.group(request.stream)?.lock();
        let answers = group.streams.get(&request.stream)?;
        let answer = *answers.get(position(answers, request.iova))?;
        if !answer.iova.contains(request.iova) || !answer.perm.allows(request.access) {
            return None;
        }
        group.hits += u64::from(count);
        Some(answer)
    }

    /// Adds the answer to a request of a connected stream.
    pub(super) fn insert(&self, request: &Request, answer: &Mapping) {
        let Some(group) = self.group(request.stream).filter(|_| is_cached(request)) else {
            return;
        };
        let mut group = group.lock();
        let answers = group.streams.entry(request.stream).or_default();
        if answers.len() >= MAX_ENTRIES {
            answers.clear();
        }
        let at = remove(answers, answer.iova);
        answers.insert(at, *answer);
    }

    /// Drops the answers of a stream that overlap the range.
    pub(super) fn invalidate(&self, stream: StreamId, range: IovaRange) {
        let Some(group) = self.group(stream) else {
            return;
        };
        if let Some(answers) = group.lock().streams.get_mut(&stream) {
            remove(answers, range);
        }
    }

    /// Hits since the creation.
    pub(super) fn hits(&self) -> u64 {
        self.groups.iter().map(|group| group.lock().hits).sum()
    }
}
