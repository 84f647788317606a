mod domains;
mod naive;

use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::GuestAddress;

use super::spec::{Features, Status, request};
use super::*;
use crate::{Access, IommuNotifier, IommuRegion, NotifierSink, Registration};

const NIC: StreamId = StreamId(0x08);
/// `max_mappings` of the model.
const MAX_MAPPINGS: usize = 1000;
const DISK: StreamId = StreamId(0x10);
const ALL: Features =
    Features::all().difference(Features::INPUT_RANGE.union(Features::DOMAIN_RANGE));

#[derive(Default)]
struct Reports(Mutex<Vec<FaultReport>>);

impl FaultSink for Reports {
    fn report(&self, report: &FaultReport) {
        self.0.lock().unwrap().push(*report);
    }
}

/// A consumer with a cache of `room` mappings.
struct Cache {
    room: usize,
    held: Mutex<Vec<Iova>>,
}

impl NotifierSink for Cache {
    fn map(&self, mapping: &Mapping) {
        self.held.lock().unwrap().push(mapping.iova.first());
    }

    fn wants_more(&self) -> bool {
        self.held.lock().unwrap().len() < self.room
    }

    fn unmap(&self, _ranges: &[IovaRange]) {
        self.held.lock().unwrap().clear();
    }

    fn registered(&self, _outcome: &Registration) {}
}

/// Events that a notifier received, in order.
#[derive(Default)]
struct Listener(Mutex<Vec<String>>);

impl Listener {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap())
    }
}

impl NotifierSink for Listener {
    fn map(&self, mapping: &Mapping) {
        let line = format!("map {} {:?}", mapping.iova, mapping.perm);
        self.0.lock().unwrap().push(line);
    }

    fn unmap(&self, ranges: &[IovaRange]) {
        self.0.lock().unwrap().push(format!("unmap {ranges:?}"));
    }

    fn registered(&self, outcome: &Registration) {
        self.0.lock().unwrap().push(outcome.events.to_string());
    }
}

struct Setup {
    iommu: Arc<VirtioIommu>,
    reports: Arc<Reports>,
    nic: Arc<IommuRegion>,
    disk: Arc<IommuRegion>,
}

fn setup() -> Setup {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap();
    let reports = Arc::new(Reports::default());
    let config = VirtioIommuConfig {
        input_range: IovaRange::new(Iova(0), Iova((1 << 48) - 1)).unwrap(),
        msi_window: Some(IovaRange::new(Iova(0xfee0_0000), Iova(0xfeef_ffff)).unwrap()),
        boot_bypass: true,
        max_mappings: MAX_MAPPINGS,
    };
    let sink = Arc::clone(&reports) as Arc<dyn FaultSink>;
    let iommu = Arc::new(VirtioIommu::new(config, Arc::new(ram), sink));
    iommu.negotiated(ALL);
    let region = |stream| IommuRegion::new(Arc::clone(&iommu) as Arc<dyn Iommu>, stream);
    Setup {
        nic: region(NIC),
        disk: region(DISK),
        reports,
        iommu,
    }
}

impl Setup {
    fn send(&self, request: &[u8]) -> Status {
        let mut reply = [0xff; 600];
        let size = self.iommu.handle(request, &mut reply);
        self.iommu.flush();
        let status = reply[size.checked_sub(4).expect("it is answered")];
        let known = [
            Status::Ok,
            Status::Inval,
            Status::Range,
            Status::Noent,
            Status::Nomem,
        ];
        *known.iter().find(|known| **known as u8 == status).unwrap()
    }

    fn listen(&self) -> Arc<Listener> {
        let listener = Arc::new(Listener::default());
        self.nic.register(IommuNotifier {
            acceptable: vec![
                NotifierEvents::DEVIOTLB_UNMAP,
                NotifierEvents::MAP | NotifierEvents::UNMAP,
            ],
            range: IovaRange::ALL,
            sink: Arc::clone(&listener) as Arc<dyn NotifierSink>,
        });
        listener
    }

    fn read(&self, iova: u64) -> Result<Gpa, FaultReason> {
        let answer = self.nic.enter().translate(Iova(iova), Access::Read);
        answer
            .map(|mapping| mapping.gpa_of(Iova(iova)).unwrap())
            .map_err(|fault| fault.reason)
    }
}

fn attach(domain: u32, endpoint: StreamId, flags: u32) -> Vec<u8> {
    let words = [domain, endpoint.0, flags, 0];
    head(
        request::ATTACH,
        words.into_iter().flat_map(u32::to_le_bytes),
    )
}

