//! What the IOMMU and its endpoints say of themselves, as the API shows it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::vhost::IotlbMonitor;
use devices::virtio::block::BlockCounters;
use iommu::virtio::spec::feature;
use iommu::{Access, FaultReason, Iova, StreamStats};

use super::{BackEnd, Function, PciBus, vhost};
use crate::action::{
    DeviceKind, EndpointCounters, EndpointInfo, EndpointState, Feature, Hex, IommuInfo, Mapping,
    MappingsPage, MetricFamily, MetricKind, Permissions, Sample,
};
use crate::config::IommuModel;
use crate::plan::DevicePlan;

/// The specification's names of the virtio-iommu's features.
const VIRTIO_FEATURES: [(u64, &str); 6] = [
    (feature::INPUT_RANGE, "VIRTIO_IOMMU_F_INPUT_RANGE"),
    (feature::DOMAIN_RANGE, "VIRTIO_IOMMU_F_DOMAIN_RANGE"),
    (feature::MAP_UNMAP, "VIRTIO_IOMMU_F_MAP_UNMAP"),
    (feature::PROBE, "VIRTIO_IOMMU_F_PROBE"),
    (feature::MMIO, "VIRTIO_IOMMU_F_MMIO"),
    (feature::BYPASS_CONFIG, "VIRTIO_IOMMU_F_BYPASS_CONFIG"),
];

/// A metric that every endpoint has: its name, what it counts, and where.
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

/// A metric that every disk has.
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
    /// What the bus counts, by device.
    #[must_use]
    pub fn families(&self) -> Vec<MetricFamily> {
        let endpoints: Vec<_> = self
            .functions
            .iter()
            .filter_map(|f| self.endpoint(f))
            .collect();
        let device = |id: &str| vec![("device", id.to_owned())];
        let mut families: Vec<_> = ENDPOINT_METRICS
            .iter()
            .map(|&(name, help, value)| {
                let samples = endpoints.iter().map(|endpoint| Sample {
                    labels: device(&endpoint.id),
                    value: value(&endpoint.counters),
                });
                family(name, help, MetricKind::Counter, samples.collect())
            })
            .collect();
        let faults = endpoints.iter().flat_map(|endpoint| {
            let faults = endpoint.counters.faults.iter();
            faults.map(|(kind, &value)| Sample {
                labels: vec![("device", endpoint.id.clone()), ("type", kind.clone())],
                value,
            })
        });
        families.push(family(
            "portcullis_iommu_faults_total",
            "Faults of a device, by the specification's name of their type.",
            MetricKind::Counter,
            faults.collect(),
        ));
        let stalled = endpoints.iter().map(|endpoint| Sample {
            labels: device(&endpoint.id),
            value: endpoint.counters.stalled_queues.into(),
        });
        families.push(family(
            "portcullis_iotlb_stalled_queues",
            "Queues that wait for a mapping that does not exist.",
            MetricKind::Gauge,
            stalled.collect(),
        ));
        for (name, help, counter) in BLOCK_METRICS {
            let disks = self.functions.iter().filter_map(|function| {
                let BackEnd::Block(counters) = &function.back_end else {
                    return None;
                };
                Some(Sample {
                    labels: device(&function.id),
                    value: counter(counters).load(Ordering::Relaxed),
                })
            });
            families.push(family(name, help, MetricKind::Counter, disks.collect()));
        }
        families.retain(|family| !family.samples.is_empty());
        families
    }

    /// The IOMMU as a whole.
    #[must_use]
    pub fn iommu_info(&self, model: IommuModel) -> IommuInfo {
        let mut features = Vec::new();
        let mut enabled = false;
        if let Some(iommu) = self.virtio_iommu() {
            let (offered, used) = (iommu.features(), iommu.negotiated_features());
            enabled = used != 0;
            let all = VIRTIO_FEATURES.iter().filter(|(bit, _)| offered & bit != 0);
            features.extend(all.map(|&(bit, name)| Feature {
                name: name.to_owned(),
                negotiated: Some(used & bit != 0),
            }));
        }
        let endpoints = self.functions.iter().filter_map(|f| self.endpoint(f));
        IommuInfo {
            model,
            enabled,
            features,
            endpoints: endpoints.collect(),
        }
    }

    /// Up to `limit` mappings of an endpoint that start above `after`.
    #[must_use]
    pub fn mappings(&self, stream: u32, after: Option<u64>, limit: u32) -> MappingsPage {
        let page = usize::try_from(limit).unwrap_or(usize::MAX);
        let from = after.map_or(Some(0), |after| after.checked_add(1));
        let (Some(iommu), Some(from)) = (self.virtio_iommu(), from) else {
            return MappingsPage::default();
        };
        // One that starts below `from` and reaches over it was on the last page.
        let all = iommu.mappings(iommu::StreamId(stream), Iova(from), page.saturating_add(2));
        let mut fresh = all.into_iter().filter(|m| m.iova.first().0 >= from);
        let mappings: Vec<_> = fresh.by_ref().take(page).map(shown).collect();
        let last = mappings.last().map(|mapping| mapping.start);
        MappingsPage {
            next: fresh.next().and(last),
            mappings,
        }
    }

    fn endpoint(&self, function: &Function) -> Option<EndpointInfo> {
        let device = match function.device {
            DevicePlan::VirtioIommu => return None,
            DevicePlan::Block { .. } => DeviceKind::Block,
            DevicePlan::Net { .. } => DeviceKind::Net,
            DevicePlan::Vsock { .. } => DeviceKind::Vsock,
            DevicePlan::Entropy => DeviceKind::Entropy,
        };
        let region = function.region.as_ref();
        let stats = region.map(|region| region.stats()).unwrap_or_default();
        let attached = region
            .and(self.virtio_iommu())
            .and_then(|iommu| iommu.endpoint(function.stream));
        let state = match &attached {
            None => EndpointState::Direct,
            Some(state) if state.bypass => EndpointState::Bypass,
            Some(state) if state.domain.is_some() => EndpointState::Translated,
            Some(_) => EndpointState::Blocked,
        };
        let iotlbs: Vec<_> = match &function.back_end {
            BackEnd::Vhost(monitors) => monitors.iter().map(IotlbMonitor::stats).collect(),
            BackEnd::None | BackEnd::Block(_) => Vec::new(),
        };
        let mut counters = counters(&stats);
        vhost::add_counters(&mut counters, &iotlbs);
        Some(EndpointInfo {
            id: function.id.clone(),
            device,
            pci_address: function.stream.to_string(),
            stream_id: function.stream.0,
            state,
            domain: attached.and_then(|state| state.domain),
            asid: None,
            vmid: None,
            ats: None,
            registration: vhost::registration(&iotlbs),
            counters,
        })
    }
}

