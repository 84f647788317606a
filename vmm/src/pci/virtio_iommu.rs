//! Metrics of a virtio-iommu.

use devices::virtio::iommu::EventQueue;
use iommu::virtio::VirtioIommu;

use crate::action::MetricFamily;

/// The metrics of a virtio-iommu and its event queue.
pub(super) fn families(model: &VirtioIommu, events: &EventQueue) -> Vec<MetricFamily> {
    let (reported, dropped) = events.counts();
    let mapped = u64::try_from(model.mapped()).unwrap_or(u64::MAX);
    vec![
        MetricFamily::single(
            "portcullis_virtio_iommu_fault_reports_total",
            "Fault reports written to the event queue.",
            reported,
        ),
        MetricFamily::single(
            "portcullis_virtio_iommu_fault_reports_dropped_total",
            "Fault reports for which the driver had no buffer in the event queue.",
            dropped,
        ),
        MetricFamily::single(
            "portcullis_virtio_iommu_mappings",
            "Mappings of all domains.",
            mapped,
        ),
    ]
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use iommu::virtio::spec::{Features, request};
    use iommu::virtio::{FaultSink, VirtioIommuConfig};
    use iommu::{Access, GuestRam, Iommu, IommuRegion, Iova, IovaRange, StreamId};
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn every_counter_of_the_virtio_iommu_is_a_metric() {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
        let events = Arc::new(EventQueue::default());
        let config = VirtioIommuConfig {
            input_range: IovaRange::block(Iova(0), 48),
            msi_window: None,
            boot_bypass: false,
            max_mappings: 16,
        };
        let sink = Arc::clone(&events) as Arc<dyn FaultSink>;
        let model = Arc::new(VirtioIommu::new(config, Arc::new(ram), sink));
        model.negotiated(Features::MAP_UNMAP);
        let stream = StreamId(8);
        let region = IommuRegion::new(Arc::clone(&model) as Arc<dyn Iommu>, stream);
        let words: [&[u32]; 3] = [
            &[request::ATTACH.into(), 1, stream.0, 0, 0],
            &[request::MAP.into(), 1, 0, 0, 0xfff, 0, 0, 0, 3],
            &[request::MAP.into(), 1, 0x1000, 0, 0x1fff, 0, 0, 0, 3],
        ];
        for words in words {
            let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
            let mut reply = [0xff; 4];
            assert_eq!(model.handle(&bytes, &mut reply), 4);
            assert_eq!(reply[0], 0);
        }
        for _ in 0..3 {
            let fault = region.enter().translate(Iova(0x5000), Access::Read);
            assert!(fault.is_err());
        }
        let families = families(&model, &events);
        let values = families.iter().map(|f| (f.name, f.samples[0].value));
        let expected = [
            ("portcullis_virtio_iommu_fault_reports_total", 0),
            ("portcullis_virtio_iommu_fault_reports_dropped_total", 3),
            ("portcullis_virtio_iommu_mappings", 2),
        ];
        assert_eq!(values.collect::<Vec<_>>(), expected);
    }
}
