use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use iommu::virtio::{FaultReport, FaultSink, VirtioIommu, VirtioIommuConfig, spec};
use iommu::{Fault, FaultReason, Iommu, IommuRegion, Perm, Refused, Request, StreamSink};

use super::*;
use crate::interrupt::MsiAllocator as _;
use crate::testing::{self, Board, REQUESTER, Vector};

const DOORBELL: u64 = 0x808_0040;
const PAGE: u64 = 0x808_0000;
const FRAME: u64 = 0x7700_0000;

/// An IOMMU of one page, with or without `MAP` events.
#[derive(Default)]
struct OnePage {
    frame: Mutex<Option<Gpa>>,
    announces: bool,
    registered: Mutex<usize>,
    /// Number of recorded faults; `None` when a signalled message may not
    /// fault.
    faults: Option<AtomicUsize>,
    lookups: AtomicUsize,
}

impl OnePage {
    fn mapping(&self) -> Option<Mapping> {
        Some(Mapping {
            iova: IovaRange::block(Iova(PAGE), 12),
            gpa: (*self.frame.lock().unwrap())?,
            perm: Perm::WRITE,
        })
    }

    fn set(&self, frame: Option<u64>) {
        *self.frame.lock().unwrap() = frame.map(Gpa);
    }
}

impl Iommu for OnePage {
    fn translate(&self, request: &Request) -> Result<Mapping, Fault> {
        let Some(faults) = &self.faults else {
            panic!("{request:?} leaves a trace");
        };
        let answer = self.lookup(request);
        faults.fetch_add(usize::from(answer.is_err()), Ordering::Relaxed);
        answer
    }

    fn lookup(&self, request: &Request) -> Result<Mapping, Fault> {
        self.lookups.fetch_add(1, Ordering::Relaxed);
        let mapping = self.mapping();
        let found = mapping.filter(|mapping| mapping.iova.contains(request.iova));
        found.ok_or(Fault {
            stream: request.stream,
            iova: request.iova,
            access: request.access,
            reason: FaultReason::Translation,
        })
    }

    fn notifier_events_changed(
        &self,
        _: StreamId,
        _: NotifierEvents,
        new: NotifierEvents,
    ) -> Result<(), Refused> {
        if new.contains(NotifierEvents::MAP) && !self.announces {
            return Err(Refused {
                events: NotifierEvents::MAP,
                reason: "of a test",
            });
        }
        *self.registered.lock().unwrap() += 1;
        Ok(())
    }

    fn replay(
        &self,
        _: StreamId,
        range: IovaRange,
        visit: &mut dyn FnMut(&Mapping) -> std::ops::ControlFlow<()>,
    ) {
        if let Some(mapping) = self.mapping().and_then(|mapping| mapping.clipped(range)) {
            let _ = visit(&mapping);
        }
    }

    fn connect(&self, _: StreamId, _: Weak<dyn StreamSink>) {}
}

struct Machine {
    iommu: Arc<OnePage>,
    region: Arc<IommuRegion>,
    target: Arc<MsiTarget>,
    retranslator: Arc<MsiRetranslator>,
    vectors: Vec<Arc<Vector>>,
}

fn machine(announces: bool) -> Machine {
    machine_of(OnePage {
        announces,
        ..OnePage::default()
    })
}

fn machine_of(iommu: OnePage) -> Machine {
    let iommu = Arc::new(iommu);
    let region = IommuRegion::new(Arc::clone(&iommu) as Arc<dyn Iommu>, REQUESTER);
    let space = AddressSpace::translated(Arc::clone(&region), testing::ram());
    let retranslator = MsiRetranslator::new().unwrap();
    let target = Requester::new(space, &retranslator).msi;
    let board = Board::default();
    let vectors = (0..3).map(|number| {
        assert_eq!(target.add(board.vector().unwrap()), number);
        board.allocated(number)
    });
    Machine {
        vectors: vectors.collect(),
        iommu,
        region,
        target,
        retranslator,
    }
}

