//! The part of a requester's address space that an IOMMU translates.

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

use serde::Serialize;

use crate::addr::{Iova, IovaRange, StreamId};
use crate::gate::{Entered, Gate};
use crate::lock::RankedMutex;
use crate::mapping::{Access, Mapping};
use crate::notifier::{IommuNotifier, NotifierEvents, NotifierId, Registration, StreamSink};
use crate::translate::{Fault, FaultReason, Iommu, Request, RequestKind};

/// Counters of a stream, updated with relaxed ordering.
#[derive(Debug, Default)]
pub struct StreamCounters {
    pub(crate) translations: AtomicU64,
    pub(crate) hits: AtomicU64,
    faults: [AtomicU64; FaultReason::ALL.len()],
    invalidations: AtomicU64,
    maps: AtomicU64,
}

impl StreamCounters {
    pub(crate) fn count_fault(&self, reason: FaultReason) {
        if let Some(counter) = self.faults.get(reason as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Values of a stream's counters since its region was created.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct StreamStats {
    /// Requests that reached the model.
    pub translations: u64,
    /// Requests that the translation cache of a [`DmaSpace`](crate::DmaSpace)
    /// served.
    pub hits: u64,
    /// Requests that faulted, indexed as [`FaultReason::ALL`].
    pub faults: [u64; FaultReason::ALL.len()],
    /// Invalidations that reached the stream.
    pub invalidations: u64,
    /// Mappings that were delivered to the stream's notifiers.
    pub maps: u64,
}

struct Registered {
    id: NotifierId,
    notifier: IommuNotifier,
    events: NotifierEvents,
}

#[derive(Default)]
struct Notifiers {
    next_id: u64,
    list: Vec<Registered>,
}

/// One stream's address space, translated by an [`Iommu`].
///
/// ```
/// use std::sync::Arc;
/// use iommu::virtio::{FaultReport, FaultSink, VirtioIommu, VirtioIommuConfig};
/// use iommu::{Access, Gpa, GuestRam, Iommu, IommuRegion, Iova, IovaRange, StreamId};
///
/// struct NoReports;
/// impl FaultSink for NoReports {
///     fn report(&self, _report: &FaultReport) {}
/// }
///
/// let ram = Arc::new(GuestRam::from_ranges(&[(vm_memory::GuestAddress(0), 0x10000)])?);
/// let config = VirtioIommuConfig {
///     input_range: IovaRange::block(Iova(0), 48),
///     msi_window: None,
///     boot_bypass: true,
///     max_mappings: 1 << 16,
/// };
/// let model = Arc::new(VirtioIommu::new(config, ram, Arc::new(NoReports)));
/// let region = IommuRegion::new(model, StreamId::from_bdf(0, 1, 0));
/// // Without a domain, and with bypass, an address is guest-physical.
/// let mapping = region.enter().translate(Iova(0x1000), Access::Read)?;
/// assert_eq!(mapping.gpa_of(Iova(0x1000)), Some(Gpa(0x1000)));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct IommuRegion {
    iommu: Arc<dyn Iommu>,
    stream: StreamId,
    gate: Gate,
    generation: AtomicU64,
    notifiers: RankedMutex<Notifiers, 7>,
    counters: StreamCounters,
}

impl IommuRegion {
    /// The region of `stream`. Connects it to the model.
    pub fn new(iommu: Arc<dyn Iommu>, stream: StreamId) -> Arc<Self> {
        let region = Arc::new(Self {
            iommu,
            stream,
            gate: Gate::default(),
            generation: AtomicU64::new(0),
            notifiers: RankedMutex::default(),
            counters: StreamCounters::default(),
        });
        let sink: Weak<dyn StreamSink> = Arc::<Self>::downgrade(&region);
        region.iommu.connect(stream, sink);
        region
    }

    /// Stream ID of the requester.
    #[must_use]
    pub fn stream(&self) -> StreamId {
        self.stream
    }

