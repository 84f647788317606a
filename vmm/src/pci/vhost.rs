//! Reports of vhost devices' IOTLBs, for metrics and the API.

use std::sync::atomic::Ordering;

use devices::vhost::iotlb::IotlbStats;
use devices::virtio::{DeviceCounters, NetCounters};
use iommu::NotifierEvents;

use super::function::Function;
use crate::action::{EndpointCounters, MetricFamily, Registration, RegistrationKind};

/// Registration of these IOTLBs with the notifier chain; `None` while none is
/// registered.
pub(super) fn registration(all: &[IotlbStats]) -> Option<Registration> {
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

/// Adds the counters of a device's IOTLBs.
pub(super) fn add_counters(counters: &mut EndpointCounters, all: &[IotlbStats]) {
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
type IotlbMetric = (&'static str, &'static str, fn(&IotlbStats) -> u64);

const IOTLB_METRICS: [IotlbMetric; 3] = [
    (
        "portcullis_iotlb_prefetches_total",
        "Translations of posted buffers sent to vhost with the answer to a miss.",
        |stats| stats.prefetched,
    ),
    (
        "portcullis_iotlb_faults_total",
        "Accesses of vhost that the IOMMU does not translate or permit.",
        |stats| stats.faults,
    ),
    (
        "portcullis_iotlb_entries",
        "Translations that vhost holds.",
        |stats| u64::try_from(stats.entries).unwrap_or(u64::MAX),
    ),
];

/// A metric of a network device.
type NetMetric = (&'static str, &'static str, fn(&NetCounters) -> u64);

const NET_METRICS: [NetMetric; 3] = [
    (
        "portcullis_net_control_commands_total",
        "Commands of the guest on the control queue of a network device.",
        |counters| counters.control_commands.load(Ordering::Relaxed),
    ),
    (
        "portcullis_net_control_errors_total",
        "Of those, answered with an error.",
        |counters| counters.control_errors.load(Ordering::Relaxed),
    ),
    (
        "portcullis_net_link_up",
        "Whether the link of the guest is up: its tap is there, up and has a carrier.",
        |counters| u64::from(counters.link_up.load(Ordering::Relaxed)),
    ),
];

/// Metrics of the functions with a vhost back end, in addition to those of
/// every endpoint.
pub(super) fn families(functions: &[Function]) -> Vec<MetricFamily> {
    let iotlbs = IOTLB_METRICS.iter().map(|&(name, help, value)| {
        let behind = functions.iter().filter(|it| it.region.is_some());
        let values = behind.filter_map(|function| {
            let iotlbs = function.iotlbs();
            let sum = iotlbs.iter().map(value).sum();
            (!iotlbs.is_empty()).then(|| (function.id.clone(), sum))
        });
        MetricFamily::by("device", name, help, values)
    });
    let nets = NET_METRICS.iter().map(|&(name, help, value)| {
        let values = functions.iter().filter_map(|function| {
            let DeviceCounters::Vhost {
                net: Some(counters),
                ..
            } = &function.counters
            else {
                return None;
            };
            Some((function.id.clone(), value(counters)))
        });
        MetricFamily::by("device", name, help, values)
    });
    iotlbs.chain(nets).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64};

    use super::*;

    #[test]
    fn every_counter_of_an_iotlb_is_shown() {
        let stats = IotlbStats {
            misses: 2,
            updates: 3,
            prefills: 5,
            prefetched: 7,
            invalidations_sent: 11,
            invalidations_saved: 13,
            faults: 17,
            stalled: 19,
            entries: 23,
            ..IotlbStats::default()
        };
        let shown = IOTLB_METRICS.map(|(name, .., value)| (name, value(&stats)));
        let expected = [
            ("portcullis_iotlb_prefetches_total", 7),
            ("portcullis_iotlb_faults_total", 17),
            ("portcullis_iotlb_entries", 23),
        ];
        assert_eq!(shown, expected);
        // The counters of a device's files are added up.
        let mut counters = EndpointCounters::default();
        add_counters(&mut counters, &[stats.clone(), stats]);
        let expected = EndpointCounters {
            misses: 4,
            updates: 6,
            prefills: 24,
            invalidations_sent: 22,
            invalidations_saved: 26,
            stalled_queues: 38,
            ..EndpointCounters::default()
        };
        assert_eq!(counters, expected);
    }

    #[test]
    fn every_counter_of_a_network_device_is_a_metric() {
        let counters = NetCounters {
            control_commands: AtomicU64::new(3),
            control_errors: AtomicU64::new(2),
            link_up: AtomicBool::new(true),
        };
        let shown = NET_METRICS.map(|(name, .., value)| (name, value(&counters)));
        let expected = [
            ("portcullis_net_control_commands_total", 3),
            ("portcullis_net_control_errors_total", 2),
            ("portcullis_net_link_up", 1),
        ];
        assert_eq!(shown, expected);
    }
}
