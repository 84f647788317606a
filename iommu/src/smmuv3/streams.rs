//! The connected streams and their pending invalidations.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};

use super::event::EventKind;
use super::stream_tlb::StreamTlbs;
use super::tlb::{InvalidationExtent, Scope, Tag, TagSummary};
use crate::addr::{Iova, IovaRange, StreamId};
use crate::mapping::Mapping;
use crate::notifier::StreamSink;
use crate::translate::Request;

/// Upper bound on the tags recorded per stream. Beyond it every invalidation
/// reaches the stream.
const MAX_TAGS: usize = 64;
/// Ranges per stream at which pending invalidations are delivered early.
const MAX_PENDING: usize = 64;

/// A connected stream.
struct Stream {
    sink: Weak<dyn StreamSink>,
    /// Tags of the translations in [`Streams::held`].
    tags: Vec<Tag>,
    /// A translation since the last invalidation of everything had a
    /// SubstreamID.
    substreams: bool,
    /// The enable bit of the function's ATS capability is set.
    ats_enabled: bool,
    /// `DEVIOTLB_UNMAP` was available at the last negotiation.
    device_iotlb: bool,
    faults: BTreeMap<EventKind, u64>,
}

/// Invalidations of one stream to be delivered before the next CMD_SYNC
/// completes.
#[derive(Debug)]
pub(super) struct StreamInvalidations {
    pub(super) sink: Option<Weak<dyn StreamSink>>,
    /// The configuration changed: every translation is invalid.
    pub(super) configuration: bool,
    /// Invalid translations; both ends of a range are inclusive.
    pub(super) ranges: Vec<IovaRange>,
    /// Invalid entries of the device IOTLB; both ends of a range are inclusive.
    pub(super) device: Vec<IovaRange>,
}

/// Invalidations to be delivered, by stream. Its lock is the command lock,
/// which is held while commands are executed or their effects change.
#[derive(Debug, Default)]
pub(super) struct PendingInvalidations {
    streams: BTreeMap<StreamId, StreamInvalidations>,
    /// A stream has reached [`MAX_PENDING`] ranges.
    full: bool,
}

impl PendingInvalidations {
    /// `sink` is called if nothing is pending for the stream.
    fn stream(
        &mut self,
        id: StreamId,
        sink: impl FnOnce() -> Option<Weak<dyn StreamSink>>,
    ) -> &mut StreamInvalidations {
        let known = self.streams.entry(id);
        known.or_insert_with(|| StreamInvalidations {
            sink: sink(),
            configuration: false,
            ranges: Vec::new(),
            device: Vec::new(),
        })
    }

    /// Adds a range to the list of a stream that `list` selects.
    fn add(
        &mut self,
        (id, range): (StreamId, IovaRange),
        sink: impl FnOnce() -> Option<Weak<dyn StreamSink>>,
        list: fn(&mut StreamInvalidations) -> &mut Vec<IovaRange>,
    ) {
        let ranges = list(self.stream(id, sink));
        range.push_joined(ranges);
        let full = ranges.len() >= MAX_PENDING;
        self.full |= full;
    }

    pub(super) fn is_empty(&self) -> bool {
        self.streams.is_empty()
    }

    /// Whether a stream has reached [`MAX_PENDING`] ranges.
    pub(super) const fn is_full(&self) -> bool {
        self.full
    }

    /// Removes and returns the invalidations of every stream.
    pub(super) fn take(&mut self) -> BTreeMap<StreamId, StreamInvalidations> {
        self.full = false;
        std::mem::take(&mut self.streams)
    }
}

/// The connected streams.
pub(super) struct Streams {
    /// Answers that need no state lock: a part of `held`.
    tlbs: Arc<StreamTlbs>,
    streams: BTreeMap<StreamId, Stream>,
    /// Translations that the consumers of each stream may hold: those since the
    /// last invalidation of everything. At most [`MAX_TAGS`] per stream.
    held: BTreeMap<(Tag, StreamId), TagSummary>,
    /// Streams that had more tags: every invalidation reaches them.
    overfull: BTreeSet<StreamId>,
    /// Some translations in `held` are valid for every ASID.
    has_global: bool,
}

impl Streams {
    /// No stream, and `tlbs` without an entry.
    pub(super) fn new(tlbs: Arc<StreamTlbs>) -> Self {
        Self {
            tlbs,
            streams: BTreeMap::new(),
            held: BTreeMap::new(),
            overfull: BTreeSet::new(),
            has_global: false,
        }
    }

    pub(super) fn connect(&mut self, id: StreamId, sink: Weak<dyn StreamSink>) {
        if let Some(known) = self.streams.get_mut(&id) {
            known.sink = sink;
            return;
        }
        let stream = Stream {
            sink,
            tags: Vec::new(),
            substreams: false,
            ats_enabled: false,
            device_iotlb: false,
            faults: BTreeMap::new(),
        };
        self.streams.insert(id, stream);
    }

    pub(super) fn contains(&self, stream: StreamId) -> bool {
        self.streams.contains_key(&stream)
    }

    pub(super) fn sink(&self, stream: StreamId) -> Option<Arc<dyn StreamSink>> {
        self.weak_sink(stream)?.upgrade()
    }

    fn weak_sink(&self, stream: StreamId) -> Option<Weak<dyn StreamSink>> {
        Some(Weak::clone(&self.streams.get(&stream)?.sink))
    }