    /// Copies the counters; the values are not of one instant.
    #[must_use]
    pub fn stats(&self) -> StreamStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        StreamStats {
            translations: get(&self.counters.translations),
            hits: get(&self.counters.hits),
            faults: std::array::from_fn(|at| self.counters.faults.get(at).map_or(0, get)),
            invalidations: get(&self.counters.invalidations),
            maps: get(&self.counters.maps),
        }
    }

    pub(crate) fn counters(&self) -> &StreamCounters {
        &self.counters
    }

    /// Enters the stream's gate: translations made through the guard may be
    /// used and published until it is dropped. Not re-entrant.
    pub fn enter(&self) -> Translating<'_> {
        Translating {
            _inside: self.gate.enter(),
            region: self,
        }
    }

    /// Translates without recording an event, for calls from a
    /// [`NotifierSink`](crate::NotifierSink) method: the region holds the gate
    /// then, so the result may be published until the method returns.
    ///
    /// # Errors
    /// The [`Fault`]; it is not recorded.
    pub fn lookup(&self, iova: Iova, access: Access) -> Result<Mapping, Fault> {
        let request = Request::untranslated(self.stream, iova, access);
        self.iommu.lookup(&request)
    }

    /// Registers a notifier for the first of its event sets that the model accepts,
    /// passes the result to the sink, and replays the present mappings if `MAP` is
    /// in the set.
    pub fn register(&self, notifier: IommuNotifier) -> NotifierId {
        let _closed = self.gate.close();
        let mut notifiers = self.notifiers.lock();
        let id = NotifierId(notifiers.next_id);
        notifiers.next_id += 1;
        let outcome = self.negotiate(&notifier, NotifierEvents::empty());
        self.admit(&notifier, &outcome);
        notifiers.list.push(Registered {
            id,
            notifier,
            events: outcome.events,
        });
        id
    }

    /// Removes a notifier. When this returns its sink is not called again.
    pub fn unregister(&self, id: NotifierId) {
        let _closed = self.gate.close();
        self.notifiers.lock().list.retain(|known| known.id != id);
    }

    /// Number that changes with every invalidation. It is constant while the
    /// gate is held.
    pub(crate) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    fn invalidate_for(&self, ranges: &[IovaRange], kinds: NotifierEvents) {
        if ranges.is_empty() {
            return;
        }
        let _closed = self.gate.close();
        self.notify_unmap(ranges, kinds);
    }

    /// Needs the closed gate.
    fn notify_unmap(&self, ranges: &[IovaRange], kinds: NotifierEvents) {
        self.generation.fetch_add(1, Ordering::Release);
        self.counters.invalidations.fetch_add(1, Ordering::Relaxed);
        for known in &self.notifiers.lock().list {
            if !known.events.intersects(kinds) {
                continue;
            }
            let limit = known.notifier.range;
            if limit == IovaRange::ALL {
                known.notifier.sink.unmap(ranges);
            } else {
                let parts: Vec<_> = ranges
                    .iter()
                    .filter_map(|range| range.intersection(limit))
                    .collect();
                if !parts.is_empty() {
                    known.notifier.sink.unmap(&parts);
                }
            }
        }
    }

    /// The first event set that the model accepts. Needs the closed gate.
    fn negotiate(&self, notifier: &IommuNotifier, old: NotifierEvents) -> Registration {
        let mut refused = Vec::new();
        for &events in &notifier.acceptable {
            match self.iommu.notifier_events_changed(self.stream, old, events) {
                Ok(()) => return Registration { events, refused },
                Err(refusal) => refused.push(refusal),
            }
        }
        Registration {
            events: NotifierEvents::empty(),
            refused,
        }
    }

    /// Passes the result of a registration to its sink, and replays for `MAP`.
    fn admit(&self, notifier: &IommuNotifier, outcome: &Registration) {
        notifier.sink.registered(outcome);
        if outcome.events.contains(NotifierEvents::MAP) {
            self.replay(notifier);
        }
    }

    /// Replays the present mappings until the sink wants no more. Needs the
    /// closed gate.
    fn replay(&self, notifier: &IommuNotifier) {
        let mut visit = |mapping: &Mapping| {
            if !notifier.sink.wants_more() {
                return ControlFlow::Break(());
            }
            if let Some(part) = mapping.clipped(notifier.range) {
                self.counters.maps.fetch_add(1, Ordering::Relaxed);
                notifier.sink.map(&part);
            }
            ControlFlow::Continue(())
        };
        self.iommu.replay(self.stream, notifier.range, &mut visit);
    }
}

