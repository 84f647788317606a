//! Endpoints, domains and mappings, and the changes that requests make
//! (§5.13.6). The caller notifies, without the state's lock.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use super::domain::Domain;
use super::mappings::Removed;
use super::spec::{Features, Status, request};
use crate::addr::{Gpa, IovaRange, StreamId};
use crate::mapping::{Mapping, Perm};
use crate::notifier::StreamSink;

/// The smallest page, as a shift.
pub(super) const PAGE_SHIFT: u32 = 12;

/// Configuration that is fixed while the machine runs.
#[derive(Clone, Copy, Debug)]
pub struct VirtioIommuConfig {
    /// I/O virtual addresses that endpoints may use, both ends inclusive.
    pub input_range: IovaRange,
    /// Doorbell addresses of MSIs that are not translated (x86); `None` when
    /// MSIs are translated.
    pub msi_window: Option<IovaRange>,
    /// Initial value of `bypass` in the configuration.
    pub boot_bypass: bool,
    /// Upper bound on the mappings of all domains together, those that are
    /// removed and not yet freed included. A mapping costs 32 to 87 bytes.
    pub max_mappings: usize,
}

/// An endpoint, and the domain that it is attached to.
pub(super) struct Endpoint {
    pub domain: Option<u32>,
    pub sink: Weak<dyn StreamSink>,
}

/// The state that the executor's state lock protects.
#[derive(Default)]
pub(super) struct State {
    /// Negotiated feature bits.
    pub features: Features,
    /// `bypass` of the configuration.
    pub bypass: bool,
    pub endpoints: BTreeMap<StreamId, Endpoint>,
    pub domains: BTreeMap<u32, Domain>,
    /// Number of mappings of all domains.
    pub mapped: usize,
}

/// Address space of an endpoint.
pub(super) enum View<'a> {
    Blocked,
    Bypass,
    Domain(&'a Domain),
}

/// An endpoint whose address space was replaced.
#[derive(Default)]
pub(super) struct Moved {
    pub sink: Option<Arc<dyn StreamSink>>,
    /// The domain that ceased to exist.
    pub gone: Option<Domain>,
}

impl State {
    /// Address space of an endpoint.
    pub(super) fn view(&self, stream: StreamId) -> View<'_> {
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

    /// The sinks of the endpoints that are attached to a domain.
    pub(super) fn attached(&self, domain: u32) -> Vec<Arc<dyn StreamSink>> {
        let domain = self.domains.get(&domain);
        let streams = domain.into_iter().flat_map(|domain| &domain.endpoints);
        streams
            .filter_map(|stream| self.endpoints.get(stream)?.sink.upgrade())
            .collect()
    }

    fn has(&self, feature: Features) -> bool {
        self.features.contains(feature)
    }

    /// Executes ATTACH (§5.13.6.3.2). `None`: it was attached to that domain.
    pub(super) fn attach(
        &mut self,
        id: u32,
        stream: StreamId,
        flags: u32,
    ) -> Result<Option<Moved>, Status> {
        let has_bypass = self.has(Features::BYPASS_CONFIG);
        let known = if has_bypass {
            request::ATTACH_BYPASS
        } else {
            0
        };
        if flags & !known != 0 {
            return Err(Status::Inval);
        }
        let bypass = flags & request::ATTACH_BYPASS != 0;
        let endpoint = self.endpoints.get(&stream).ok_or(Status::Noent)?;
        let is_other = |domain: &Domain| domain.bypass != bypass;
        if self.domains.get(&id).is_some_and(is_other) {
            return Err(Status::Inval);
        }
        if endpoint.domain == Some(id) {
            return Ok(None);
        }
        let moved = self.leave(stream);
        let domain = self.domains.entry(id).or_default();
        domain.bypass = bypass;
        domain.endpoints.insert(stream);
        if let Some(endpoint) = self.endpoints.get_mut(&stream) {
            endpoint.domain = Some(id);
        }
        Ok(Some(moved))
    }

