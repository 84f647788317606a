//! Bytes in an SMMUv3's command queue, after which everything is invalidated: the queue runs or
//! reports an error, and the consumer of an unmapped page is notified.
#![no_main]

use std::sync::{Arc, Mutex};

use iommu::smmuv3::{Smmu, SmmuConfig, SmmuLine, SmmuWires, Stages};
use iommu::{
    Access, Gpa, GuestRam, Iommu, IommuNotifier, IommuRegion, Iova, IovaRange, Mapping,
    NotifierEvents, NotifierSink, Registration, Request, StreamId,
};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes as _, GuestAddress};

const RAM_SIZE: usize = 1 << 20;
const STREAM: StreamId = StreamId(1);
const QUEUE: u64 = 0x8000;
/// The mapped page, its target, and the address of its descriptor.
const IOVA: u64 = 0x1000;
const PLACE: u64 = 0x6000;
const DESCRIPTOR: u64 = 0x5008;

const CMDQ_PROD: u64 = 0x98;
const CMDQ_CONS: u64 = 0x9c;
const GERROR: u64 = 0x60;
const GERRORN: u64 = 0x64;

struct Wires;

impl SmmuWires for Wires {
    fn pulse(&self, _: SmmuLine) {}

    fn message(&self, _: Gpa, _: u32) -> bool {
        true
    }
}

/// A consumer that caches the page, as a kernel IOTLB does.
#[derive(Default)]
struct Holder(Mutex<bool>);

impl NotifierSink for Holder {
    fn map(&self, _: &Mapping) {
        panic!("an SMMU maps nothing");
    }

    fn unmap(&self, ranges: &[IovaRange]) {
        if ranges.iter().any(|range| range.contains(Iova(IOVA))) {
            *self.0.lock().unwrap() = false;
        }
    }

    fn registered(&self, _: &Registration) {}
}

fuzz_target!(|commands: Vec<[u8; 16]>| {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).expect("memory");
    let ram = Arc::new(ram);
    let config = SmmuConfig {
        stages: Stages::Nested,
        ats: true,
        pri: true,
        ..SmmuConfig::default()
    };
    let smmu = Arc::new(Smmu::new(config, ram.clone(), Arc::new(Wires)));
    let put = |address: u64, value: u64| {
        ram.write_obj(value.to_le(), GuestAddress(address))
            .expect("it is RAM");
    };
    put(0x1040, 0x2000 | 0b101 << 1 | 1);
    put(
        0x2000,
        7 << 48 | 1 << 46 | 1 << 41 | 5 << 32 | 1 << 31 | 1 << 30 | 25,
    );
    put(0x2008, 0x3000);
    put(0x3000, 0x4003);
    put(0x4000, 0x5003);
    put(DESCRIPTOR, PLACE | 0xc43);
    for (offset, value) in [
        (0x80, 0x1000),
        (0x88, 4),
        (0x90, QUEUE as u32 | 4),
        (0x20, 9),
    ] {
        smmu.write(offset, value);
    }
    let region = IommuRegion::new(smmu.clone(), STREAM);
    let holder = Arc::new(Holder::default());
    region.register(IommuNotifier {
        acceptable: vec![NotifierEvents::UNMAP],
        range: IovaRange::ALL,
        sink: holder.clone(),
    });
    let request = Request::untranslated(STREAM, Iova(IOVA), Access::Write);
    let issue = |bytes: &[u8; 16]| {
        let prod = smmu.read(CMDQ_PROD);
        let place = QUEUE + 16 * u64::from(prod & 15);
        ram.write_slice(bytes, GuestAddress(place))
            .expect("it is RAM");
        smmu.write(CMDQ_PROD, prod.wrapping_add(1) & 31);
        if (smmu.read(GERROR) ^ smmu.read(GERRORN)) & 1 != 0 {
            // An illegal command: a driver replaces it with a CMD_SYNC and continues.
            assert_eq!(smmu.read(CMDQ_CONS) >> 24 & 0x7f, 1, "CERROR_ILL");
            let mut sync = [0; 16];
            sync[0] = 0x46;
            ram.write_slice(&sync, GuestAddress(place))
                .expect("it is RAM");
            smmu.write(GERRORN, smmu.read(GERROR));
        }
        assert_eq!(smmu.read(CMDQ_CONS) & 31, smmu.read(CMDQ_PROD) & 31);
    };
    for bytes in &commands {
        {
            // Commands may write to memory: CMD_SYNC's message.
            put(DESCRIPTOR, PLACE | 0xc43);
            let _inside = region.enter();
            if smmu.translate(&request).is_ok() {
                *holder.0.lock().unwrap() = true;
            }
        }
        issue(bytes);
    }
    put(DESCRIPTOR, 0);
    // A message may have changed the configuration: CFGI_ALL, TLBI_NSNH_ALL, TLBI_EL2_ALL.
    for (opcode, range) in [(0x04, 31), (0x30, 0), (0x20, 0)] {
        let mut all = [0; 16];
        (all[0], all[8]) = (opcode, range);
        issue(&all);
    }
    assert!(
        !*holder.0.lock().unwrap(),
        "a consumer holds a translation that is not mapped"
    );
});
