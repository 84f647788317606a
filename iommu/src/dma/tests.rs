use std::sync::{Arc, Mutex};

use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, Permissions};

use crate::testing::{PAGE, Pages};
use crate::{
    Access, AddressSpace, DmaSpace, FaultReason, GuestRam, Iommu, IommuNotifier, IommuRegion,
    IovaRange, Mapping, NotifierEvents, NotifierSink, Perm, Registration, StreamId,
};

fn map(pages: &Pages, iova: u64, gpa: u64, perm: Perm) {
    pages.state().pages.insert(iova, (gpa, perm));
}

fn setup() -> (Arc<Pages>, Arc<IommuRegion>, DmaSpace) {
    let table = Pages::new(NotifierEvents::MAP | NotifierEvents::UNMAP);
    let region = IommuRegion::new(Arc::clone(&table) as Arc<dyn Iommu>, StreamId(8));
    let ram = GuestRam::from_ranges(&[
        (GuestAddress(0), 0x1_0000),
        (GuestAddress(0x1_0000), 0x1_0000),
    ]);
    let space = AddressSpace::translated(Arc::clone(&region), Arc::new(ram.unwrap()));
    (table, region, space.dma())
}

#[test]
fn buffer_over_scattered_pages_is_one_buffer_to_the_device() {
    let (table, _region, dma) = setup();
    map(&table, 0x10_0000, 0x3000, Perm::READ_WRITE);
    map(&table, 0x10_1000, 0x1_5000, Perm::READ_WRITE);
    let data: Vec<u8> = (0..=255).cycle().take(6000).collect();
    let view = dma.view();
    view.write_slice(&data, GuestAddress(0x10_0100)).unwrap();
    let ram = dma.space().ram();
    let mut first = vec![0; 0xf00];
    ram.read_slice(&mut first, GuestAddress(0x3100)).unwrap();
    let mut second = vec![0; 6000 - 0xf00];
    ram.read_slice(&mut second, GuestAddress(0x1_5000)).unwrap();
    assert_eq!([first, second].concat(), data);
}

#[test]
fn write_to_a_read_only_page_writes_nothing_and_faults() {
    let (table, region, dma) = setup();
    map(&table, 0x4000, 0x3000, Perm::READ);
    let view = dma.view();
    assert!(view.write_obj(7_u32, GuestAddress(0x4000)).is_err());
    assert_eq!(view.fault().unwrap().reason, FaultReason::Permission);
    assert_eq!(view.read_obj::<u32>(GuestAddress(0x4000)).unwrap(), 0);
    assert_eq!(region.stats().faults.iter().sum::<u64>(), 1);
}

#[test]
fn range_beyond_the_address_space_is_no_range() {
    let (table, _region, dma) = setup();
    map(&table, !(PAGE - 1), 0x3000, Perm::READ_WRITE);
    let view = dma.view();
    let last = GuestAddress(u64::MAX - 7);
    assert!(view.check_range(last, 8, Permissions::Read));
    assert!(!view.check_range(last, 9, Permissions::Read));
    assert!(!view.check_range(last, usize::MAX, Permissions::Read));
}

#[test]
fn translation_outside_of_ram_is_a_fault() {
    let (table, _region, dma) = setup();
    map(&table, 0x4000, 0xdead_b000, Perm::READ_WRITE);
    let view = dma.view();
    assert!(view.read_obj::<u8>(GuestAddress(0x4000)).is_err());
    assert_eq!(view.take_fault().unwrap().reason, FaultReason::NotRam);
}

#[test]
fn identity_space_is_all_of_ram_and_nothing_else() {
    let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap());
    let dma = AddressSpace::identity(StreamId(8), ram).dma();
    let view = dma.view();
    view.write_obj(0x55_u8, GuestAddress(0x1fff)).unwrap();
    assert!(view.write_obj(0x55_u16, GuestAddress(0x1fff)).is_err());
    assert!(view.read_obj::<u8>(GuestAddress(0x2000)).is_err());
}

#[test]
fn cached_translation_is_dropped_with_its_mapping() {
    let (table, _region, dma) = setup();
    map(&table, 0x4000, 0x3000, Perm::READ_WRITE);
    for _ in 0..3 {
        dma.view().read_obj::<u8>(GuestAddress(0x4000)).unwrap();
    }
    assert_eq!(
        table.state().requests.0,
        1,
        "the second access was served by the cache"
    );
    table.unmap(&[0x4000]);
    assert!(dma.view().read_obj::<u8>(GuestAddress(0x4000)).is_err());
}

#[test]
fn unmap_waits_for_the_view_that_uses_the_page() {
    let (table, _region, dma) = setup();
    map(&table, 0x4000, 0x3000, Perm::READ_WRITE);
    let (done, is_done) = std::sync::mpsc::channel();
    let view = dma.view();
    view.read_obj::<u8>(GuestAddress(0x4000)).unwrap();
    let unmapper = std::thread::spawn(move || {
        table.unmap(&[0x4000]);
        done.send(()).unwrap();
    });
    let early = is_done.recv_timeout(std::time::Duration::from_millis(50));
    assert!(early.is_err(), "the unmap returned under a running access");
    drop(view);
    is_done.recv().unwrap();
    unmapper.join().unwrap();
}

#[derive(Default)]
struct Log(Mutex<Vec<String>>);

impl NotifierSink for Log {
    fn map(&self, mapping: &Mapping) {
        let line = format!("map {} -> {} {:?}", mapping.iova, mapping.gpa, mapping.perm);
        self.0.lock().unwrap().push(line);
    }

    fn unmap(&self, ranges: &[IovaRange]) {
        self.0.lock().unwrap().push(format!("unmap {ranges:?}"));
    }

    fn registered(&self, outcome: &Registration) {
        let refused: Vec<_> = outcome.refused.iter().map(|r| r.events).collect();
        let line = format!("registered {} refused {refused:?}", outcome.events);
        self.0.lock().unwrap().push(line);
    }
}

#[test]
fn notifier_falls_back_and_receives_the_present_mappings() {
    let (table, region, _dma) = setup();
    map(&table, 0x4000, 0x3000, Perm::READ);
    let log = Arc::new(Log::default());
    let id = region.register(IommuNotifier {
        acceptable: vec![
            NotifierEvents::DEVIOTLB_UNMAP,
            NotifierEvents::MAP | NotifierEvents::UNMAP,
        ],
        range: IovaRange::ALL,
        sink: Arc::clone(&log) as Arc<dyn NotifierSink>,
    });
    table.unmap(&[0x4000]);
    region.unregister(id);
    table.unmap(&[0x5000]);
    assert_eq!(
        *log.0.lock().unwrap(),
        [
            "registered map+unmap refused [dev-iotlb]",
            "map 0x4000..=0x4fff -> 0x3000 r-",
            "unmap [0x4000..=0x4fff]",
        ]
    );
}

#[test]
fn access_kind_of_a_view_follows_the_permissions_asked_for() {
    let (table, _region, dma) = setup();
    map(&table, 0x4000, 0x3000, Perm::WRITE);
    let view = dma.view();
    let at = GuestAddress(0x4000);
    assert!(view.check_range(at, 8, Permissions::Write));
    assert!(!view.check_range(at, 8, Permissions::Read));
    assert!(!view.check_range(at, 8, Permissions::ReadWrite));
    assert_eq!(view.fault().unwrap().access, Access::Read);
}
