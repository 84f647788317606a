//! The connected streams and their pending invalidations.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use super::event::EventKind;
use super::tlb::{InvalidationExtent, Scope, Tag, TagSummary};
use crate::addr::{Iova, IovaRange, StreamId};
use crate::notifier::StreamSink;

/// Upper bound on the tags recorded per stream. Beyond it every invalidation
/// reaches the stream.
const MAX_TAGS: usize = 64;
/// Ranges per stream at which pending invalidations are delivered early.
const MAX_PENDING: usize = 64;

/// A connected stream.
#[derive(Default)]
struct Stream {
    sink: Option<Weak<dyn StreamSink>>,
    /// Translations that the consumers may hold: those since the last
    /// invalidation of everything.
    held: BTreeMap<Tag, TagSummary>,
    /// There were more than [`MAX_TAGS`] tags.
    held_more: bool,
    /// A translation since the last invalidation of everything had a
    /// SubstreamID.
    substreams: bool,
    /// The enable bit of the function's ATS capability is set.
    ats_enabled: bool,
    /// `DEVIOTLB_UNMAP` was available at the last negotiation.
    device_iotlb: bool,
    faults: BTreeMap<EventKind, u64>,
}

impl Stream {
    fn record(&mut self, tag: Tag, summary: TagSummary) {
        if let Some(known) = self.held.get_mut(&tag) {
            *known = known.and(summary);
        } else if self.held.len() < MAX_TAGS {
            self.held.insert(tag, summary);
        } else {
            self.held_more = true;
        }
    }

    /// Records that everything is invalidated.
    fn clear(&mut self) {
        self.held.clear();
        self.held_more = false;
        self.substreams = false;
    }

    /// Translations of the stream's consumers that `scope` removes.
    fn extents(&self, scope: &Scope) -> Vec<InvalidationExtent> {
        let held = self.held.iter();
        let mut extents: Vec<_> = held
            .filter_map(|(tag, summary)| scope.extent(tag, *summary))
            .collect();
        if self.held_more {
            extents.push(InvalidationExtent::All);
        }
        extents
    }
}

/// Invalidations of one stream to be delivered before the next CMD_SYNC
/// completes.
#[derive(Debug, Default)]
pub(super) struct StreamInvalidations {
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
pub(super) struct PendingInvalidations(BTreeMap<StreamId, StreamInvalidations>);

impl PendingInvalidations {
    fn stream(&mut self, stream: StreamId) -> &mut StreamInvalidations {
        self.0.entry(stream).or_default()
    }

    /// Whether a stream has reached [`MAX_PENDING`] ranges.
    pub(super) fn is_full(&self) -> bool {
        let mut streams = self.0.values();
        streams.any(|stream| stream.ranges.len().max(stream.device.len()) >= MAX_PENDING)
    }

    /// Removes and returns the invalidations of every stream.
    pub(super) fn take(&mut self) -> BTreeMap<StreamId, StreamInvalidations> {
        std::mem::take(&mut self.0)
    }
}

/// The connected streams.
#[derive(Default)]
pub(super) struct Streams(BTreeMap<StreamId, Stream>);

impl Streams {
    pub(super) fn connect(&mut self, stream: StreamId, sink: Weak<dyn StreamSink>) {
        self.0.entry(stream).or_default().sink = Some(sink);
    }

    pub(super) fn contains(&self, stream: StreamId) -> bool {
        self.0.contains_key(&stream)
    }

    pub(super) fn sink(&self, stream: StreamId) -> Option<Arc<dyn StreamSink>> {
        self.0.get(&stream)?.sink.as_ref()?.upgrade()
    }

    /// Records that the stream's consumers may hold a translation.
    pub(super) fn record(
        &mut self,
        stream: StreamId,
        tag: Tag,
        summary: TagSummary,
        substream: bool,
    ) {
        if let Some(stream) = self.0.get_mut(&stream) {
            stream.record(tag, summary);
            stream.substreams |= substream;
        }
    }

    pub(super) fn count_fault(&mut self, stream: StreamId, kind: EventKind) {
        if let Some(stream) = self.0.get_mut(&stream) {
            *stream.faults.entry(kind).or_default() += 1;
        }
    }

    /// Faults of a stream by kind, recorded or not.
    pub(super) fn faults(&self, stream: StreamId) -> BTreeMap<EventKind, u64> {
        let stream = self.0.get(&stream);
        stream.map_or_else(BTreeMap::new, |stream| stream.faults.clone())
    }

    /// Whether the ATS enable bit of the function is set.
    pub(super) fn ats_enabled(&self, stream: StreamId) -> bool {
        self.0.get(&stream).is_some_and(|stream| stream.ats_enabled)
    }

    /// The streams whose function has ATS enabled.
    pub(super) fn all_ats_enabled(&self) -> Vec<StreamId> {
        let enabled = self.0.iter().filter(|(_, stream)| stream.ats_enabled);
        enabled.map(|(id, _)| *id).collect()
    }

    /// Enables or disables ATS of one function. Returns whether that changed.
    pub(super) fn set_ats_enabled(&mut self, stream: StreamId, enabled: bool) -> bool {
        let Some(stream) = self.0.get_mut(&stream) else {
            return false;
        };
        std::mem::replace(&mut stream.ats_enabled, enabled) != enabled
    }

    /// Enables ATS of the functions in `enabled`, and of no other.
    pub(super) fn set_all_ats_enabled(&mut self, enabled: &[StreamId]) {
        for (id, stream) in &mut self.0 {
            stream.ats_enabled = enabled.contains(id);
        }
    }

    /// Whether `DEVIOTLB_UNMAP` was available at the last negotiation.
    pub(super) fn device_iotlb(&self, stream: StreamId) -> bool {
        let stream = self.0.get(&stream);
        stream.is_some_and(|stream| stream.device_iotlb)
    }

    /// Records whether `DEVIOTLB_UNMAP` is available. Returns whether that
    /// changed.
    pub(super) fn set_device_iotlb(&mut self, stream: StreamId, available: bool) -> bool {
        let Some(stream) = self.0.get_mut(&stream) else {
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
        for (id, stream) in self.0.range_mut(first..=last) {
            stream.clear();
            pending.stream(*id).configuration = true;
        }
    }

    /// Adds the invalidation to the streams whose consumers may hold a selected
    /// translation: those whose STE and CD had the VMID and ASID at translation
    /// (§4.4).
    pub(super) fn invalidate(&self, scope: &Scope, pending: &mut PendingInvalidations) {
        for (id, stream) in &self.0 {
            for extent in stream.extents(scope) {
                let range = match extent {
                    InvalidationExtent::All => Ok(IovaRange::ALL),
                    InvalidationExtent::Range(first, last) => {
                        IovaRange::new(Iova(first), Iova(last))
                    }
                };
                if let Ok(range) = range {
                    range.push_joined(&mut pending.stream(*id).ranges);
                }
            }
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
        let Some(stream) = self.0.get(&id) else {
            return;
        };
        if stream.ats_enabled && (substream.is_none() || stream.substreams) {
            range.push_joined(&mut pending.stream(id).device);
        }
    }
}