fn detach(domain: u32, endpoint: StreamId) -> Vec<u8> {
    let words = [domain, endpoint.0, 0, 0];
    head(
        request::DETACH,
        words.into_iter().flat_map(u32::to_le_bytes),
    )
}

fn map(domain: u32, first: u64, last: u64, gpa: u64, flags: u32) -> Vec<u8> {
    let body = domain.to_le_bytes().into_iter();
    let body = body.chain([first, last, gpa].into_iter().flat_map(u64::to_le_bytes));
    head(request::MAP, body.chain(flags.to_le_bytes()))
}

fn unmap(domain: u32, first: u64, last: u64) -> Vec<u8> {
    let body = domain.to_le_bytes().into_iter();
    let body = body.chain([first, last].into_iter().flat_map(u64::to_le_bytes));
    head(request::UNMAP, body.chain([0; 4]))
}

fn probe(endpoint: StreamId) -> Vec<u8> {
    head(
        request::PROBE,
        endpoint.0.to_le_bytes().into_iter().chain([0; 64]),
    )
}

fn head(kind: u8, body: impl Iterator<Item = u8>) -> Vec<u8> {
    [kind, 0, 0, 0].into_iter().chain(body).collect()
}

#[test]
fn request_sizes_are_those_of_the_specification() {
    assert_eq!(attach(1, NIC, 0).len(), request::ATTACH_SIZE);
    assert_eq!(detach(1, NIC).len(), request::DETACH_SIZE);
    assert_eq!(map(1, 0, 0, 0, 0).len(), request::MAP_SIZE);
    assert_eq!(unmap(1, 0, 0).len(), request::UNMAP_SIZE);
    assert_eq!(probe(NIC).len(), request::PROBE_SIZE);
}

/// Checks every rule of §5.13.6 that a single request can break. One endpoint
/// is attached to domain 1 with 0x1000..=0x2fff mapped, another to bypass
/// domain 2.
#[test]
fn every_rule_has_its_status() {
    use Status::{Inval, Noent, Ok, Range};
    let stranger = StreamId(0x99);
    let corrupt = |mut request: Vec<u8>, at: usize| {
        request[at] = 1;
        request
    };
    let table: Vec<(&str, Vec<u8>, Status)> = vec![
        ("head is reserved", corrupt(unmap(1, 0, 0xfff), 1), Ok),
        ("a head cut short", vec![request::MAP, 0, 0], Inval),
        ("short attach", attach(1, NIC, 0)[..19].to_vec(), Inval),
        ("attach reserved", corrupt(attach(1, NIC, 0), 16), Inval),
        ("attach unknown flag", attach(1, NIC, 2), Inval),
        ("attach unknown endpoint", attach(1, stranger, 0), Noent),
        ("attach again", attach(1, NIC, 0), Ok),
        ("bypass into translated domain", attach(1, DISK, 1), Inval),
        ("translated into bypass domain", attach(2, NIC, 0), Inval),
        ("short detach", detach(1, NIC)[..19].to_vec(), Inval),
        ("detach reserved", corrupt(detach(1, NIC), 19), Ok),
        ("detach unknown endpoint", detach(1, stranger), Noent),
        ("detach from another domain", detach(2, NIC), Inval),
        ("detach from no domain", detach(9, NIC), Inval),
        ("short map", map(1, 0, 0xfff, 0, 1)[..35].to_vec(), Inval),
        ("map unknown domain", map(9, 0x8000, 0x8fff, 0, 1), Noent),
        ("map unknown flag", map(1, 0x8000, 0x8fff, 0, 8), Inval),
        ("map unaligned start", map(1, 0x8001, 0x8fff, 0, 1), Range),
        ("map unaligned end", map(1, 0x8000, 0x8ffe, 0, 1), Range),
        ("map unaligned target", map(1, 0x8000, 0x8fff, 1, 1), Range),
        ("map end before start", map(1, 0x8000, 0x6fff, 0, 1), Inval),
        ("map over", map(1, 0x2000, 0x4fff, 0, 1), Inval),
        (
            "map beyond the input range",
            map(1, 0, u64::MAX, 0, 1),
            Range,
        ),
        ("map in bypass domain", map(2, 0x8000, 0x8fff, 0, 1), Inval),
        (
            "map over MSIs",
            map(1, 0xfee0_0000, 0xfee0_0fff, 0, 1),
            Inval,
        ),
        (
            "map to the end of memory and beyond",
            map(1, 0x8000, 0x9fff, u64::MAX - 0xfff, 1),
            Range,
        ),
        ("map device memory", map(1, 0x9000, 0x9fff, 0, 7), Ok),
        ("short unmap", unmap(1, 0, 0xfff)[..27].to_vec(), Inval),
        ("unmap reserved", corrupt(unmap(1, 0, 0xfff), 24), Inval),
        ("unmap unknown domain", unmap(9, 0, 0xfff), Noent),
        ("unmap end before start", unmap(1, 0x3000, 0x1fff), Inval),
        ("unmap unaligned", unmap(1, 0x801, 0x3001), Ok),
        ("unmap beyond the input range", unmap(1, 0, u64::MAX), Ok),
        ("unmap a part", unmap(1, 0x1000, 0x1fff), Range),
        ("unmap a part of a page", unmap(1, 0x1001, 0x2fff), Range),
        ("unmap nothing", unmap(1, 0x4_0000, 0x4_ffff), Ok),
        ("unmap in bypass domain", unmap(2, 0, 0xfff), Inval),
        ("unmap with holes", unmap(1, 0, 0xffff), Ok),
        ("probe unknown endpoint", probe(stranger), Noent),
        ("short probe", probe(NIC)[..71].to_vec(), Inval),
        ("probe reserved", corrupt(probe(NIC), 8), Ok),
        ("probe", probe(NIC), Ok),
    ];
    for (what, request, status) in table {
        let setup = setup();
        assert_eq!(setup.send(&attach(1, NIC, 0)), Ok);
        assert_eq!(setup.send(&attach(2, DISK, 1)), Ok);
        assert_eq!(setup.send(&map(1, 0x1000, 0x2fff, 0x5000, 3)), Ok);
        assert_eq!(setup.send(&request), status, "{what}");
    }
}