    /// Executes DETACH (§5.13.6.4.2).
    pub(super) fn detach(&mut self, id: u32, stream: StreamId) -> Result<Moved, Status> {
        let endpoint = self.endpoints.get(&stream).ok_or(Status::Noent)?;
        if endpoint.domain != Some(id) {
            return Err(Status::Inval);
        }
        Ok(self.leave(stream))
    }

    /// Executes MAP (§5.13.6.5.2). `unfreed` is the number of removed mappings
    /// whose memory still counts against `max_mappings`.
    pub(super) fn map(
        &mut self,
        config: &VirtioIommuConfig,
        unfreed: usize,
        id: u32,
        mapping: Mapping,
        flags: u32,
    ) -> Result<(), Status> {
        let mmio = if self.has(Features::MMIO) {
            request::MAP_MMIO
        } else {
            0
        };
        let domain = self.domains.get_mut(&id).ok_or(Status::Noent)?;
        let known = request::MAP_READ | request::MAP_WRITE | mmio;
        if flags & !known != 0 || domain.bypass {
            return Err(Status::Inval);
        }
        let Mapping { iova, gpa, .. } = mapping;
        if !is_aligned(iova, gpa) || !config.input_range.covers(iova) {
            return Err(Status::Range);
        }
        if gpa.checked_add(iova.extent()).is_none() {
            return Err(Status::Range);
        }
        let reserved = config.msi_window;
        if reserved.is_some_and(|window| window.overlaps(iova)) {
            return Err(Status::Inval);
        }
        if self.mapped.saturating_add(unfreed) >= config.max_mappings {
            return Err(Status::Nomem);
        }
        domain.mappings.insert(mapping)?;
        self.mapped += 1;
        Ok(())
    }

    /// Executes UNMAP (§5.13.6.6.2). Returns whether there was a mapping. The
    /// ends of the range need no alignment, and it may exceed the input range.
    pub(super) fn unmap(
        &mut self,
        id: u32,
        iova: IovaRange,
        removed: &mut Removed,
    ) -> Result<bool, Status> {
        let domain = self.domains.get_mut(&id).ok_or(Status::Noent)?;
        if domain.bypass {
            return Err(Status::Inval);
        }
        let count = domain.mappings.remove(iova, removed)?;
        self.mapped -= count;
        Ok(count != 0)
    }

    /// Removes an endpoint from its domain. A domain without endpoints is
    /// removed with its mappings.
    fn leave(&mut self, stream: StreamId) -> Moved {
        let Some(endpoint) = self.endpoints.get_mut(&stream) else {
            return Moved::default();
        };
        let (sink, id) = (endpoint.sink.upgrade(), endpoint.domain.take());
        let left = id.and_then(|id| Some((id, self.domains.get_mut(&id)?)));
        let gone = left.and_then(|(id, domain)| {
            domain.endpoints.remove(&stream);
            let empty = domain.endpoints.is_empty();
            empty.then_some(id)
        });
        let gone = gone.and_then(|id| self.domains.remove(&id));
        self.mapped -= gone.as_ref().map_or(0, |domain| domain.mappings.len());
        Moved { sink, gone }
    }
}

/// Whether both ends and the target of a mapping are aligned to pages.
fn is_aligned(iova: IovaRange, gpa: Gpa) -> bool {
    let mask = (1_u64 << PAGE_SHIFT) - 1;
    (iova.first().0 | gpa.0) & mask == 0 && iova.last().0 & mask == mask
}

/// The permissions that the flags of a MAP request encode.
pub(super) fn perm_of(flags: u32) -> Perm {
    let perm = |flag, perm| {
        if flags & flag != 0 {
            perm
        } else {
            Perm::empty()
        }
    };
    perm(request::MAP_READ, Perm::READ) | perm(request::MAP_WRITE, Perm::WRITE)
}
