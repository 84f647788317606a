//! Reports of the IOMMU and its endpoints, for the API.

use std::sync::atomic::{AtomicU64, Ordering};

use ::iommu::smmuv3::{Smmu, SmmuConfig, StreamMode};
use ::iommu::virtio::VirtioIommu;
use ::iommu::{Access, FaultReason, Iova, IovaRange, StreamId, StreamStats};
use arch::layout;
use devices::virtio::{BlockCounters, DeviceCounters};

use super::bus::PciBus;
use super::function::Function;
use super::iommu::IommuDevice;
use super::{smmuv3, vhost, virtio_iommu};
use crate::action::{
    Ats, DeviceKind, EndpointCounters, EndpointInfo, EndpointState, Feature, Hex, IommuInfo,
    Mapping, MappingsPage, MetricFamily, Permissions, Sample,
};
use crate::config::IommuModel;
use crate::plan::DevicePlan;

/// A metric of every endpoint: name, help text, and its counter.
type EndpointMetric = (&'static str, &'static str, fn(&EndpointCounters) -> u64);

const ENDPOINT_METRICS: [EndpointMetric; 7] = [
    (
        "portcullis_iommu_translations_total",
        "Translations asked of the IOMMU.",
        |counters| counters.translations,
    ),
    (
        "portcullis_iommu_hits_total",
        "Translations answered from the device's cache.",
        |counters| counters.hits,
    ),
    (
        "portcullis_iotlb_misses_total",
        "Misses that vhost's IOTLB reported.",
        |counters| counters.misses,
    ),
    (
        "portcullis_iotlb_updates_total",
        "Translations sent to vhost, prefills included.",
        |counters| counters.updates,
    ),
    (
        "portcullis_iotlb_prefills_total",
        "Translations sent to vhost before it missed them.",
        |counters| counters.prefills,
    ),
    (
        "portcullis_iotlb_invalidations_sent_total",
        "Invalidations sent to vhost.",
        |counters| counters.invalidations_sent,
    ),
    (
        "portcullis_iotlb_invalidations_saved_total",
        "Invalidations not sent, because vhost held nothing there.",
        |counters| counters.invalidations_saved,
    ),
];

/// A metric of every endpoint behind an IOMMU.
type StreamMetric = (&'static str, &'static str, fn(&StreamStats) -> u64);

/// Counters of [`StreamStats`] that [`EndpointCounters`] lacks.
const STREAM_METRICS: [StreamMetric; 2] = [
    (
        "portcullis_iommu_invalidations_total",
        "Invalidations that the IOMMU delivered for a device.",
        |stats| stats.invalidations,
    ),
    (
        "portcullis_iommu_maps_total",
        "Mappings that the IOMMU announced for a device.",
        |stats| stats.maps,
    ),
];

/// A metric of every disk.
type BlockMetric = (&'static str, &'static str, fn(&BlockCounters) -> &AtomicU64);

const BLOCK_METRICS: [BlockMetric; 4] = [
    (
        "portcullis_block_requests_total",
        "Requests of the guest to a disk.",
        |counters| &counters.requests,
    ),
    (
        "portcullis_block_errors_total",
        "Requests to a disk that failed.",
        |counters| &counters.errors,
    ),
    (
        "portcullis_block_read_bytes_total",
        "Bytes the guest read from a disk.",
        |counters| &counters.read_bytes,
    ),
    (
        "portcullis_block_written_bytes_total",
        "Bytes the guest wrote to a disk.",
        |counters| &counters.written_bytes,
    ),
];