impl StreamSink for IommuRegion {
    fn renegotiate(&self) {
        let _closed = self.gate.close();
        self.generation.fetch_add(1, Ordering::Release);
        for known in &mut self.notifiers.lock().list {
            let outcome = self.negotiate(&known.notifier, known.events);
            if outcome.events != known.events {
                known.notifier.sink.unmap(&[known.notifier.range]);
                known.events = outcome.events;
                self.admit(&known.notifier, &outcome);
            }
        }
    }

    fn invalidate(&self, ranges: &[IovaRange]) {
        self.invalidate_for(ranges, NotifierEvents::UNMAP);
    }

    fn invalidate_device_iotlb(&self, ranges: &[IovaRange]) {
        self.invalidate_for(ranges, NotifierEvents::DEVIOTLB_UNMAP);
    }

    fn invalidate_all(&self) {
        let both = NotifierEvents::UNMAP | NotifierEvents::DEVIOTLB_UNMAP;
        self.invalidate_for(&[IovaRange::ALL], both);
    }

    fn reload(&self) {
        let _closed = self.gate.close();
        let both = NotifierEvents::UNMAP | NotifierEvents::DEVIOTLB_UNMAP;
        self.notify_unmap(&[IovaRange::ALL], both);
        for known in &self.notifiers.lock().list {
            if known.events.contains(NotifierEvents::MAP) {
                self.replay(&known.notifier);
            }
        }
    }

    fn map(&self, mapping: &Mapping) {
        let _inside = self.gate.enter();
        self.counters.maps.fetch_add(1, Ordering::Relaxed);
        for known in &self.notifiers.lock().list {
            if known.events.contains(NotifierEvents::MAP)
                && let Some(part) = mapping.clipped(known.notifier.range)
            {
                known.notifier.sink.map(&part);
            }
        }
    }
}

impl std::fmt::Debug for IommuRegion {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("IommuRegion")
            .field("stream", &self.stream)
            .finish_non_exhaustive()
    }
}

/// Guard of the stream's gate: permits translating and using the results.
pub struct Translating<'a> {
    _inside: Entered<'a>,
    region: &'a IommuRegion,
}

impl Translating<'_> {
    /// Translates an access of the device.
    ///
    /// # Errors
    /// The [`Fault`]; the model records its event.
    pub fn translate(&self, iova: Iova, access: Access) -> Result<Mapping, Fault> {
        self.ask(iova, access, RequestKind::Untranslated)
    }

    /// Translates an ATS request of the device (PCIe 6.0 §10.2).
    ///
    /// # Errors
    /// The [`Fault`]; the model records an event where its specification has
    /// one.
    pub fn request_ats(&self, iova: Iova, access: Access) -> Result<Mapping, Fault> {
        self.ask(iova, access, RequestKind::AtsTranslation)
    }

    /// Translates without recording an event.
    ///
    /// # Errors
    /// The [`Fault`]; it is not recorded.
    pub fn lookup(&self, iova: Iova, access: Access) -> Result<Mapping, Fault> {
        self.region.lookup(iova, access)
    }

    fn ask(&self, iova: Iova, access: Access, kind: RequestKind) -> Result<Mapping, Fault> {
        let counters = &self.region.counters;
        counters.translations.fetch_add(1, Ordering::Relaxed);
        let answer = self.region.iommu.translate(&Request {
            kind,
            ..Request::untranslated(self.region.stream, iova, access)
        });
        if let Err(fault) = &answer {
            counters.count_fault(fault.reason);
        }
        answer
    }
}
