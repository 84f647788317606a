//! What the IOMMU and its endpoints say of themselves, as the API shows it.

use std::collections::BTreeMap;

use iommu::virtio::spec::feature;
use iommu::{Access, FaultReason, Iova, StreamStats};

use super::{Function, PciBus};
use crate::action::{
    DeviceKind, EndpointCounters, EndpointInfo, EndpointState, Feature, Hex, IommuInfo, Mapping,
    MappingsPage, Permissions,
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

impl PciBus {
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
            registration: None,
            counters: counters(&stats),
        })
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