impl Machine {
    fn map(&self, frame: u64) {
        self.iommu.set(Some(frame));
        if self.iommu.announces {
            self.region.map(&self.iommu.mapping().unwrap());
        }
    }

    fn unmap(&self) {
        self.iommu.set(None);
        self.region.invalidate(&[IovaRange::ALL]);
    }

    fn send(&self, vector: usize) {
        self.target.set(vector, Some((Iova(DOORBELL), 5)));
    }

    /// Address of the message that a source is routed to.
    fn address(&self, vector: usize) -> Option<u64> {
        self.vectors[vector].message().map(|message| {
            assert_eq!((message.data, message.requester), (5, REQUESTER));
            message.address.0
        })
    }
}

#[test]
fn message_is_sent_to_its_translated_address() {
    for announces in [true, false] {
        let machine = machine(announces);
        machine.send(0);
        assert_eq!(machine.address(0), None);
        machine.map(FRAME);
        machine.send(1);
        assert_eq!(machine.address(1), Some(FRAME + 0x40));
        // With `MAP` events the guest need not write the message again.
        let first = announces.then_some(FRAME + 0x40);
        assert_eq!(machine.address(0), first);
        machine.send(0);
        assert_eq!(machine.address(0), Some(FRAME + 0x40));
    }
}

#[test]
fn unmapped_doorbell_receives_nothing_until_it_is_mapped_again() {
    for announces in [true, false] {
        let machine = machine(announces);
        machine.map(FRAME);
        machine.send(0);
        machine.unmap();
        assert_eq!(machine.address(0), None);
        machine.map(FRAME + 0x1000);
        machine.target.retry(0);
        assert_eq!(machine.address(0), Some(FRAME + 0x1040));
    }
}

#[test]
fn thread_and_an_invalidation_without_changes_keep_the_route() {
    let machine = machine(false);
    let thread = machine.retranslator.start().unwrap();
    machine.map(FRAME);
    machine.send(0);
    // An invalidation of everything without a change: the usual case.
    machine.region.invalidate(&[IovaRange::ALL]);
    while machine.address(0).is_none() {
        thread::yield_now();
    }
    drop(thread);
    machine.unmap();
    assert_eq!(machine.address(0), None);
}

/// A machine whose IOMMU does not announce mappings and records faults.
fn silent_machine() -> Machine {
    machine_of(OnePage {
        faults: Some(AtomicUsize::new(0)),
        ..OnePage::default()
    })
}

impl Machine {
    /// Signals the interrupt of a device.
    fn signal(&self, vector: usize) {
        self.vectors[vector].eventfd().write(1).unwrap();
    }

    fn faults(&self) -> usize {
        let faults = self.iommu.faults.as_ref();
        faults.map_or(0, |faults| faults.load(Ordering::Relaxed))
    }

    /// Waits until a source is routed.
    fn arrives(&self, vector: usize) {
        while self.address(vector).is_none() {
            thread::yield_now();
        }
    }
}

#[test]
fn interrupt_arrives_when_its_doorbell_is_mapped_again_without_an_invalidation() {
    let machine = silent_machine();
    let _thread = machine.retranslator.start().unwrap();
    machine.map(FRAME);
    for vector in 0..3 {
        machine.send(vector);
    }
    machine.unmap();
    // Masked, like a vector that the driver does not use.
    machine.target.set(2, None);
    machine.signal(2);
    machine.map(FRAME + 0x1000);
    assert_eq!(machine.address(0), None, "no notifier hears of a mapping");
    machine.signal(0);
    machine.arrives(0);
    assert_eq!(machine.address(0), Some(FRAME + 0x1040));
    assert_eq!(machine.vectors[0].signals(), 1, "it is pending until then");
    machine.signal(1);
    machine.arrives(1);
    assert_eq!(machine.address(2), None, "it is masked");
    assert!(machine.target.pending(2));
    assert_eq!(machine.faults(), 0);
}