/// Handles a request with `room` device-writable bytes. Returns the number of
/// written bytes and the contents of all.
fn handle(setup: &Setup, request: &[u8], room: usize) -> (usize, Vec<u8>) {
    let mut reply = vec![0xff; room];
    let written = setup.iommu.handle(request, &mut reply);
    setup.iommu.flush();
    (written, reply)
}

#[test]
fn request_of_an_unknown_type_is_returned_unwritten() {
    let setup = setup();
    for kind in [0, 6, 77, 0xff] {
        let (written, reply) = handle(&setup, &head(kind, [0; 68].into_iter()), 600);
        assert_eq!((written, reply), (0, vec![0xff; 600]), "type {kind}");
    }
    assert_eq!(handle(&setup, &[], 600).0, 0, "no type, so no tail");
}

#[test]
fn request_of_a_feature_that_was_not_negotiated_is_returned_unwritten() {
    let setup = setup();
    setup.send(&attach(1, NIC, 0));
    setup.send(&map(1, 0x1000, 0x1fff, 0, 3));
    setup.iommu.negotiated(ALL & !Features::MAP_UNMAP);
    for request in [map(1, 0x4000, 0x4fff, 0, 3), unmap(1, 0x1000, 0x1fff)] {
        assert_eq!(handle(&setup, &request, 4), (0, vec![0xff; 4]));
    }
    assert_eq!(setup.iommu.mapped(), 1, "neither is carried out");
    setup.iommu.negotiated(ALL & !Features::PROBE);
    assert_eq!(handle(&setup, &probe(NIC), 516), (0, vec![0xff; 516]));
    let (written, _) = handle(&setup, &detach(1, NIC), 4);
    assert_eq!(written, 4, "ATTACH and DETACH need no feature");
}

#[test]
fn request_without_room_for_a_tail_is_returned_unwritten() {
    let setup = setup();
    for request in [attach(1, NIC, 0), probe(NIC)] {
        for room in 0..4 {
            assert_eq!(handle(&setup, &request, room), (0, vec![0xff; room]));
        }
    }
    assert_eq!(setup.iommu.endpoint(NIC).unwrap().domain, None);
}

#[test]
fn probe_without_room_for_all_properties_writes_none() {
    let setup = setup();
    for room in [4, 5, 28, 515] {
        let (written, reply) = handle(&setup, &probe(NIC), room);
        let tail = [Status::Inval as u8, 0, 0, 0];
        assert_eq!(written, room);
        assert_eq!(reply, [vec![0; room - 4], tail.to_vec()].concat());
    }
    let (written, reply) = handle(&setup, &probe(NIC), 520);
    assert_eq!((written, reply[512]), (516, Status::Ok as u8));
}

#[test]
fn bypass_at_boot_answers_with_all_of_ram_until_attached() {
    let setup = setup();
    let whole = setup.nic.enter().translate(Iova(0x1234), Access::Write);
    assert_eq!(whole.unwrap().iova.size(), Some(0x10_0000));
    setup.send(&attach(1, NIC, 0));
    assert_eq!(setup.read(0x1234), Err(FaultReason::Translation));
}

