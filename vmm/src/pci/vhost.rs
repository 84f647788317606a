//! Devices whose data path is the host kernel's vhost, and what they say of
//! their IOTLBs.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use devices::error::Chain;
use devices::tap::Tap;
use devices::vhost::iotlb::IotlbStats;
use devices::vhost::worker::VhostWorker;
use devices::vhost::{IotlbMonitor, VhostContext};
use devices::virtio::net::{Net, NetConfig};
use devices::virtio::vsock::Vsock;
use devices::virtio::{DeviceCounters, NetCounters};
use iommu::{GuestRam, NotifierEvents};

use super::Function;
use super::report::family;
use crate::action::{
    EndpointCounters, MetricFamily, MetricKind, Registration, RegistrationKind, Sample,
};
use crate::config::{ConfigError, MacAddress};
use crate::plan::{DevicePlan, FunctionPlan, MachinePlan};

/// What the machine's vhost devices share, if it has any.
pub fn context(plan: &MachinePlan, ram: &Arc<GuestRam>) -> io::Result<Option<VhostContext>> {
    let is_vhost =
        |f: &FunctionPlan| matches!(f.device, DevicePlan::Net { .. } | DevicePlan::Vsock { .. });
    if !plan.functions.iter().any(is_vhost) {
        return Ok(None);
    }
    Ok(Some(VhostContext {
        ram: Arc::clone(ram),
        worker: Arc::new(VhostWorker::start()?),
        prefill: plan.iommu.prefill,
        prefetch: plan.iommu.prefetch,
    }))
}

/// Opens the tap and the host's vhost-net.
pub fn net(
    id: &str,
    tap: &str,
    config: NetConfig,
    context: &VhostContext,
) -> Result<Net, ConfigError> {
    let pairs = usize::from(config.pairs);
    let tap = Tap::open(tap, pairs, config.mtu).map_err(|error| {
        let field = format!("network-interfaces[{id}].host_dev_name");
        ConfigError::new(field, Chain(&error).to_string())
    })?;
    Net::new(config, tap, context).map_err(|error| {
        ConfigError::new(
            format!("network-interfaces[{id}]"),
            Chain(&error).to_string(),
        )
    })
}

/// The address as the device shows it.
pub fn octets(id: &str, mac: &str) -> Result<[u8; 6], ConfigError> {
    let parsed: Result<MacAddress, _> = mac.parse();
    parsed
        .map(MacAddress::octets)
        .map_err(|problem| ConfigError::new(format!("network-interfaces[{id}].guest_mac"), problem))
}

/// Opens the host's vhost-vsock.
pub fn vsock(cid: u32, context: &VhostContext) -> Result<Vsock, ConfigError> {
    Vsock::new(cid, context)
        .map_err(|error| ConfigError::new("vsock.guest_cid", Chain(&error).to_string()))
}

/// What the notifier chain delivers to a device with these IOTLBs; `None` while
/// none of them listens.
pub fn registration(all: &[IotlbStats]) -> Option<Registration> {
    let first = all.iter().find(|stats| !stats.registration.is_empty())?;
    let kind = if first.registration.contains(NotifierEvents::DEVIOTLB_UNMAP) {
        RegistrationKind::DevIotlb
    } else if first.registration.contains(NotifierEvents::MAP) {
        RegistrationKind::MapUnmap
    } else {
        RegistrationKind::Unmap
    };
    let reason = if first.refused.is_empty() {
        "the IOMMU delivers what vhost would like best".to_owned()
    } else {
        first.refused.join("; ")
    };
    Some(Registration { kind, reason })
}

/// Adds what the IOTLBs of a device counted.
pub fn add_counters(counters: &mut EndpointCounters, all: &[IotlbStats]) {
    for stats in all {
        counters.misses += stats.misses;
        counters.updates += stats.updates;
        counters.prefills += stats.prefills + stats.prefetched;
        counters.invalidations_sent += stats.invalidations_sent;
        counters.invalidations_saved += stats.invalidations_saved;
        counters.stalled_queues += u32::try_from(stats.stalled).unwrap_or(u32::MAX);
    }
}

/// A metric of the IOTLBs of a device, summed over them.
type IotlbMetric = (
    &'static str,
    &'static str,
    MetricKind,
    fn(&IotlbStats) -> u64,
);

const IOTLB_METRICS: [IotlbMetric; 3] = [
    (
        "portcullis_iotlb_prefetches_total",
        "Translations of posted buffers sent to vhost with the answer to a miss.",
        MetricKind::Counter,
        |stats| stats.prefetched,
    ),
    (
        "portcullis_iotlb_faults_total",
        "Accesses of vhost that the IOMMU does not translate or permit.",
        MetricKind::Counter,
        |stats| stats.faults,
    ),
    (
        "portcullis_iotlb_entries",
        "Translations that vhost holds.",
        MetricKind::Gauge,
        |stats| u64::try_from(stats.entries).unwrap_or(u64::MAX),
    ),
];

/// A metric of a network device.
type NetMetric = (
    &'static str,
    &'static str,
    MetricKind,
    fn(&NetCounters) -> u64,
);

const NET_METRICS: [NetMetric; 3] = [
    (
        "portcullis_net_control_commands_total",
        "Commands of the guest on the control queue of a network device.",
        MetricKind::Counter,
        |counters| counters.control_commands.load(Ordering::Relaxed),
    ),
    (
        "portcullis_net_control_errors_total",
        "Of those, answered with an error.",
        MetricKind::Counter,
        |counters| counters.control_errors.load(Ordering::Relaxed),
    ),
    (
        "portcullis_net_link_up",
        "Whether the guest is shown a link: its tap is there, up and has a carrier.",
        MetricKind::Gauge,
        |counters| u64::from(counters.link_up.load(Ordering::Relaxed)),
    ),
];

/// What the functions with a vhost back end count besides what every endpoint
/// does.
pub fn families(functions: &[Function]) -> Vec<MetricFamily> {
    let sample = |function: &Function, value| Sample {
        labels: vec![("device", function.id.clone())],
        value,
    };
    let iotlbs = IOTLB_METRICS.iter().map(|&(name, help, kind, value)| {
        let behind = functions
            .iter()
            .filter(|function| function.region.is_some());
        let samples = behind.filter_map(|function| {
            let iotlbs = function.iotlbs();
            (!iotlbs.is_empty()).then(|| sample(function, iotlbs.iter().map(value).sum()))
        });
        family(name, help, kind, samples.collect())
    });
    let nets = NET_METRICS.iter().map(|&(name, help, kind, value)| {
        let samples = functions.iter().filter_map(|function| {
            let DeviceCounters::Vhost {
                net: Some(counters),
                ..
            } = &function.counters
            else {
                return None;
            };
            Some(sample(function, value(counters)))
        });
        family(name, help, kind, samples.collect())
    });
    iotlbs.chain(nets).collect()
}

impl Function {
    /// The statistics of the IOTLB of each of its vhost files.
    pub(super) fn iotlbs(&self) -> Vec<IotlbStats> {
        match &self.counters {
            DeviceCounters::Vhost { iotlbs, .. } => {
                iotlbs.iter().map(IotlbMonitor::stats).collect()
            }
            DeviceCounters::None | DeviceCounters::Block(_) => Vec::new(),
        }
    }
}
