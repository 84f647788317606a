//! Devices whose data path is the host kernel's vhost, and what they say of
//! their IOTLBs.

use std::io;
use std::sync::{Arc, OnceLock, Weak};

use devices::error::Chain;
use devices::tap::Tap;
use devices::vhost::VhostContext;
use devices::vhost::iotlb::IotlbStats;
use devices::vhost::thread::IotlbThread;
use devices::virtio::failure::Alarm;
use devices::virtio::net::{Net, NetConfig};
use devices::virtio::pci::VirtioPci;
use devices::virtio::vsock::Vsock;
use iommu::{GuestRam, NotifierEvents};

use crate::action::{EndpointCounters, Registration, RegistrationKind};
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
        thread: Arc::new(IotlbThread::start()?),
        prefill: plan.iommu.prefill,
        prefetch: plan.iommu.prefetch,
    }))
}

/// Has a function look for the failure of its device, once there is one.
#[derive(Clone, Default)]
pub struct Bell(Arc<OnceLock<Weak<VirtioPci>>>);

impl Bell {
    /// Whom to wake.
    pub fn hang(&self, function: &Arc<VirtioPci>) {
        let _ = self.0.set(Arc::downgrade(function));
    }

    /// Wakes it. Called without any lock.
    pub fn alarm(&self) -> Alarm {
        let bell = self.clone();
        Box::new(move || {
            if let Some(function) = bell.0.get().and_then(Weak::upgrade) {
                function.check();
            }
        })
    }
}

/// Opens the tap and the host's vhost-net.
pub fn net(
    id: &str,
    tap: &str,
    config: NetConfig,
    context: &VhostContext,
    bell: &Bell,
) -> Result<Net, ConfigError> {
    let pairs = usize::from(config.pairs);
    let tap = Tap::open(tap, pairs, config.mtu).map_err(|error| {
        let field = format!("network-interfaces[{id}].host_dev_name");
        ConfigError::new(field, Chain(&error).to_string())
    })?;
    let net = Net::new(config, tap, context).map_err(|error| {
        ConfigError::new(
            format!("network-interfaces[{id}]"),
            Chain(&error).to_string(),
        )
    })?;
    net.on_failure(bell.alarm());
    Ok(net)
}

/// The address as the device shows it.
pub fn octets(id: &str, mac: &str) -> Result<[u8; 6], ConfigError> {
    let parsed: Result<MacAddress, _> = mac.parse();
    parsed
        .map(MacAddress::octets)
        .map_err(|problem| ConfigError::new(format!("network-interfaces[{id}].guest_mac"), problem))
}

/// Opens the host's vhost-vsock.
pub fn vsock(cid: u32, context: &VhostContext, bell: &Bell) -> Result<Vsock, ConfigError> {
    let vsock = Vsock::new(cid, context)
        .map_err(|error| ConfigError::new("vsock.guest_cid", Chain(&error).to_string()))?;
    vsock.on_failure(bell.alarm());
    Ok(vsock)
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
