//! A function of the PCI bus.

use std::sync::Arc;

use devices::vhost::IotlbMonitor;
use devices::vhost::iotlb::IotlbStats;
use devices::virtio::DeviceCounters;
use iommu::{IommuRegion, StreamId};

use crate::plan::DevicePlan;

/// A function and its stream of the IOMMU.
pub(super) struct Function {
    /// Its name in the configuration.
    pub(super) id: String,
    /// Its requester ID.
    pub(super) stream: StreamId,
    /// Its plan.
    pub(super) device: DevicePlan,
    /// Its stream; `None` when it is not behind an IOMMU.
    pub(super) region: Option<Arc<IommuRegion>>,
    /// Counters of the device and its back end.
    pub(super) counters: DeviceCounters,
}

impl Function {
    /// Statistics of its vhost files' IOTLBs, one for each file.
    pub(super) fn iotlbs(&self) -> Vec<IotlbStats> {
        match &self.counters {
            DeviceCounters::Vhost { iotlbs, .. } => {
                iotlbs.iter().map(IotlbMonitor::stats).collect()
            }
            DeviceCounters::None | DeviceCounters::Block(_) => Vec::new(),
        }
    }
}