#[test]
fn bypass_survives_reset_as_it_was_set() {
    let setup = setup();
    setup.iommu.set_bypass(0);
    assert_eq!(setup.read(0x1234), Err(FaultReason::Configuration));
    setup.iommu.reset();
    assert_eq!(setup.read(0x1234), Err(FaultReason::Configuration));
    setup.iommu.set_bypass(1);
    assert_eq!(
        setup.read(0x1234),
        Err(FaultReason::Configuration),
        "not negotiated, so it cannot be written"
    );
    setup.iommu.negotiated(ALL);
    setup.iommu.set_bypass(2);
    assert_eq!(setup.read(0x1234), Err(FaultReason::Configuration));
    setup.iommu.set_bypass(1);
    assert_eq!(setup.read(0x1234), Ok(Gpa(0x1234)));
}

#[test]
fn fault_is_reported_with_its_reason() {
    let setup = setup();
    setup.iommu.set_bypass(0);
    let _ = setup.read(0x7008);
    setup.send(&attach(1, NIC, 0));
    setup.send(&map(1, 0x7000, 0x7fff, 0, request::MAP_READ));
    let denied = setup.nic.enter().translate(Iova(0x7008), Access::Write);
    assert_eq!(denied.unwrap_err().reason, FaultReason::Permission);
    let _ = setup.nic.enter().lookup(Iova(0x9000), Access::Read);
    let reports = setup.reports.0.lock().unwrap();
    let bytes: Vec<_> = reports.iter().map(FaultReport::to_bytes).collect();
    assert_eq!(bytes.len(), 2, "a lookup leaves no trace");
    assert_eq!(
        bytes[0],
        [
            1, 0, 0, 0, 1, 1, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 8, 0x70, 0, 0, 0, 0, 0, 0
        ]
    );
    assert_eq!(
        bytes[1],
        [
            2, 0, 0, 0, 2, 1, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 8, 0x70, 0, 0, 0, 0, 0, 0
        ]
    );
}

#[test]
fn notifier_receives_each_view_of_memory_in_turn() {
    let setup = setup();
    let listener = setup.listen();
    assert_eq!(
        listener.take(),
        ["map+unmap", "map 0x0..=0xfffff rw"],
        "bypass is prefilled whole"
    );
    setup.send(&attach(1, NIC, 0));
    setup.send(&map(1, 0x7000, 0x7fff, 0, request::MAP_READ));
    assert_eq!(
        listener.take(),
        ["unmap [0x0..=0xffffffffffffffff]", "map 0x7000..=0x7fff r-"]
    );
    setup.send(&attach(3, DISK, 0));
    setup.send(&map(3, 0x7000, 0x7fff, 0, 3));
    setup.send(&unmap(3, 0x7000, 0x7fff));
    assert_eq!(listener.take(), [""; 0], "another domain is no concern");
    setup.send(&detach(1, NIC));
    assert_eq!(
        listener.take(),
        ["unmap [0x0..=0xffffffffffffffff]", "map 0x0..=0xfffff rw"]
    );
}

#[test]
fn adjacent_unmaps_of_one_kick_are_one_invalidation() {
    let setup = setup();
    setup.send(&attach(1, NIC, 0));
    for page in 0..4_u64 {
        setup.send(&map(1, page << 12, (page << 12) | 0xfff, 0, 3));
    }
    let listener = setup.listen();
    listener.take();
    let mut reply = [0; 4];
    for page in [0_u64, 1, 3] {
        let request = unmap(1, page << 12, (page << 12) | 0xfff);
        assert_eq!(setup.iommu.handle(&request, &mut reply), 4);
    }
    assert_eq!(listener.take(), [""; 0], "nothing before the flush");
    setup.iommu.flush();
    assert_eq!(listener.take(), ["unmap [0x0..=0x1fff, 0x3000..=0x3fff]"]);
}

#[test]
fn map_after_unmap_is_not_dropped_by_the_pending_invalidation() {
    let setup = setup();
    setup.send(&attach(1, NIC, 0));
    setup.send(&map(1, 0x1000, 0x1fff, 0, 3));
    let listener = setup.listen();
    listener.take();
    let mut reply = [0; 4];
    for request in [unmap(1, 0x1000, 0x1fff), map(1, 0x1000, 0x1fff, 0x2000, 1)] {
        assert_eq!(setup.iommu.handle(&request, &mut reply), 4);
    }
    setup.iommu.flush();
    assert_eq!(
        listener.take(),
        ["unmap [0x1000..=0x1fff]", "map 0x1000..=0x1fff r-"]
    );
}

