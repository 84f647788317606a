//! The virtio-iommu as a model (virtio 1.2 §5.13): domains, mappings and
//! endpoints. Its queues and registers are the transport's business.

mod domain;
mod fault;
mod mappings;
mod request;
pub mod spec;
mod state;

use std::ops::ControlFlow;
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};

use serde::Serialize;

pub use self::fault::{FaultReport, FaultSink};
use self::mappings::Removed;
pub use self::request::Request;
use self::request::{needed_feature, reply_size};
use self::spec::{Status, feature, property};
use self::state::{Endpoint, Moved, PAGE_SHIFT, State, View, perm_of};
use crate::ram::{identity_around, ram_blocks};
use crate::{
    Fault, FaultReason, Gpa, GuestRam, Iommu, Iova, IovaRange, Mapping, NotifierEvents, Perm,
    Refused, StreamId, StreamSink,
};

/// Chunks of removed mappings that are freed in each request: about 50 µs.
const FREED_CHUNKS: usize = 32;
/// Unmapped ranges that wait for one invalidation, at most.
const MAX_PENDING: usize = 64;
/// Mappings of a replay that are copied under one hold of the state's lock.
const REPLAY_PIECE: usize = 256;

/// What does not change while the machine runs.
#[derive(Clone, Copy, Debug)]
pub struct VirtioIommuConfig {
    /// Addresses that endpoints may use.
    pub input_range: IovaRange,
    /// The addresses of message-signalled interrupts, when they are not
    /// translated (x86).
    pub msi_window: Option<IovaRange>,
    /// `bypass` of the configuration at start.
    pub boot_bypass: bool,
    /// Upper bound on the mappings of all domains together, those that are
    /// removed and not yet freed included. A mapping costs 32 to 87 bytes.
    pub max_mappings: usize,
}

/// Ranges of one domain that are unmapped and not yet invalidated, and mappings
/// that are removed and not yet freed. Also the command lock: a vCPU holds it
/// while it carries out a request.
#[derive(Debug, Default)]
struct Pending {
    domain: u32,
    ranges: Vec<IovaRange>,
    removed: Removed,
}

/// How an endpoint stands, for the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EndpointState {
    /// Its domain, if it is attached.
    pub domain: Option<u32>,
    /// Whether its addresses are guest-physical.
    pub bypass: bool,
    /// How many mappings it sees.
    pub mappings: usize,
}

/// The model. Requests come in by [`handle`](Self::handle), and their effects
/// are complete when [`flush`](Self::flush) has returned.
pub struct VirtioIommu {
    config: VirtioIommuConfig,
    ram: Arc<GuestRam>,
    faults: Arc<dyn FaultSink>,
    commands: Mutex<Pending>,
    state: RwLock<State>,
}

impl VirtioIommu {
    /// A virtio-iommu before any driver came.
    #[must_use]
    pub fn new(config: VirtioIommuConfig, ram: Arc<GuestRam>, faults: Arc<dyn FaultSink>) -> Self {
        Self {
            config,
            ram,
            faults,
            commands: Mutex::default(),
            state: RwLock::new(State {
                bypass: config.boot_bypass,
                ..State::default()
            }),
        }
    }

    /// The features it offers.
    #[must_use]
    pub const fn features(&self) -> u64 {
        feature::INPUT_RANGE
            | feature::DOMAIN_RANGE
            | feature::MAP_UNMAP
            | feature::PROBE
            | feature::MMIO
            | feature::BYPASS_CONFIG
    }

    /// The features that were negotiated.
    #[must_use]
    pub fn negotiated_features(&self) -> u64 {
        self.read().features
    }

    /// The driver accepted `features`.
    pub fn negotiated(&self, features: u64) {
        self.write().features = features;
    }

