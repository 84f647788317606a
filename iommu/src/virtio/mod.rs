//! The virtio-iommu as a model (virtio 1.2 §5.13): domains, mappings and
//! endpoints. Its queues and registers are the transport's business.

mod domain;
mod request;
pub mod spec;

use std::collections::BTreeMap;
use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak,
};

use serde::Serialize;

use self::domain::Domain;
pub use self::request::Request;
use self::request::{needed_feature, reply_size};
use self::spec::{Status, feature, property};
use crate::space::{identity_around, ram_blocks};
use crate::{
    Access, Fault, FaultReason, Gpa, GuestRam, Iommu, IommuRegion, Iova, IovaRange, Mapping,
    NotifierEvents, Perm, Refused, StreamId,
};

/// Most mappings of a domain, and of all domains together. A mapping costs
/// about 50 bytes, so a guest cannot make us hold more than some 100 MB.
pub const MAX_DOMAIN_MAPPINGS: usize = 1 << 20;
/// See [`MAX_DOMAIN_MAPPINGS`].
pub const MAX_MAPPINGS: usize = 1 << 21;
/// Unmapped ranges that wait for one invalidation, at most.
const MAX_PENDING: usize = 64;
/// The smallest page, as a shift.
const PAGE_SHIFT: u32 = 12;

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
}

/// A fault report as the event queue carries it (§5.13.6.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultReport {
    /// [`spec::fault::REASON_DOMAIN`] or [`spec::fault::REASON_MAPPING`].
    pub reason: u8,
    /// Who did it.
    pub endpoint: StreamId,
    /// What it wanted to do.
    pub access: Access,
    /// Where.
    pub address: Iova,
}

impl FaultReport {
    /// The bytes of the report.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; spec::fault::SIZE] {
        let access = match self.access {
            Access::Read => spec::fault::READ,
            Access::Write => spec::fault::WRITE,
        };
        let mut bytes = [0; spec::fault::SIZE];
        let fields = u32::from(self.reason)
            .to_le_bytes()
            .into_iter()
            .chain((access | spec::fault::ADDRESS).to_le_bytes())
            .chain(self.endpoint.0.to_le_bytes())
            .chain([0; 4])
            .chain(self.address.0.to_le_bytes());
        for (byte, value) in bytes.iter_mut().zip(fields) {
            *byte = value;
        }
        bytes
    }
}

/// Takes fault reports to the event queue. Called with the stream's gate held
/// and no lock of the model: it must not translate.
pub trait FaultSink: Send + Sync {
    /// Reports, or drops the report when the driver left no buffer for it.
    fn report(&self, report: &FaultReport);
}

#[derive(Debug, Default)]
struct Endpoint {
    domain: Option<u32>,
    region: Weak<IommuRegion>,
}

/// What the driver has set up.
#[derive(Debug)]
struct State {
    features: u64,
    bypass: bool,
    endpoints: BTreeMap<StreamId, Endpoint>,
    domains: BTreeMap<u32, Domain>,
    mapped: usize,
}

