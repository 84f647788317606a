//! Execution of requests: changes of the state, and the notifications that
//! complete them (virtio 1.2 §5.13.6).

use super::mappings::Removed;
use super::spec::{self, Features, Status};
use super::state::{Moved, State, VirtioIommuConfig, perm_of};
use super::wire::{Request, needed_feature, reply_size, write_msi_window};
use crate::addr::{IovaRange, StreamId};
use crate::lock::{RankedMutex, RankedRwLock};
use crate::mapping::Mapping;

/// Chunks of removed mappings that are freed in each request: about 50 µs.
const FREED_CHUNKS: usize = 32;
/// Upper bound on unmapped ranges that wait for one invalidation.
const MAX_PENDING: usize = 64;
/// Ranges of one domain that are unmapped and not yet invalidated, and mappings
/// that are removed and not yet freed. Its lock is the command lock, which a
/// vCPU holds while it executes a request.
#[derive(Debug, Default)]
struct Pending {
    domain: u32,
    ranges: Vec<IovaRange>,
    removed: Removed,
}

/// The state, and the requests that change it.
pub(super) struct Executor {
    config: VirtioIommuConfig,
    pending: RankedMutex<Pending, 4>,
    pub(super) state: RankedRwLock<State, 9>,
}

impl Executor {
    /// The state without a driver.
    pub(super) fn new(config: VirtioIommuConfig) -> Self {
        Self {
            config,
            pending: RankedMutex::default(),
            state: RankedRwLock::new(State {
                bypass: config.boot_bypass,
                ..State::default()
            }),
        }
    }

    pub(super) fn config(&self) -> &VirtioIommuConfig {
        &self.config
    }

    /// Changes `bypass` of the configuration (§5.13.4.2).
    pub(super) fn set_bypass(&self, value: u8) {
        let mut pending = self.pending.lock();
        let bypass = value == 1;
        {
            let mut state = self.state.write();
            if value > 1
                || !state.features.contains(Features::BYPASS_CONFIG)
                || state.bypass == bypass
            {
                return;
            }
            state.bypass = bypass;
        }
        self.flush_pending(&mut pending);
        let detached: Vec<_> = self
            .state
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

    /// Returns to the state before negotiation, without domains. `bypass` keeps
    /// its value (§5.13.5).
    pub(super) fn reset(&self) {
        let mut pending = self.pending.lock();
        pending.ranges.clear();
        let (attached, gone) = {
            let mut state = self.state.write();
            state.features = Features::empty();
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

    /// Executes one request and writes the properties and the tail to the front
    /// of `reply`, the request's device-writable part. Returns the number of
    /// bytes written. 0 means that nothing was done: the type is unknown, its
    /// feature is not negotiated, or the tail does not fit.
    ///
    /// The request may go to the used ring only after the next
    /// [`flush`](Self::flush): unmapped ranges are pending until then, so that
    /// adjacent ones are invalidated together.
    pub(super) fn handle(&self, request: &[u8], reply: &mut [u8]) -> usize {
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
        needed_feature(kind).is_some_and(|needs| self.state.read().features.contains(needs))
    }

    /// Completes every handled request: when it returns, no consumer uses a
    /// mapping that they removed.
    pub(super) fn flush(&self) {
        self.flush_pending(&mut self.pending.lock());
    }

    fn execute(&self, parsed: Request, properties: &mut [u8]) -> Result<(), Status> {
        let mut pending = self.pending.lock();
        pending.removed.free(FREED_CHUNKS);
        match parsed {
            Request::Attach {
                domain,
                endpoint,
                flags,
            } => {
                self.flush_pending(&mut pending);
                let moved = self.state.write().attach(domain, endpoint, flags)?;
                if let Some(moved) = moved {
                    self.moved(&mut pending, moved);
                }
                Ok(())
            }
            Request::Detach { domain, endpoint } => {
                self.flush_pending(&mut pending);
                let moved = self.state.write().detach(domain, endpoint)?;
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
                // A new mapping must not be dropped by a pending invalidation.
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
                let any = self.state.write().unmap(domain, range, removed)?;
                if any {
                    self.postpone(&mut pending, domain, range);
                }
                Ok(())
            }
            Request::Probe { endpoint } => self.probe(endpoint, properties),
        }
    }

    /// Invalidates the old view of an endpoint and replays the new one.
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
            let mut state = self.state.write();
            state.map(&self.config, unfreed, id, mapping, flags)?;
            state.attached(id)
        };
        for region in regions {
            region.map(&mapping);
        }
        Ok(())
    }

    /// Executes PROBE (§5.13.6.7.2). `properties` is all zeros.
    fn probe(&self, stream: StreamId, properties: &mut [u8]) -> Result<(), Status> {
        // No property is written where not all of them fit (§5.13.6.7.2).
        if properties.len() < spec::PROBE_SIZE as usize {
            return Err(Status::Inval);
        }
        if !self.state.read().endpoints.contains_key(&stream) {
            return Err(Status::Noent);
        }
        if let Some(window) = self.config.msi_window {
            write_msi_window(properties, window);
        }
        Ok(())
    }

    /// Adds an unmapped range to the pending invalidation.
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
        let regions = self.state.read().attached(pending.domain);
        for region in regions {
            region.invalidate(&pending.ranges);
        }
        pending.ranges.clear();
    }
}