impl PciBus {
    /// Metrics of the bus, by device.
    #[must_use]
    pub(crate) fn families(&self) -> Vec<MetricFamily> {
        let endpoints: Vec<_> = self
            .functions
            .iter()
            .filter_map(|f| self.endpoint(f))
            .collect();
        let mut families: Vec<_> = ENDPOINT_METRICS
            .iter()
            .map(|&(name, help, value)| {
                let all = endpoints.iter();
                let values = all.map(|it| (it.id.clone(), value(&it.counters)));
                MetricFamily::by("device", name, help, values)
            })
            .collect();
        let faults = endpoints.iter().flat_map(|endpoint| {
            let faults = endpoint.counters.faults.iter();
            faults.map(|(kind, &value)| Sample {
                labels: vec![("device", endpoint.id.clone()), ("type", kind.clone())],
                value,
            })
        });
        families.push(MetricFamily::new(
            "portcullis_iommu_faults_total",
            "Faults of a device, by the specification's name of their type.",
            faults.collect(),
        ));
        let stalled = endpoints.iter();
        families.push(MetricFamily::by(
            "device",
            "portcullis_iotlb_stalled_queues",
            "Queues that wait for a mapping that does not exist.",
            stalled.map(|it| (it.id.clone(), it.counters.stalled_queues.into())),
        ));
        for (name, help, value) in STREAM_METRICS {
            let values = self.functions.iter().filter_map(|function| {
                let stats = function.region.as_ref()?.stats();
                Some((function.id.clone(), value(&stats)))
            });
            families.push(MetricFamily::by("device", name, help, values));
        }
        for (name, help, counter) in BLOCK_METRICS {
            let values = self.functions.iter().filter_map(|function| {
                let DeviceCounters::Block(counters) = &function.counters else {
                    return None;
                };
                let value = counter(counters).load(Ordering::Relaxed);
                Some((function.id.clone(), value))
            });
            families.push(MetricFamily::by("device", name, help, values));
        }
        match &self.iommu {
            Some(IommuDevice::Virtio { model, events }) => {
                families.extend(virtio_iommu::families(model, events));
            }
            Some(IommuDevice::Smmuv3(model)) => families.extend(smmuv3::families(&model.stats())),
            None => {}
        }
        families.extend(vhost::families(&self.functions));
        families.retain(|family| !family.samples.is_empty());
        families
    }

    /// Report of the IOMMU (`GET /iommu`).
    #[must_use]
    pub(crate) fn iommu_info(&self, model: IommuModel) -> IommuInfo {
        #[cfg(test)]
        drop(self.busy.lock());
        let (enabled, features) = match &self.iommu {
            None => (false, Vec::new()),
            Some(IommuDevice::Virtio { model, .. }) => virtio_features(model),
            Some(IommuDevice::Smmuv3(model)) => (model.is_enabled(), smmu_features(model.config())),
        };
        let endpoints = self.functions.iter().filter_map(|f| self.endpoint(f));
        IommuInfo {
            model,
            enabled,
            features,
            endpoints: endpoints.collect(),
        }
    }

    /// Returns up to `limit` mappings of an endpoint that start above `after`.
    #[must_use]
    pub(crate) fn mappings(&self, stream: u32, after: Option<u64>, limit: u32) -> MappingsPage {
        let page = |iommu| mappings_page(iommu, StreamId(stream), after, limit);
        self.iommu.as_ref().map(page).unwrap_or_default()
    }

    fn endpoint(&self, function: &Function) -> Option<EndpointInfo> {
        let device = match function.device {
            DevicePlan::VirtioIommu => return None,
            DevicePlan::Block { .. } => DeviceKind::Block,
            DevicePlan::Net { .. } => DeviceKind::Net,
            DevicePlan::Vsock { .. } => DeviceKind::Vsock,
            DevicePlan::Entropy => DeviceKind::Entropy,
        };
        let iotlbs = function.iotlbs();
        let mut info = EndpointInfo {
            id: function.id.clone(),
            device,
            pci_address: function.stream.to_string(),
            stream_id: function.stream.0,
            state: EndpointState::Direct,
            domain: None,
            asid: None,
            vmid: None,
            ats: None,
            registration: vhost::registration(&iotlbs),
            counters: EndpointCounters::default(),
        };
        if let Some(region) = &function.region {
            let stats = region.stats();
            info.counters.translations = stats.translations + stats.hits;
            info.counters.hits = stats.hits;
            match &self.iommu {
                None => {}
                Some(IommuDevice::Virtio { model, .. }) => {
                    virtio_endpoint(model, function.stream, &stats, &mut info);
                }
                Some(IommuDevice::Smmuv3(model)) => {
                    smmu_endpoint(model, function.stream, &mut info);
                }
            }
        }
        vhost::add_counters(&mut info.counters, &iotlbs);
        Some(info)
    }
}