fn family(
    name: &'static str,
    help: &'static str,
    kind: MetricKind,
    samples: Vec<Sample>,
) -> MetricFamily {
    MetricFamily {
        name,
        help,
        kind,
        samples,
    }
}

fn counters(stats: &StreamStats) -> EndpointCounters {
    EndpointCounters {
        translations: stats.translations + stats.hits,
        hits: stats.hits,
        faults: faults(stats),
        ..EndpointCounters::default()
    }
}

/// Faults by the name of their type, those that happened.
fn faults(stats: &StreamStats) -> BTreeMap<String, u64> {
    let mut faults = BTreeMap::new();
    for (reason, &count) in FaultReason::ALL.iter().zip(&stats.faults) {
        let name = match reason {
            FaultReason::Configuration => "VIRTIO_IOMMU_FAULT_R_DOMAIN",
            _ => "VIRTIO_IOMMU_FAULT_R_MAPPING",
        };
        if count != 0 {
            *faults.entry(name.to_owned()).or_insert(0) += count;
        }
    }
    faults
}

fn shown(mapping: iommu::Mapping) -> Mapping {
    Mapping {
        start: Hex(mapping.iova.first().0),
        end: Hex(mapping.iova.last().0),
        target: Hex(mapping.gpa.0),
        permissions: Permissions {
            read: mapping.perm.allows(Access::Read),
            write: mapping.perm.allows(Access::Write),
        },
        mmio: false,
    }
}
