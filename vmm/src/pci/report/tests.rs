use std::sync::Arc;

use ::iommu::smmuv3::{SmmuLine, SmmuWires};
use ::iommu::{Gpa, GuestRam};
use vm_memory::{Bytes as _, GuestAddress};

use super::*;

const STREAM: StreamId = StreamId(1);
const RAM_SIZE: usize = 1 << 20;
const HIDDEN: u64 = 3 << 30;
/// Upper bound on the pages of a test's listing.
const MAX_PAGES: usize = 64;

struct Unconnected;

impl SmmuWires for Unconnected {
    fn pulse(&self, _: SmmuLine) {}

    fn message(&self, _: Gpa, _: u32) -> bool {
        false
    }
}

/// An SMMUv3 whose guest maps 1 GiB at [`HIDDEN`], after tables whose entries
/// all point to an empty table.
fn hiding() -> IommuDevice {
    let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).unwrap());
    let put = |at: u64, value: u64| ram.write_obj(value.to_le(), GuestAddress(at)).unwrap();
    let (strtab, context, root, tables, empty) = (0x1000, 0x2000, 0x3000, 0x4000, 0x5000);
    put(strtab + 64 * u64::from(STREAM.0), context | 0b101 << 1 | 1);
    // CD: A, R, AA64, IPS of 48 bits, V, EPD1, T0SZ.
    let cd = 1 << 46 | 1 << 45 | 1 << 41 | 5 << 32 | 1 << 31 | 1 << 30 | 25;
    put(context, cd);
    put(context + 8, root);
    for entry in 0..512 {
        put(tables + 8 * entry, empty | 3);
    }
    for entry in 0..HIDDEN >> 30 {
        put(root + 8 * entry, tables | 3);
    }
    // A block: not global, accessed, unprivileged, valid.
    put(root + 8 * (HIDDEN >> 30), 0xc41);
    let model = Smmu::new(SmmuConfig::default(), ram, Arc::new(Unconnected));
    // STRTAB_BASE, STRTAB_BASE_CFG, CR0.SMMUEN.
    for (offset, value) in [(0x80, strtab), (0x88, 4), (0x20, 1)] {
        model.write(offset, u32::try_from(value).unwrap());
    }
    IommuDevice::Smmuv3(Arc::new(model))
}

#[test]
fn pages_lead_to_every_mapping_however_the_guest_lays_out_its_tables() {
    let iommu = hiding();
    let (mut found, mut after, mut pages) = (Vec::new(), None, 0);
    loop {
        let page = mappings_page(&iommu, STREAM, after, 1);
        assert!(page.mappings.len() <= 1);
        found.extend(page.mappings);
        pages += 1;
        assert!(pages <= MAX_PAGES);
        let Some(Hex(next)) = page.next else { break };
        assert!(after.is_none_or(|after| next > after));
        after = Some(next);
    }
    assert!(pages > 2, "a page is bounded work");
    let shown: Vec<_> = found.iter().map(|m| (m.start, m.end, m.target)).collect();
    assert_eq!(shown, [(Hex(HIDDEN), Hex(HIDDEN + (1 << 30) - 1), Hex(0))]);
    // Nothing is above the last address.
    let page = mappings_page(&iommu, STREAM, Some(u64::MAX), 1);
    assert_eq!(page, MappingsPage::default());
}

#[test]
fn every_counter_of_an_endpoint_a_stream_and_a_disk_is_a_metric() {
    let counters = EndpointCounters {
        translations: 2,
        hits: 3,
        misses: 5,
        updates: 7,
        prefills: 11,
        invalidations_sent: 13,
        invalidations_saved: 17,
        ..EndpointCounters::default()
    };
    let shown = ENDPOINT_METRICS.map(|(name, _, value)| (name, value(&counters)));
    let expected = [
        ("portcullis_iommu_translations_total", 2),
        ("portcullis_iommu_hits_total", 3),
        ("portcullis_iotlb_misses_total", 5),
        ("portcullis_iotlb_updates_total", 7),
        ("portcullis_iotlb_prefills_total", 11),
        ("portcullis_iotlb_invalidations_sent_total", 13),
        ("portcullis_iotlb_invalidations_saved_total", 17),
    ];
    assert_eq!(shown, expected);
    let stats = StreamStats {
        invalidations: 19,
        maps: 23,
        ..StreamStats::default()
    };
    let shown = STREAM_METRICS.map(|(name, _, value)| (name, value(&stats)));
    let expected = [
        ("portcullis_iommu_invalidations_total", 19),
        ("portcullis_iommu_maps_total", 23),
    ];
    assert_eq!(shown, expected);
    let disk = BlockCounters {
        requests: AtomicU64::new(29),
        errors: AtomicU64::new(31),
        read_bytes: AtomicU64::new(37),
        written_bytes: AtomicU64::new(41),
    };
    let shown =
        BLOCK_METRICS.map(|(name, _, counter)| (name, counter(&disk).load(Ordering::Relaxed)));
    let expected = [
        ("portcullis_block_requests_total", 29),
        ("portcullis_block_errors_total", 31),
        ("portcullis_block_read_bytes_total", 37),
        ("portcullis_block_written_bytes_total", 41),
    ];
    assert_eq!(shown, expected);
}

#[test]
fn faults_behind_a_virtio_iommu_are_shown_by_the_specifications_reasons() {
    let events = Arc::<devices::virtio::iommu::EventQueue>::default();
    let config = ::iommu::virtio::VirtioIommuConfig {
        input_range: IovaRange::ALL,
        msi_window: None,
        boot_bypass: false,
        max_mappings: 16,
    };
    let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).unwrap());
    let sink = Arc::clone(&events) as Arc<dyn ::iommu::virtio::FaultSink>;
    let model = Arc::new(VirtioIommu::new(config, ram, sink));
    let dynamic = Arc::clone(&model) as Arc<dyn ::iommu::Iommu>;
    let region = ::iommu::IommuRegion::new(dynamic, STREAM);
    for _ in 0..3 {
        assert!(
            region
                .enter()
                .translate(Iova(0x5000), Access::Read)
                .is_err()
        );
    }
    let mut info = EndpointInfo {
        id: "disk".into(),
        device: DeviceKind::Block,
        pci_address: String::new(),
        stream_id: STREAM.0,
        state: EndpointState::Direct,
        domain: None,
        asid: None,
        vmid: None,
        ats: None,
        registration: None,
        counters: EndpointCounters::default(),
    };
    virtio_endpoint(&model, STREAM, &region.stats(), &mut info);
    assert_eq!(info.state, EndpointState::Blocked);
    let faults: Vec<_> = info.counters.faults.into_iter().collect();
    assert_eq!(faults, [("VIRTIO_IOMMU_FAULT_R_DOMAIN".to_owned(), 3)]);
}