/// Returns up to `limit` mappings of a stream that start above `after`. An
/// SMMUv3 reads a bounded part of the guest's tables, so that a page may have
/// fewer mappings, or none, and still be followed by another.
fn mappings_page(
    iommu: &IommuDevice,
    stream: StreamId,
    after: Option<u64>,
    limit: u32,
) -> MappingsPage {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let Some(from) = after.map_or(Some(0), |after| after.checked_add(1)) else {
        return MappingsPage::default();
    };
    // A mapping that starts below `from` and extends over it was on the last
    // page.
    let (all, more) = match iommu {
        IommuDevice::Virtio { model, .. } => {
            let wanted = limit.saturating_add(2);
            (model.mappings(stream, Iova(from), wanted), None)
        }
        IommuDevice::Smmuv3(model) => model.mappings(stream, Iova(from), limit),
    };
    let mut fresh = all.into_iter().filter(|m| m.iova.first().0 >= from);
    let mappings: Vec<_> = fresh.by_ref().take(limit).map(shown).collect();
    let last = mappings.last().map(|mapping| mapping.start);
    // The next page starts above `next`: one below the address at which the
    // model continues.
    let more = more.map(|more| Hex(more.0.saturating_sub(1)));
    MappingsPage {
        next: more.or(fresh.next().and(last)),
        mappings,
    }
}

fn virtio_features(iommu: &VirtioIommu) -> (bool, Vec<Feature>) {
    let (offered, used) = (iommu.features(), iommu.negotiated_features());
    let features = offered.iter_names().map(|(name, bit)| Feature {
        name: format!("VIRTIO_IOMMU_F_{name}"),
        negotiated: Some(used.contains(bit)),
    });
    (!used.is_empty(), features.collect())
}

/// Features of the ID registers (IHI 0070 §6.3.1 to §6.3.6). None is
/// negotiated.
fn smmu_features(config: &SmmuConfig) -> Vec<Feature> {
    let fields = [
        ("IDR0.S1P", config.stage1()),
        ("IDR0.S2P", config.stage2()),
        ("IDR0.COHACC", true),
        ("IDR0.HYP", config.hyp()),
        ("IDR0.ATS", config.ats),
        ("IDR0.MSI", true),
        ("IDR0.PRI", config.pri()),
        ("IDR3.RIL", true),
    ];
    let offered = fields.iter().filter(|(_, offered)| *offered);
    let features = offered.map(|&(name, _)| Feature {
        name: name.to_owned(),
        negotiated: None,
    });
    features.collect()
}

fn virtio_endpoint(
    iommu: &VirtioIommu,
    stream: StreamId,
    stats: &StreamStats,
    info: &mut EndpointInfo,
) {
    if let Some(state) = iommu.endpoint(stream) {
        info.domain = state.domain;
        info.state = match state.domain {
            _ if state.bypass => EndpointState::Bypass,
            Some(_) => EndpointState::Translated,
            None => EndpointState::Blocked,
        };
    }
    for (reason, &count) in FaultReason::ALL.iter().zip(&stats.faults) {
        let name = match reason {
            FaultReason::Configuration => "VIRTIO_IOMMU_FAULT_R_DOMAIN",
            _ => "VIRTIO_IOMMU_FAULT_R_MAPPING",
        };
        if count != 0 {
            *info.counters.faults.entry(name.to_owned()).or_insert(0) += count;
        }
    }
}

fn smmu_endpoint(smmu: &Smmu, stream: StreamId, info: &mut EndpointInfo) {
    if let Some(state) = smmu.stream_state(stream) {
        info.asid = state.asid;
        info.vmid = state.vmid;
        info.state = match state.mode {
            StreamMode::Bypass => EndpointState::Bypass,
            StreamMode::Abort | StreamMode::Invalid => EndpointState::Blocked,
            StreamMode::Stage1 | StreamMode::Stage2 | StreamMode::Nested => {
                EndpointState::Translated
            }
        };
        info.ats = smmu.config().ats.then_some(Ats {
            offered: true,
            enabled: state.ats_enabled,
        });
    }
    let faults = smmu.faults(stream).into_iter();
    info.counters.faults = faults
        .map(|(kind, count)| (kind.name().to_owned(), count))
        .collect();
}

fn shown(mapping: ::iommu::Mapping) -> Mapping {
    let doorbells = IovaRange::block(Iova(layout::MSI_DOORBELLS), layout::MSI_DOORBELL_BITS);
    Mapping {
        start: Hex(mapping.iova.first().0),
        end: Hex(mapping.iova.last().0),
        target: Hex(mapping.gpa.0),
        permissions: Permissions {
            read: mapping.perm.allows(Access::Read),
            write: mapping.perm.allows(Access::Write),
        },
        mmio: doorbells.contains(Iova(mapping.gpa.0)),
    }
}

#[cfg(test)]
mod tests;