#[test]
fn interrupt_set_up_while_its_doorbell_is_not_mapped_arrives_later() {
    let machine = silent_machine();
    let _thread = machine.retranslator.start().unwrap();
    machine.send(0);
    machine.map(FRAME);
    machine.signal(0);
    machine.arrives(0);
    assert_eq!(machine.address(0), Some(FRAME + 0x40));
}

#[test]
fn interrupt_that_was_signalled_first_arrives_with_the_next_signal_of_its_requester() {
    let machine = silent_machine();
    let _thread = machine.retranslator.start().unwrap();
    for vector in 0..3 {
        machine.send(vector);
    }
    machine.signal(0);
    while machine.faults() == 0 {
        thread::yield_now();
    }
    machine.map(FRAME);
    machine.signal(1);
    for vector in 0..3 {
        machine.arrives(vector);
    }
    assert_eq!(machine.vectors[0].signals(), 1);
    assert_eq!(machine.vectors[2].signals(), 0);
}

#[test]
fn fault_of_a_message_is_recorded_once_until_it_is_set_or_mapped_again() {
    let machine = silent_machine();
    machine.send(0);
    machine.send(1);
    assert_eq!(machine.faults(), 0, "setting up a message is no access");
    let retry_often = |vector| (0..5).for_each(|_| machine.target.retry(vector));
    retry_often(0);
    assert_eq!(machine.faults(), 1);
    retry_often(1);
    assert_eq!(machine.faults(), 2);
    machine.send(0);
    retry_often(0);
    assert_eq!(machine.faults(), 3);
    machine.map(FRAME);
    retry_often(0);
    machine.unmap();
    retry_often(0);
    assert_eq!(machine.faults(), 4);
    // A masked source sends no message.
    machine.target.set(0, None);
    retry_often(0);
    assert_eq!(machine.faults(), 4);
}

#[test]
fn flush_that_changes_no_mapping_touches_no_route() {
    for announces in [true, false] {
        let machine = machine(announces);
        machine.map(FRAME);
        for vector in 0..3 {
            machine.send(vector);
        }
        let before: Vec<_> = machine.vectors.iter().map(|v| v.routes()).collect();
        let lookups = machine.iommu.lookups.load(Ordering::Relaxed);
        for _ in 0..10 {
            machine.region.invalidate(&[IovaRange::ALL]);
            machine.region.invalidate_all();
        }
        let after: Vec<_> = machine.vectors.iter().map(|v| v.routes()).collect();
        assert_eq!(after, before);
        let lookups = machine.iommu.lookups.load(Ordering::Relaxed) - lookups;
        assert_eq!(lookups, 20, "one for each flush, for all three");
    }
}

#[test]
fn doorbell_that_moved_is_replaced_when_its_invalidation_returns() {
    let machine = machine(false);
    machine.map(FRAME);
    machine.send(0);
    // The tables change first; until the invalidation both targets are valid.
    machine.map(FRAME + 0x1000);
    assert_eq!(machine.address(0), Some(FRAME + 0x40));
    machine.region.invalidate(&[IovaRange::ALL]);
    let addresses = (machine.vectors[0].routes().into_iter())
        .map(|message| message.map(|message| message.address.0));
    let addresses: Vec<_> = addresses.collect();
    assert_eq!(addresses, [Some(FRAME + 0x40), Some(FRAME + 0x1040)]);
}

#[test]
fn invalidation_of_other_pages_changes_no_route() {
    let machine = machine(false);
    machine.map(FRAME);
    machine.send(0);
    let others = [
        IovaRange::block(Iova(PAGE - 0x1000), 12),
        IovaRange::block(Iova(PAGE + 0x1000), 12),
    ];
    machine.region.invalidate(&others);
    assert_eq!(machine.address(0), Some(FRAME + 0x40));
}

#[test]
fn masked_source_stays_unrouted_when_its_page_is_mapped() {
    let machine = machine(true);
    machine.send(0);
    machine.target.set(0, None);
    machine.map(FRAME);
    machine.target.retry(0);
    assert_eq!(machine.address(0), None);
}

