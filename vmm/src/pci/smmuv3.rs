//! Metrics of an SMMUv3.

use iommu::smmuv3::SmmuStats;

use crate::action::{MetricFamily, MetricKind, Sample};

/// The metrics of an SMMUv3, in the order of [`SmmuStats`]. A family by type
/// has a sample for each type that occurred.
pub(super) fn families(stats: &SmmuStats) -> Vec<MetricFamily> {
    // A new counter does not compile without its metric.
    let SmmuStats {
        commands,
        tlb_hits,
        tlb_misses,
        tlb_entries,
        events,
        events_dropped,
    } = stats;
    let counter =
        |name, help, value: &u64| MetricFamily::single(name, help, MetricKind::Counter, *value);
    vec![
        by_type(
            "portcullis_smmuv3_commands_total",
            "Commands consumed from the command queue, by type.",
            commands.iter().map(|(kind, count)| (kind.name(), *count)),
        ),
        counter(
            "portcullis_smmuv3_tlb_hits_total",
            "Translations answered from the SMMU's TLB.",
            tlb_hits,
        ),
        counter(
            "portcullis_smmuv3_tlb_misses_total",
            "Translations that walked tables.",
            tlb_misses,
        ),
        MetricFamily::single(
            "portcullis_smmuv3_tlb_entries",
            "Entries in the SMMU's TLB.",
            MetricKind::Gauge,
            u64::try_from(*tlb_entries).unwrap_or(u64::MAX),
        ),
        by_type(
            "portcullis_smmuv3_events_total",
            "Records written to the event queue, by type.",
            events.iter().map(|(kind, count)| (kind.name(), *count)),
        ),
        counter(
            "portcullis_smmuv3_events_dropped_total",
            "Events of terminated transactions that found the event queue full, disabled or outside of RAM.",
            events_dropped,
        ),
    ]
}

fn by_type(
    name: &'static str,
    help: &'static str,
    counts: impl Iterator<Item = (&'static str, u64)>,
) -> MetricFamily {
    let samples = counts.map(|(kind, value)| Sample {
        labels: vec![("type", kind.to_owned())],
        value,
    });
    MetricFamily::new(name, help, MetricKind::Counter, samples.collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use iommu::smmuv3::{CommandKind, EventKind};

    use super::*;

    #[test]
    fn every_counter_of_the_smmu_is_a_metric() {
        let stats = SmmuStats {
            commands: BTreeMap::from([(CommandKind::Tlbi, 2), (CommandKind::Sync, 3)]),
            tlb_hits: 5,
            tlb_misses: 7,
            tlb_entries: 11,
            events: BTreeMap::from([(EventKind::FTranslation, 13)]),
            events_dropped: 17,
        };
        let families = families(&stats);
        let samples: Vec<_> = families
            .iter()
            .flat_map(|family| {
                let kind = |sample: &Sample| sample.labels.first().map(|(_, kind)| kind.clone());
                let samples = family.samples.iter();
                samples.map(move |sample| (family.name, kind(sample), sample.value))
            })
            .collect();
        let kind = |name: &str| Some(name.to_owned());
        assert_eq!(
            samples,
            [
                ("portcullis_smmuv3_commands_total", kind("CMD_TLBI"), 2),
                ("portcullis_smmuv3_commands_total", kind("CMD_SYNC"), 3),
                ("portcullis_smmuv3_tlb_hits_total", None, 5),
                ("portcullis_smmuv3_tlb_misses_total", None, 7),
                ("portcullis_smmuv3_tlb_entries", None, 11),
                ("portcullis_smmuv3_events_total", kind("F_TRANSLATION"), 13),
                ("portcullis_smmuv3_events_dropped_total", None, 17),
            ]
        );
        for family in families {
            let counter = family.kind == MetricKind::Counter;
            assert_eq!(family.name.ends_with("_total"), counter);
        }
    }
}
