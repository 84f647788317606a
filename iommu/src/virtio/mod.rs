//! The virtio-iommu as a model (virtio 1.2 §5.13): domains, mappings and
//! endpoints. The crate `devices` has its queues and registers.

mod domain;
mod execute;
mod mappings;
pub mod spec;
mod state;
mod wire;

use std::ops::ControlFlow;
use std::sync::{Arc, Weak};

use serde::Serialize;

use self::execute::Executor;
use self::spec::Features;
pub use self::state::VirtioIommuConfig;
use self::state::{Endpoint, PAGE_SHIFT, View};
pub use self::wire::{FaultReport, FaultSink, Request};
use crate::addr::{Gpa, Iova, IovaRange, StreamId};
use crate::mapping::{Mapping, Perm};
use crate::notifier::{NotifierEvents, Refused, StreamSink};
use crate::ram::GuestRam;
use crate::ram::{identity_around, ram_blocks};
use crate::translate::{Fault, FaultReason, Iommu};

/// Upper bound on mappings of a replay that are copied under the state lock.
const REPLAY_PIECE: usize = 256;

/// Status of an endpoint, for the API.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EndpointState {
    /// ID of its domain; `None` when it is not attached.
    pub domain: Option<u32>,
    /// Whether its addresses are guest-physical.
    pub bypass: bool,
    /// Number of mappings of its domain.
    pub mappings: usize,
}

/// The model. [`handle`](Self::handle) executes requests; their effects are
/// complete when [`flush`](Self::flush) has returned.
pub struct VirtioIommu {
    ram: Arc<GuestRam>,
    faults: Arc<dyn FaultSink>,
    executor: Executor,
}

impl VirtioIommu {
    /// A virtio-iommu without a driver.
    #[must_use]
    pub fn new(config: VirtioIommuConfig, ram: Arc<GuestRam>, faults: Arc<dyn FaultSink>) -> Self {
        Self {
            ram,
            faults,
            executor: Executor::new(config),
        }
    }

    /// Feature bits that the device offers (§5.13.3).
    #[must_use]
    pub const fn features(&self) -> Features {
        Features::all()
    }

    /// Feature bits that were negotiated; none before that.
    #[must_use]
    pub fn negotiated_features(&self) -> Features {
        self.executor.state.read().features
    }

    /// Records that the driver accepted `features`.
    pub fn negotiated(&self, features: Features) {
        self.executor.state.write().features = features;
    }

    /// The device configuration (§5.13.4).
    #[must_use]
    pub fn config_space(&self) -> [u8; spec::CONFIG_SIZE] {
        let bypass = self.executor.state.read().bypass;
        wire::config_space(self.executor.config().input_range, PAGE_SHIFT, bypass)
    }

    /// Changes `bypass` of the configuration for the driver: whether endpoints
    /// without a domain bypass. Ignored without `BYPASS_CONFIG`, and for values
    /// other than 0 and 1 (§5.13.4.2).
    pub fn set_bypass(&self, value: u8) {
        self.executor.set_bypass(value);
    }

    /// Returns to the state before negotiation, without domains. `bypass` keeps
    /// its value (§5.13.5).
    pub fn reset(&self) {
        self.executor.reset();
    }

    /// Executes one request and writes the properties and the tail to the front
    /// of `reply`, the request's device-writable part. Returns the number of
    /// bytes written. 0 means that nothing was done: the type is unknown, its
    /// feature is not negotiated, or the tail does not fit.
    ///
    /// The request may go to the used ring only after the next
    /// [`flush`](Self::flush): unmapped ranges are pending until then, so that
    /// adjacent ones are invalidated together.
    #[must_use]
    pub fn handle(&self, request: &[u8], reply: &mut [u8]) -> usize {
        self.executor.handle(request, reply)
    }

    /// Completes every handled request: when it returns, no consumer uses a
    /// mapping that they removed.
    pub fn flush(&self) {
        self.executor.flush();
    }

    /// Status of an endpoint; `None` for a stream that is not connected.
    #[must_use]
    pub fn endpoint(&self, stream: StreamId) -> Option<EndpointState> {
        let state = self.executor.state.read();
        let endpoint = state.endpoints.get(&stream)?;
        let domain = endpoint.domain.and_then(|id| state.domains.get(&id));
        Some(EndpointState {
            domain: endpoint.domain,
            bypass: domain.map_or(state.bypass, |domain| domain.bypass),
            mappings: domain.map_or(0, |domain| domain.mappings.len()),
        })
    }

    /// Up to `limit` mappings of an endpoint from `from` on, in ascending
    /// order.
    #[must_use]
    pub fn mappings(&self, stream: StreamId, from: Iova, limit: usize) -> Vec<Mapping> {
        let range = IovaRange::new(from, Iova(u64::MAX));
        range.map_or(Vec::new(), |range| self.mappings_in(stream, range, limit))
    }

    /// Up to `limit` mappings of an endpoint that overlap `range`, in ascending
    /// order.
    fn mappings_in(&self, stream: StreamId, range: IovaRange, limit: usize) -> Vec<Mapping> {
        let state = self.executor.state.read();
        match state.view(stream) {
            View::Bypass => ram_blocks(&self.ram)
                .filter(|block| block.iova.overlaps(range))
                .take(limit)
                .collect(),
            View::Domain(domain) => domain.mappings.iter(range).take(limit).collect(),
            View::Blocked => Vec::new(),
        }
    }

    /// Number of mappings of all domains.
    #[must_use]
    pub fn mapped(&self) -> usize {
        self.executor.state.read().mapped
    }

    fn resolve(&self, request: &crate::translate::Request) -> Result<Mapping, (Fault, u8)> {
        let fault = |reason, report| (Fault::new(request, reason), report);
        let state = self.executor.state.read();
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

    /// The identity mapping of the MSI window, if `iova` is in it.
    fn msi(&self, iova: Iova) -> Option<Mapping> {
        let window = self
            .executor
            .config()
            .msi_window
            .filter(|window| window.contains(iova))?;
        Some(Mapping {
            iova: window,
            gpa: Gpa(window.first().0),
            perm: Perm::WRITE,
        })
    }
}

impl Iommu for VirtioIommu {
    fn translate(&self, request: &crate::translate::Request) -> Result<Mapping, Fault> {
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

    fn lookup(&self, request: &crate::translate::Request) -> Result<Mapping, Fault> {
        self.resolve(request).map_err(|(fault, _)| fault)
    }

    fn notifier_events_changed(
        &self,
        _stream: StreamId,
        _old: NotifierEvents,
        new: NotifierEvents,
    ) -> Result<(), Refused> {
        let events = new & NotifierEvents::DEVIOTLB_UNMAP;
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
        self.executor
            .state
            .write()
            .endpoints
            .insert(stream, endpoint);
    }
}

#[cfg(test)]
mod tests;