    /// The device configuration (§5.13.4).
    #[must_use]
    pub fn config_space(&self) -> [u8; spec::CONFIG_SIZE] {
        let page_size_mask = u64::MAX << PAGE_SHIFT;
        let (domain_first, domain_last) = (0_u32, u32::MAX);
        let fields = page_size_mask
            .to_le_bytes()
            .into_iter()
            .chain(self.config.input_range.first().0.to_le_bytes())
            .chain(self.config.input_range.last().0.to_le_bytes())
            .chain(domain_first.to_le_bytes())
            .chain(domain_last.to_le_bytes())
            .chain(spec::PROBE_SIZE.to_le_bytes())
            .chain([u8::from(self.read().bypass), 0, 0, 0]);
        let mut bytes = [0; spec::CONFIG_SIZE];
        for (byte, value) in bytes.iter_mut().zip(fields) {
            *byte = value;
        }
        bytes
    }

    /// The driver wrote `bypass` of the configuration: what becomes of
    /// endpoints that are attached to no domain. Ignored without
    /// `BYPASS_CONFIG`, and for values other than 0 and 1 (§5.13.4.2).
    pub fn set_bypass(&self, value: u8) {
        let mut pending = self.command();
        let bypass = value == 1;
        {
            let mut state = self.write();
            if value > 1 || state.features & feature::BYPASS_CONFIG == 0 || state.bypass == bypass {
                return;
            }
            state.bypass = bypass;
        }
        self.flush_pending(&mut pending);
        let detached: Vec<_> = self
            .read()
            .endpoints
            .values()
            .filter(|endpoint| endpoint.domain.is_none())
            .filter_map(|endpoint| endpoint.sink.upgrade())
            .collect();
        for region in detached {
            region.reload();
        }
    }

    /// Back to before negotiation: no domain, no mapping. `bypass` keeps its
    /// value (§5.13.5).
    pub fn reset(&self) {
        let mut pending = self.command();
        pending.ranges.clear();
        let (attached, gone) = {
            let mut state = self.write();
            state.features = 0;
            state.mapped = 0;
            let gone = std::mem::take(&mut state.domains);
            let endpoints = state.endpoints.values_mut();
            let attached: Vec<_> = endpoints
                .filter_map(|endpoint| endpoint.domain.take().and(endpoint.sink.upgrade()))
                .collect();
            (attached, gone)
        };
        for region in attached {
            region.reload();
        }
        for domain in gone.into_values() {
            domain.mappings.discard(&mut pending.removed);
        }
    }

    /// Carries out one request and writes the properties and the tail to the
    /// front of `reply`, the request's device-writable part. Returns how many
    /// bytes of it are written. 0: the request is returned unwritten and
    /// nothing was done, because its type is unknown, its feature is not
    /// negotiated, or the tail has no room.
    ///
    /// The request may be shown as used after the next [`flush`](Self::flush),
    /// not before: unmapped ranges wait for it, so that neighbours are
    /// invalidated together.
    #[must_use]
    pub fn handle(&self, request: &[u8], reply: &mut [u8]) -> usize {
        let Some(&kind) = request.first().filter(|kind| self.is_available(**kind)) else {
            return 0;
        };
        let Some(size) = reply_size(kind, reply.len()) else {
            return 0;
        };
        let reply = reply.get_mut(..size).unwrap_or_default();
        reply.fill(0);
        let Some((properties, tail)) = reply.split_last_chunk_mut::<{ spec::request::TAIL_SIZE }>()
        else {
            return 0;
        };
        let status =
            match Request::parse(request).and_then(|parsed| self.execute(parsed, properties)) {
                Ok(()) => Status::Ok,
                Err(status) => status,
            };
        tail[0] = status as u8;
        size
    }

    /// Whether a request of this type exists and needs no feature that was not
    /// negotiated.
    fn is_available(&self, kind: u8) -> bool {
        needed_feature(kind).is_some_and(|needs| needs & !self.read().features == 0)
    }

    /// Completes every request that was handled: when it returns, no consumer
    /// uses what they unmapped.
    pub fn flush(&self) {
        self.flush_pending(&mut self.command());
    }

    /// How an endpoint stands; `None` when there is no such endpoint.
    #[must_use]
    pub fn endpoint(&self, stream: StreamId) -> Option<EndpointState> {
        let state = self.read();
        let endpoint = state.endpoints.get(&stream)?;
        let domain = endpoint.domain.and_then(|id| state.domains.get(&id));
        Some(EndpointState {
            domain: endpoint.domain,
            bypass: domain.map_or(state.bypass, |domain| domain.bypass),
            mappings: domain.map_or(0, |domain| domain.mappings.len()),
        })
    }