/// Ranges of one domain that are unmapped and not yet invalidated. Also the
/// command lock: whoever carries out a request holds it.
#[derive(Debug, Default)]
struct Pending {
    domain: u32,
    ranges: Vec<IovaRange>,
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
                features: 0,
                bypass: config.boot_bypass,
                endpoints: BTreeMap::new(),
                domains: BTreeMap::new(),
                mapped: 0,
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
            .filter_map(|endpoint| endpoint.region.upgrade())
            .collect();
        for region in detached {
            self.reload(&region);
        }
    }

    /// Back to before negotiation: no domain, no mapping. `bypass` keeps its
    /// value (§5.13.5).
    pub fn reset(&self) {
        let mut pending = self.command();
        pending.ranges.clear();
        let attached: Vec<_> = {
            let mut state = self.write();
            state.features = 0;
            state.domains.clear();
            state.mapped = 0;
            state
                .endpoints
                .values_mut()
                .filter_map(|endpoint| endpoint.domain.take().and(endpoint.region.upgrade()))
                .collect()
        };
        for region in attached {
            self.reload(&region);
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
        let state = self.read();
        let Some(range) = IovaRange::new(from, Iova(u64::MAX)).ok() else {
            return Vec::new();
        };
        match state.view(stream) {
            View::Bypass => ram_blocks(&self.ram)
                .filter(|m| m.iova.last() >= from)
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
        match parsed {
            Request::Attach {
                domain,
                endpoint,
                flags,
            } => {
                self.flush_pending(&mut pending);
                self.attach(domain, endpoint, flags)
            }
            Request::Detach { domain, endpoint } => {
                self.flush_pending(&mut pending);
                self.detach(domain, endpoint)
            }
            Request::Map {
                domain,
                first,
                last,
                gpa,
                flags,
            } => {
                let range = IovaRange::new(first, last).map_err(|_| Status::Inval)?;
                // What is mapped anew must not be dropped with what was there.
                if pending.ranges.iter().any(|gone| gone.overlaps(range)) {
                    self.flush_pending(&mut pending);
                }
                self.map(domain, range, gpa, flags)
            }
            Request::Unmap {
                domain,
                first,
                last,
            } => {
                let range = IovaRange::new(first, last).map_err(|_| Status::Inval)?;
                self.unmap(&mut pending, domain, range)
            }
            Request::Probe { endpoint } => self.probe(endpoint, properties),
        }
    }

    /// §5.13.6.3.2
    fn attach(&self, id: u32, stream: StreamId, flags: u32) -> Result<(), Status> {
        let region = {
            let mut state = self.write();
            let bypass_domains = state.features & feature::BYPASS_CONFIG != 0;
            let known = if bypass_domains {
                spec::request::ATTACH_BYPASS
            } else {
                0
            };
            if flags & !known != 0 {
                return Err(Status::Inval);
            }
            let bypass = flags & spec::request::ATTACH_BYPASS != 0;
            let endpoint = state.endpoints.get(&stream).ok_or(Status::Noent)?;
            let (region, old) = (endpoint.region.upgrade(), endpoint.domain);
            if state
                .domains
                .get(&id)
                .is_some_and(|domain| domain.bypass != bypass)
            {
                return Err(Status::Inval);
            }
            if old == Some(id) {
                return Ok(());
            }
            state.leave(stream);
            let domain = state.domains.entry(id).or_default();
            domain.bypass = bypass;
            domain.endpoints.insert(stream);
            if let Some(endpoint) = state.endpoints.get_mut(&stream) {
                endpoint.domain = Some(id);
            }
            region
        };
        if let Some(region) = region {
            self.reload(&region);
        }
        Ok(())
    }

    /// §5.13.6.4.2
    fn detach(&self, id: u32, stream: StreamId) -> Result<(), Status> {
        let region = {
            let mut state = self.write();
            let endpoint = state.endpoints.get(&stream).ok_or(Status::Noent)?;
            if endpoint.domain != Some(id) {
                return Err(Status::Inval);
            }
            let region = endpoint.region.upgrade();
            state.leave(stream);
            region
        };
        if let Some(region) = region {
            self.reload(&region);
        }
        Ok(())
    }

    /// §5.13.6.5.2
    fn map(&self, id: u32, iova: IovaRange, gpa: Gpa, flags: u32) -> Result<(), Status> {
        use spec::request::{MAP_MMIO, MAP_READ, MAP_WRITE};
        let regions = {
            let mut state = self.write();
            let mmio = if state.features & feature::MMIO != 0 {
                MAP_MMIO
            } else {
                0
            };
            let State {
                domains,
                endpoints,
                mapped,
                ..
            } = &mut *state;
            let domain = domains.get_mut(&id).ok_or(Status::Noent)?;
            if flags & !(MAP_READ | MAP_WRITE | mmio) != 0 || domain.bypass {
                return Err(Status::Inval);
            }
            self.check_range(iova)?;
            let fits = gpa.0 & ((1 << PAGE_SHIFT) - 1) == 0;
            if !fits || gpa.checked_add(iova.extent()).is_none() {
                return Err(Status::Range);
            }
            if self
                .config
                .msi_window
                .is_some_and(|window| window.overlaps(iova))
            {
                return Err(Status::Inval);
            }
            if domain.mappings.len() >= MAX_DOMAIN_MAPPINGS || *mapped >= MAX_MAPPINGS {
                return Err(Status::Nomem);
            }
            let mapping = Mapping {
                iova,
                gpa,
                perm: perm_of(flags),
            };
            domain.mappings.insert(mapping)?;
            *mapped += 1;
            let regions = domain
                .endpoints
                .iter()
                .filter_map(|stream| endpoints.get(stream)?.region.upgrade());
            regions.map(|region| (region, mapping)).collect::<Vec<_>>()
        };
        for (region, mapping) in regions {
            region.map(&mapping);
        }
        Ok(())
    }

    /// §5.13.6.6.2
    fn unmap(&self, pending: &mut Pending, id: u32, iova: IovaRange) -> Result<(), Status> {
        let removed = {
            let mut state = self.write();
            let domain = state.domains.get_mut(&id).ok_or(Status::Noent)?;
            if domain.bypass {
                return Err(Status::Inval);
            }
            let removed = domain.mappings.remove(iova)?;
            state.mapped -= removed;
            removed
        };
        if removed != 0 {
            self.postpone(pending, id, iova);
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

    /// Alignment and input range of MAP. UNMAP has neither rule.
    fn check_range(&self, iova: IovaRange) -> Result<(), Status> {
        let mask = (1_u64 << PAGE_SHIFT) - 1;
        let aligned = iova.first().0 & mask == 0 && iova.last().0 & mask == mask;
        if aligned && self.config.input_range.covers(iova) {
            Ok(())
        } else {
            Err(Status::Range)
        }
    }

    /// Keeps an unmapped range for one invalidation with its neighbours.
    fn postpone(&self, pending: &mut Pending, domain: u32, range: IovaRange) {
        if pending.domain != domain || pending.ranges.len() >= MAX_PENDING {
            self.flush_pending(pending);
        }
        pending.domain = domain;
        match pending.ranges.last_mut() {
            Some(last) if last.joined(range).is_some() => {
                *last = last.joined(range).unwrap_or(range);
            }
            _ => pending.ranges.push(range),
        }
    }

    fn flush_pending(&self, pending: &mut Pending) {
        if pending.ranges.is_empty() {
            return;
        }
        let regions: Vec<_> = {
            let state = self.read();
            let domain = state.domains.get(&pending.domain);
            let streams = domain.into_iter().flat_map(|domain| &domain.endpoints);
            streams
                .filter_map(|stream| state.endpoints.get(stream)?.region.upgrade())
                .collect()
        };
        for region in regions {
            region.invalidate(&pending.ranges);
        }
        pending.ranges.clear();
    }

    /// The stream has another view of memory than before: drops the old one
    /// everywhere and shows the new one.
    fn reload(&self, region: &IommuRegion) {
        region.invalidate_all();
        let mut mappings = Vec::new();
        self.replay(region.stream(), IovaRange::ALL, &mut |mapping| {
            mappings.push(*mapping)
        });
        for mapping in &mappings {
            region.map(mapping);
        }
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

fn perm_of(flags: u32) -> Perm {
    let read = if flags & spec::request::MAP_READ != 0 {
        Perm::READ
    } else {
        Perm::NONE
    };
    let write = if flags & spec::request::MAP_WRITE != 0 {
        Perm::WRITE
    } else {
        Perm::NONE
    };
    read | write
}

/// What an endpoint sees.
enum View<'a> {
    Blocked,
    Bypass,
    Domain(&'a Domain),
}

impl State {
    fn view(&self, stream: StreamId) -> View<'_> {
        let Some(endpoint) = self.endpoints.get(&stream) else {
            return View::Blocked;
        };
        match endpoint.domain.and_then(|id| self.domains.get(&id)) {
            Some(domain) if domain.bypass => View::Bypass,
            Some(domain) => View::Domain(domain),
            None if self.bypass => View::Bypass,
            None => View::Blocked,
        }
    }

    /// Takes an endpoint out of its domain. A domain without endpoints is gone,
    /// its mappings with it.
    fn leave(&mut self, stream: StreamId) {
        let endpoint = self.endpoints.get_mut(&stream);
        let Some(id) = endpoint.and_then(|endpoint| endpoint.domain.take()) else {
            return;
        };
        if let Some(domain) = self.domains.get_mut(&id) {
            domain.endpoints.remove(&stream);
            if domain.endpoints.is_empty() {
                self.mapped -= domain.mappings.len();
                self.domains.remove(&id);
            }
        }
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

    fn replay(&self, stream: StreamId, range: IovaRange, visit: &mut dyn FnMut(&Mapping)) {
        let state = self.read();
        match state.view(stream) {
            View::Blocked => {}
            View::Bypass => ram_blocks(&self.ram).for_each(|block| visit(&block)),
            View::Domain(domain) => domain
                .mappings
                .iter(range)
                .for_each(|mapping| visit(&mapping)),
        }
    }

    fn connect(&self, region: Weak<IommuRegion>) {
        let Some(stream) = region.upgrade().map(|region| region.stream()) else {
            return;
        };
        self.write().endpoints.insert(
            stream,
            Endpoint {
                domain: None,
                region,
            },
        );
    }
}

#[cfg(test)]
mod tests;