    /// Adds the answer to a request, which is recorded as held, to those that need
    /// no state lock.
    pub(super) fn cache(&self, request: &Request, answer: &Mapping) {
        if self.contains(request.stream) {
            self.tlbs.insert(request, answer);
        }
    }

    /// Records that the consumers of the stream of a request may hold the answer.
    pub(super) fn record(&mut self, request: &Request, tag: Tag, summary: TagSummary) {
        let id = request.stream;
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        stream.substreams |= request.substream.is_some();
        self.has_global |= summary.global;
        if let Some(known) = self.held.get_mut(&(tag, id)) {
            *known = known.and(summary);
        } else if stream.tags.len() < MAX_TAGS {
            stream.tags.push(tag);
            self.held.insert((tag, id), summary);
        } else {
            self.overfull.insert(id);
        }
    }

    pub(super) fn count_fault(&mut self, stream: StreamId, kind: EventKind) {
        if let Some(stream) = self.streams.get_mut(&stream) {
            *stream.faults.entry(kind).or_default() += 1;
        }
    }

    /// Faults of a stream by kind, recorded or not.
    pub(super) fn faults(&self, stream: StreamId) -> BTreeMap<EventKind, u64> {
        let stream = self.streams.get(&stream);
        stream.map_or_else(BTreeMap::new, |stream| stream.faults.clone())
    }

    /// Whether the ATS enable bit of the function is set.
    pub(super) fn ats_enabled(&self, stream: StreamId) -> bool {
        self.streams
            .get(&stream)
            .is_some_and(|stream| stream.ats_enabled)
    }

    /// The streams whose function has ATS enabled.
    pub(super) fn all_ats_enabled(&self) -> Vec<StreamId> {
        let enabled = self.streams.iter().filter(|(_, stream)| stream.ats_enabled);
        enabled.map(|(id, _)| *id).collect()
    }

    /// Enables or disables ATS of one function. Returns whether that changed.
    pub(super) fn set_ats_enabled(&mut self, stream: StreamId, enabled: bool) -> bool {
        let Some(stream) = self.streams.get_mut(&stream) else {
            return false;
        };
        std::mem::replace(&mut stream.ats_enabled, enabled) != enabled
    }

    /// Enables ATS of the functions in `enabled`, and of no other.
    pub(super) fn set_all_ats_enabled(&mut self, enabled: &[StreamId]) {
        for (id, stream) in &mut self.streams {
            stream.ats_enabled = enabled.contains(id);
        }
    }

    /// Whether `DEVIOTLB_UNMAP` was available at the last negotiation.
    pub(super) fn device_iotlb(&self, stream: StreamId) -> bool {
        let stream = self.streams.get(&stream);
        stream.is_some_and(|stream| stream.device_iotlb)
    }

    /// Records whether `DEVIOTLB_UNMAP` is available. Returns whether that
    /// changed.
    pub(super) fn set_device_iotlb(&mut self, stream: StreamId, available: bool) -> bool {
        let Some(stream) = self.streams.get_mut(&stream) else {
            return false;
        };
        std::mem::replace(&mut stream.device_iotlb, available) != available
    }

    /// Marks the configuration of the streams from `first` to `last`, inclusive,
    /// as changed.
    pub(super) fn reconfigure(
        &mut self,
        first: StreamId,
        last: StreamId,
        pending: &mut PendingInvalidations,
    ) {
        if first > last {
            return;
        }
        for (id, stream) in self.streams.range_mut(first..=last) {
            for tag in stream.tags.drain(..) {
                self.held.remove(&(tag, *id));
            }
            self.overfull.remove(id);
            self.tlbs.invalidate(*id, IovaRange::ALL);
            stream.substreams = false;
            let sink = || Some(Weak::clone(&stream.sink));
            pending.stream(*id, sink).configuration = true;
        }
        self.has_global &= !self.held.is_empty();
    }

    /// Adds the invalidation to the streams whose consumers may hold a selected
    /// translation: those whose STE and CD had the VMID and ASID at translation
    /// (§4.4).
    pub(super) fn invalidate(&self, scope: &Scope, pending: &mut PendingInvalidations) {
        let tags = scope.tags(self.has_global);
        let selected = (*tags.start(), StreamId(0))..=(*tags.end(), StreamId(u32::MAX));
        for ((tag, id), summary) in self.held.range(selected) {
            let range = match scope.extent(tag, *summary) {
                None => continue,
                Some(InvalidationExtent::All) => Ok(IovaRange::ALL),
                Some(InvalidationExtent::Range(first, last)) => {
                    IovaRange::new(Iova(first), Iova(last))
                }
            };
            if let Ok(range) = range {
                self.tlbs.invalidate(*id, range);
                pending.add((*id, range), || self.weak_sink(*id), |its| &mut its.ranges);
            }
        }
        for id in &self.overfull {
            let all = (*id, IovaRange::ALL);
            self.tlbs.invalidate(*id, IovaRange::ALL);
            pending.add(all, || self.weak_sink(*id), |its| &mut its.ranges);
        }
    }

    /// Adds an invalidation of a device IOTLB. One with a SubstreamID selects
    /// translations that were requested with one (§4.5.1).
    pub(super) fn invalidate_atc(
        &self,
        id: StreamId,
        substream: Option<u32>,
        range: IovaRange,
        pending: &mut PendingInvalidations,
    ) {
        let Some(stream) = self.streams.get(&id) else {
            return;
        };
        if stream.ats_enabled && (substream.is_none() || stream.substreams) {
            pending.add((id, range), || self.weak_sink(id), |its| &mut its.device);
        }
    }
}