#[test]
fn domain_ends_with_its_last_endpoint() {
    let setup = setup();
    setup.send(&attach(1, NIC, 0));
    setup.send(&attach(1, DISK, 0));
    setup.send(&map(1, 0x1000, 0x1fff, 0, 3));
    setup.send(&attach(2, NIC, 0));
    assert_eq!(setup.iommu.mapped(), 1);
    assert_eq!(setup.send(&detach(1, DISK)), Status::Ok);
    assert_eq!(setup.iommu.mapped(), 0);
    assert_eq!(setup.send(&map(1, 0, 0xfff, 0, 3)), Status::Noent);
}

#[test]
fn replay_ends_when_the_notifier_wants_no_more() {
    let setup = setup();
    setup.send(&attach(1, NIC, 0));
    let pages = 2 * REPLAY_PIECE as u64 + 5;
    for page in 0..pages {
        setup.send(&map(1, page << 12, (page << 12) | 0xfff, 0, 3));
    }
    let cache = |room, range| {
        let held = Mutex::default();
        let cache = Arc::new(Cache { room, held });
        setup.disk.register(IommuNotifier {
            acceptable: vec![NotifierEvents::MAP | NotifierEvents::UNMAP],
            range,
            sink: Arc::clone(&cache) as Arc<dyn NotifierSink>,
        });
        cache
    };
    let page = IovaRange::new(Iova(0x10_0000), Iova(0x10_0fff)).unwrap();
    let caches = [
        cache(usize::MAX, IovaRange::ALL),
        cache(300, IovaRange::ALL),
        cache(0, IovaRange::ALL),
        cache(usize::MAX, page),
    ];
    let before = setup.disk.stats().maps;
    setup.send(&attach(1, DISK, 0));
    let held: Vec<Vec<Iova>> = caches
        .iter()
        .map(|cache| cache.held.lock().unwrap().clone())
        .collect();
    let all: Vec<_> = (0..pages).map(|page| Iova(page << 12)).collect();
    assert_eq!(held, [&all, &all[..300], &[], &[Iova(0x10_0000)]]);
    assert_eq!(setup.disk.stats().maps - before, pages + 300 + 1);
}

#[test]
fn mappings_are_bounded() {
    let setup = setup();
    setup.send(&attach(1, NIC, 0));
    setup.send(&attach(2, DISK, 0));
    let base = 1_u64 << 33;
    let one = |domain: u32, page: u64| {
        let first = base + (page << 12);
        map(domain, first, first + 0xfff, 0, 3)
    };
    let full = MAX_MAPPINGS as u64;
    assert_eq!(setup.send(&one(2, 0)), Status::Ok);
    for page in 1..full {
        assert_eq!(setup.send(&one(1, page)), Status::Ok);
    }
    for domain in [1, 2] {
        assert_eq!(setup.send(&one(domain, full)), Status::Nomem);
    }
    assert_eq!(setup.send(&unmap(1, base, (1 << 40) - 1)), Status::Ok);
    assert_eq!(setup.iommu.mapped(), 1);
    assert_eq!(setup.send(&one(2, full)), Status::Ok);
}

#[test]
fn interrupts_of_an_attached_endpoint_pass_untranslated() {
    let setup = setup();
    setup.send(&attach(1, NIC, 0));
    let doorbell = Iova(0xfee0_1000);
    let mapping = setup
        .nic
        .enter()
        .translate(doorbell, Access::Write)
        .unwrap();
    assert_eq!(mapping.gpa_of(doorbell), Some(Gpa(0xfee0_1000)));
    assert!(setup.nic.enter().translate(doorbell, Access::Read).is_err());
    let mut reply = [0; 600];
    assert_eq!(setup.iommu.handle(&probe(NIC), &mut reply), 516);
    assert_eq!(reply[..8], [1, 0, 20, 0, 1, 0, 0, 0]);
    assert_eq!(reply[8..16], 0xfee0_0000_u64.to_le_bytes());
    assert_eq!(reply[16..24], 0xfeef_ffff_u64.to_le_bytes());
}

proptest! {
    #[test]
    fn no_bytes_of_a_driver_panic(requests in prop::collection::vec(
        (0_u8..8, prop::collection::vec(any::<u8>(), 0..100)), 0..20,
    )) {
        let setup = setup();
        let mut reply = [0; 600];
        for (kind, mut bytes) in requests {
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            let _ = setup.iommu.handle(&bytes, &mut reply);
        }
        setup.iommu.flush();
    }
}