    /// Up to `limit` mappings of an endpoint from `from` on, in order.
    #[must_use]
    pub fn mappings(&self, stream: StreamId, from: Iova, limit: usize) -> Vec<Mapping> {
        let range = IovaRange::new(from, Iova(u64::MAX));
        range.map_or(Vec::new(), |range| self.mappings_in(stream, range, limit))
    }

    /// Up to `limit` mappings of an endpoint that overlap `range`, in order.
    fn mappings_in(&self, stream: StreamId, range: IovaRange, limit: usize) -> Vec<Mapping> {
        let state = self.read();
        match state.view(stream) {
            View::Bypass => ram_blocks(&self.ram)
                .filter(|block| block.iova.overlaps(range))
                .take(limit)
                .collect(),
            View::Domain(domain) => domain.mappings.iter(range).take(limit).collect(),
            View::Blocked => Vec::new(),
        }
    }

    /// How many mappings all domains hold together.
    #[must_use]
    pub fn mapped(&self) -> usize {
        self.read().mapped
    }

    fn execute(&self, parsed: Request, properties: &mut [u8]) -> Result<(), Status> {
        let mut pending = self.command();
        pending.removed.free(FREED_CHUNKS);
        match parsed {
            Request::Attach {
                domain,
                endpoint,
                flags,
            } => {
                self.flush_pending(&mut pending);
                let moved = self.write().attach(domain, endpoint, flags)?;
                if let Some(moved) = moved {
                    self.moved(&mut pending, moved);
                }
                Ok(())
            }
            Request::Detach { domain, endpoint } => {
                self.flush_pending(&mut pending);
                let moved = self.write().detach(domain, endpoint)?;
                self.moved(&mut pending, moved);
                Ok(())
            }
            Request::Map {
                domain,
                first,
                last,
                gpa,
                flags,
            } => {
                let iova = IovaRange::new(first, last).map_err(|_| Status::Inval)?;
                // What is mapped anew must not be dropped with what was there.
                if pending.ranges.iter().any(|gone| gone.overlaps(iova)) {
                    self.flush_pending(&mut pending);
                }
                let perm = perm_of(flags);
                let mapping = Mapping { iova, gpa, perm };
                self.map(&pending, domain, mapping, flags)
            }
            Request::Unmap {
                domain,
                first,
                last,
            } => {
                let range = IovaRange::new(first, last).map_err(|_| Status::Inval)?;
                let removed = &mut pending.removed;
                let any = self.write().unmap(domain, range, removed)?;
                if any {
                    self.postpone(&mut pending, domain, range);
                }
                Ok(())
            }
            Request::Probe { endpoint } => self.probe(endpoint, properties),
        }
    }

    /// Drops the old view of an endpoint everywhere and shows the new one.
    fn moved(&self, pending: &mut Pending, moved: Moved) {
        if let Some(region) = moved.sink {
            region.reload();
        }
        if let Some(domain) = moved.gone {
            domain.mappings.discard(&mut pending.removed);
        }
    }

    fn map(&self, pending: &Pending, id: u32, mapping: Mapping, flags: u32) -> Result<(), Status> {
        let unfreed = pending.removed.len();
        let regions = {
            let mut state = self.write();
            state.map(&self.config, unfreed, id, mapping, flags)?;
            state.attached(id)
        };
        for region in regions {
            region.map(&mapping);
        }
        Ok(())
    }

    /// §5.13.6.7.2
    fn probe(&self, stream: StreamId, properties: &mut [u8]) -> Result<(), Status> {
        // No property is written where all of them have no room (§5.13.6.7.2).
        if properties.len() < spec::PROBE_SIZE as usize {
            return Err(Status::Inval);
        }
        if !self.read().endpoints.contains_key(&stream) {
            return Err(Status::Noent);
        }
        if let Some(window) = self.config.msi_window {
            let fields = property::RESV_MEM
                .to_le_bytes()
                .into_iter()
                .chain(property::RESV_MEM_SIZE.to_le_bytes())
                .chain([property::RESV_MEM_MSI, 0, 0, 0])
                .chain(window.first().0.to_le_bytes())
                .chain(window.last().0.to_le_bytes());
            for (byte, value) in properties.iter_mut().zip(fields) {
                *byte = value;
            }
        }
        Ok(())
    }