#[test]
fn notifiers_are_removed_when_the_guest_changes_doorbells() {
    let machine = machine(true);
    for page in 0..1000 {
        let doorbell = Iova(PAGE + page * 0x1000);
        machine.target.set(0, Some((doorbell, 5)));
        assert_eq!(machine.target.pages.lock().len(), 1);
    }
    machine.target.set(1, Some((Iova(DOORBELL), 5)));
    assert_eq!(machine.target.pages.lock().len(), 2);
    machine.target.set(0, None);
    machine.target.set(1, None);
    assert!(machine.target.pages.lock().is_empty());
    // The last doorbell has a notifier like the first.
    machine.map(FRAME);
    machine.send(2);
    assert_eq!(machine.address(2), Some(FRAME + 0x40));
    machine.unmap();
    assert_eq!(machine.address(2), None);
    assert_eq!(*machine.iommu.registered.lock().unwrap(), 1002);
}

#[test]
fn requester_without_an_iommu_sends_to_the_address_itself() {
    let space = AddressSpace::identity(REQUESTER, testing::ram());
    let target = Requester::new(space, &MsiRetranslator::new().unwrap()).msi;
    let board = Board::default();
    target.add(board.vector().unwrap());
    target.set(0, Some((Iova(DOORBELL), 5)));
    let message = board.allocated(0).message().unwrap();
    assert_eq!(message.address, Gpa(DOORBELL));
}

struct NoFaults;

impl FaultSink for NoFaults {
    fn report(&self, report: &FaultReport) {
        panic!("an interrupt is no access to report: {report:?}");
    }
}

/// Encodes a virtio-iommu request: type, domain, and the rest.
fn request(kind: u8, rest: &[&[u8]]) -> Vec<u8> {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(1_u32.to_le_bytes());
    rest.iter().for_each(|part| bytes.extend(*part));
    bytes
}

#[test]
fn messages_follow_the_mappings_of_a_virtio_iommu() {
    let ram = testing::ram();
    let config = VirtioIommuConfig {
        input_range: IovaRange::block(Iova(0), 48),
        msi_window: Some(IovaRange::block(Iova(0xfee0_0000), 20)),
        max_mappings: 1 << 16,
        boot_bypass: false,
    };
    let model = VirtioIommu::new(config, Arc::clone(&ram), Arc::new(NoFaults));
    let model = Arc::new(model);
    let region = IommuRegion::new(Arc::clone(&model) as Arc<dyn Iommu>, REQUESTER);
    let space = AddressSpace::translated(region, ram);
    let retranslator = MsiRetranslator::new().unwrap();
    let _thread = retranslator.start().unwrap();
    let target = Requester::new(space, &retranslator).msi;
    let board = Board::default();
    for _ in 0..2 {
        target.add(board.vector().unwrap());
    }
    let ask = |bytes: Vec<u8>| {
        let mut reply = [0xff; 4];
        assert_eq!(model.handle(&bytes, &mut reply), reply.len());
        model.flush();
        assert_eq!(reply[0], 0, "{bytes:x?}");
    };
    let address = |number| board.allocated(number).message().map(|m| m.address.0);
    model.negotiated(model.features());
    target.set(0, Some((Iova(DOORBELL), 5)));
    target.set(1, Some((Iova(0xfee0_1000), 5)));
    assert_eq!(address(0), None);
    let (endpoint, padding) = (REQUESTER.0.to_le_bytes(), [0; 8]);
    ask(request(spec::request::ATTACH, &[&endpoint, &padding]));
    // The window of x86 needs a domain and no mapping.
    while address(1) != Some(0xfee0_1000) {
        thread::yield_now();
    }
    let (first, last) = (PAGE.to_le_bytes(), (PAGE + 0xfff).to_le_bytes());
    let to = FRAME.to_le_bytes();
    let write = 2_u32.to_le_bytes();
    ask(request(spec::request::MAP, &[&first, &last, &to, &write]));
    assert_eq!(address(0), Some(FRAME + 0x40));
    ask(request(
        spec::request::UNMAP,
        &[&first, &last, &padding[..4]],
    ));
    assert_eq!(address(0), None);
}
