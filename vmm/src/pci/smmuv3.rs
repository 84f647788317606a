//! Metrics of an SMMUv3.

use iommu::smmuv3::SmmuStats;

use crate::action::MetricFamily;

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
    let by_type = |name, help, counts: &mut dyn Iterator<Item = (&str, u64)>| {
        let counts = counts.map(|(kind, count)| (kind.to_owned(), count));
        MetricFamily::by("type", name, help, counts)
    };
    vec![
        by_type(
            "portcullis_smmuv3_commands_total",
            "Commands consumed from the command queue, by type.",
            &mut commands.iter().map(|(kind, count)| (kind.name(), *count)),
        ),
        MetricFamily::single(
            "portcullis_smmuv3_tlb_hits_total",
            "Translations answered from the SMMU's TLB.",
            *tlb_hits,
        ),
        MetricFamily::single(
            "portcullis_smmuv3_tlb_misses_total",
            "Translations that walked tables.",
            *tlb_misses,
        ),
        MetricFamily::single(
            "portcullis_smmuv3_tlb_entries",
            "Entries in the SMMU's TLB.",
            u64::try_from(*tlb_entries).unwrap_or(u64::MAX),
        ),
        by_type(
            "portcullis_smmuv3_events_total",
            "Records written to the event queue, by type.",
            &mut events.iter().map(|(kind, count)| (kind.name(), *count)),
        ),
        MetricFamily::single(
            "portcullis_smmuv3_events_dropped_total",
            "Events of terminated transactions that found the event queue full, disabled or outside of RAM.",
            *events_dropped,
        ),
    ]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use iommu::smmuv3::{CommandKind, EventKind};

    use super::*;
    use crate::action::{MetricKind, Sample};

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