    /// Keeps an unmapped range for one invalidation with its neighbours.
    fn postpone(&self, pending: &mut Pending, domain: u32, range: IovaRange) {
        if pending.domain != domain || pending.ranges.len() >= MAX_PENDING {
            self.flush_pending(pending);
        }
        pending.domain = domain;
        range.push_joined(&mut pending.ranges);
    }

    fn flush_pending(&self, pending: &mut Pending) {
        if pending.ranges.is_empty() {
            return;
        }
        let regions = self.read().attached(pending.domain);
        for region in regions {
            region.invalidate(&pending.ranges);
        }
        pending.ranges.clear();
    }

    fn resolve(&self, request: &crate::Request) -> Result<Mapping, (Fault, u8)> {
        let fault = |reason, report| {
            let fault = Fault {
                stream: request.stream,
                iova: request.iova,
                access: request.access,
                reason,
            };
            (fault, report)
        };
        let state = self.read();
        let mapping = match state.view(request.stream) {
            View::Blocked => {
                return Err(fault(
                    FaultReason::Configuration,
                    spec::fault::REASON_DOMAIN,
                ));
            }
            View::Bypass => return Ok(identity_around(&self.ram, request.iova)),
            View::Domain(domain) => self
                .msi(request.iova)
                .or_else(|| domain.mappings.find(request.iova)),
        };
        match mapping {
            Some(mapping) if mapping.perm.allows(request.access) => Ok(mapping),
            Some(_) => Err(fault(FaultReason::Permission, spec::fault::REASON_MAPPING)),
            None => Err(fault(FaultReason::Translation, spec::fault::REASON_MAPPING)),
        }
    }

    /// The untranslated window of message-signalled interrupts, around `iova`.
    fn msi(&self, iova: Iova) -> Option<Mapping> {
        let window = self
            .config
            .msi_window
            .filter(|window| window.contains(iova))?;
        Some(Mapping {
            iova: window,
            gpa: Gpa(window.first().0),
            perm: Perm::WRITE,
        })
    }

    fn command(&self) -> MutexGuard<'_, Pending> {
        self.commands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read(&self) -> RwLockReadGuard<'_, State> {
        self.state.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, State> {
        self.state.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Iommu for VirtioIommu {
    fn translate(&self, request: &crate::Request) -> Result<Mapping, Fault> {
        self.resolve(request).map_err(|(fault, reason)| {
            self.faults.report(&FaultReport {
                reason,
                endpoint: fault.stream,
                access: fault.access,
                address: fault.iova,
            });
            fault
        })
    }

    fn lookup(&self, request: &crate::Request) -> Result<Mapping, Fault> {
        self.resolve(request).map_err(|(fault, _)| fault)
    }

    fn notifier_events_changed(
        &self,
        _stream: StreamId,
        _old: NotifierEvents,
        new: NotifierEvents,
    ) -> Result<(), Refused> {
        let events = new.and(NotifierEvents::DEVIOTLB_UNMAP);
        if events.is_empty() {
            return Ok(());
        }
        Err(Refused {
            events,
            reason: "a virtio-iommu has no device IOTLB",
        })
    }

    fn replay(
        &self,
        stream: StreamId,
        range: IovaRange,
        visit: &mut dyn FnMut(&Mapping) -> ControlFlow<()>,
    ) {
        let mut rest = Some(range);
        while let Some(range) = rest {
            let piece = self.mappings_in(stream, range, REPLAY_PIECE);
            let next = piece.last().and_then(|m| m.iova.last().checked_add(1));
            let next = next.filter(|_| piece.len() == REPLAY_PIECE);
            rest = next.and_then(|next| IovaRange::new(next, range.last()).ok());
            for mapping in &piece {
                if visit(mapping).is_break() {
                    return;
                }
            }
        }
    }

    fn connect(&self, stream: StreamId, sink: Weak<dyn StreamSink>) {
        let endpoint = Endpoint { domain: None, sink };
        self.write().endpoints.insert(stream, endpoint);
    }
}

#[cfg(test)]
mod tests;
