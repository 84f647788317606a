use std::sync::Mutex;

use iommu::testing::{PAGE, Pages, page};
use iommu::{GuestRam, Hva, Iommu, Perm, StreamId};
use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::prefetch::MAX_PREFETCH;
use super::stalled::{MAX_PENDING, MAX_UNANSWERED};
use super::*;
use crate::testing::Kernel;
use crate::vhost::message::Message;

mod bounds;
mod pairs;

const STREAM: StreamId = StreamId(8);

struct Setup {
    pages: Arc<Pages>,
    kernel: Arc<Kernel>,
    iotlb: Arc<VhostIotlb>,
    failure: Arc<FailureLatch>,
    ram: Arc<GuestRam>,
    space: AddressSpace,
}

const RAM: u64 = 0x20_0000;

fn setup(delivers: NotifierEvents, limit: usize) -> Setup {
    let pages = Pages::new(delivers);
    let region = IommuRegion::new(Arc::clone(&pages) as Arc<dyn Iommu>, STREAM);
    let half = usize::try_from(RAM / 2).unwrap();
    let ranges = [(GuestAddress(0), half), (GuestAddress(RAM / 2), half)];
    let ram = Arc::new(GuestRam::from_ranges(&ranges).unwrap());
    let kernel = Arc::new(Kernel::default());
    kernel.state().limit = limit;
    let failure = Arc::new(FailureLatch::default());
    let options = IotlbOptions {
        limit,
        prefill: true,
        prefetch: true,
        pair: None,
    };
    let channel = Arc::clone(&kernel) as Arc<dyn Channel>;
    let iotlb = VhostIotlb::new("test", channel, options, Arc::clone(&failure)).unwrap();
    let space = AddressSpace::translated(region, Arc::clone(&ram));
    Setup {
        pages,
        kernel,
        iotlb,
        failure,
        ram,
        space,
    }
}

impl Setup {
    fn attached(delivers: NotifierEvents, limit: usize) -> Self {
        let setup = setup(delivers, limit);
        setup.attach().unwrap();
        setup
    }

    fn attach(&self) -> Result<(), DeviceError> {
        let region = self.space.region().unwrap();
        self.iotlb.attach(&self.space, region)
    }

    fn host(&self, gpa: u64) -> Hva {
        let slice = self.ram.get_slice(GuestAddress(gpa), 1).unwrap();
        Hva(slice.ptr_guard().as_ptr().addr() as u64)
    }

    fn agrees(&self) -> bool {
        self.iotlb.sender.table.lock().shadow.in_order() == self.kernel.state().list
    }

    /// A queue of `size` entries. Its rings are at one page each from `iova`
    /// on, mapped to the guest-physical pages from `gpa` on.
    fn ring(&self, size: u16, iova: u64, gpa: u64) -> Ring {
        for (n, perm) in [(0, Perm::READ), (1, Perm::READ), (2, Perm::READ_WRITE)] {
            self.pages.map(iova + n * PAGE, gpa + n * PAGE, perm);
        }
        Ring {
            number: 0,
            layout: Layout {
                size,
                desc: Iova(iova),
                avail: Iova(iova + PAGE),
                used: Iova(iova + 2 * PAGE),
            },
            kick: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        }
    }

    /// Posts one-descriptor buffers on a ring whose tables are at `gpa`.
    fn post(&self, gpa: u64, buffers: &[(u64, u32, u16)]) {
        let put = |bytes: &[u8], at| self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
        for (n, &(iova, len, flags)) in (0_u16..).zip(buffers) {
            let mut descriptor = [0; 16];
            descriptor[..8].copy_from_slice(&iova.to_le_bytes());
            descriptor[8..12].copy_from_slice(&len.to_le_bytes());
            descriptor[12..14].copy_from_slice(&flags.to_le_bytes());
            put(&descriptor, gpa + 16 * u64::from(n));
            put(&n.to_le_bytes(), gpa + PAGE + 4 + 2 * u64::from(n));
        }
        let count = u16::try_from(buffers.len()).unwrap();
        put(&count.to_le_bytes(), gpa + PAGE + 2);
    }
}

const UNMAP: NotifierEvents = NotifierEvents::UNMAP;
const DEVIOTLB: NotifierEvents = NotifierEvents::DEVIOTLB_UNMAP;

fn map_unmap() -> NotifierEvents {
    NotifierEvents::MAP | UNMAP
}

#[test]
fn miss_is_answered_with_the_mapping_and_its_permission() {
    let setup = Setup::attached(UNMAP, 16);
    setup.pages.map(0x10_0000, 0x3000, Perm::READ);
    assert!(!setup.kernel.access(0x10_0123, Access::Read));
    assert!(setup.iotlb.service());
    let held = setup.kernel.holds(0x10_0123).unwrap();
    assert_eq!(held.iova, page(0x10_0000));
    assert_eq!(held.hva, setup.host(0x3000));
    assert_eq!(held.perm, Perm::READ);
    assert_eq!(setup.kernel.state().woken, [Iova(0x10_0123)]);
    assert!(!setup.kernel.access(0x10_0123, Access::Write));
    let stats = setup.iotlb.stats();
    assert_eq!((stats.misses, stats.updates, stats.entries), (1, 1, 1));
}

#[test]
fn bypass_is_answered_with_a_whole_region_of_ram() {
    let setup = Setup::attached(UNMAP, 16);
    setup.pages.state().bypass = true;
    setup.kernel.access(0x18_0000, Access::Write);
    setup.iotlb.service();
    let held = setup.kernel.holds(0x18_0000).unwrap();
    assert_eq!(held.iova.first(), Iova(RAM / 2));
    assert_eq!(held.iova.last(), Iova(RAM - 1));
    assert_eq!(held.hva, setup.host(RAM / 2));
}

#[test]
fn mapping_to_no_ram_is_a_fault() {
    let setup = Setup::attached(UNMAP, 16);
    setup.pages.map(0x4000, 0xfee0_0000, Perm::READ_WRITE);
    setup.kernel.access(0x4000, Access::Write);
    setup.iotlb.service();
    assert!(setup.kernel.holds(0x4000).is_none());
    assert_eq!(setup.iotlb.stats().faults, 1);
}

#[test]
fn registration_falls_back_and_reports_the_reason() {
    let refused = |setup: &Setup| setup.iotlb.stats().refused.len();
    let setup = Setup::attached(DEVIOTLB | map_unmap(), 16);
    assert_eq!(setup.iotlb.stats().registration, DEVIOTLB);
    assert_eq!(refused(&setup), 0);
    let setup = Setup::attached(map_unmap(), 16);
    assert_eq!(setup.iotlb.stats().registration, map_unmap());
    assert_eq!(refused(&setup), 1);
    let setup = Setup::attached(UNMAP, 16);
    assert_eq!(setup.iotlb.stats().registration, UNMAP);
    assert_eq!(refused(&setup), 2);
}

#[test]
fn nothing_is_kept_without_invalidations() {
    let setup = setup(NotifierEvents::empty(), 16);
    assert!(setup.attach().is_err());
    setup.pages.map(0x4000, 0x3000, Perm::READ);
    setup.kernel.access(0x4000, Access::Read);
    setup.iotlb.service();
    assert!(setup.kernel.state().list.is_empty());
}

#[test]
fn mappings_are_sent_when_they_are_made_and_cost_no_miss() {
    let setup = setup(map_unmap(), 16);
    setup.pages.map(0x4000, 0x3000, Perm::READ);
    setup.attach().unwrap();
    setup.pages.map(0x5000, 0x7000, Perm::WRITE);
    assert!(setup.kernel.access(0x4000, Access::Read));
    assert!(setup.kernel.access(0x5fff, Access::Write));
    let stats = setup.iotlb.stats();
    assert_eq!((stats.prefills, stats.misses), (2, 0));
}

#[test]
fn invalidation_without_entries_costs_no_message() {
    let setup = Setup::attached(UNMAP, 16);
    setup.pages.map(0x4000, 0x3000, Perm::READ);
    setup.pages.unmap(&[0x9000, 0x4000]);
    assert_eq!(setup.kernel.state().invalidations, 0);
    assert_eq!(setup.iotlb.stats().invalidations_saved, 2);
    setup.pages.map(0x4000, 0x3000, Perm::READ);
    setup.kernel.access(0x4000, Access::Read);
    setup.iotlb.service();
    setup.pages.unmap(&[0x4000]);
    assert_eq!(setup.kernel.state().invalidations, 1);
    assert!(setup.kernel.holds(0x4000).is_none());
    assert!(setup.agrees());
}

#[test]
fn every_miss_is_answered_even_for_an_entry_that_was_sent() {
    let setup = Setup::attached(UNMAP, 16);
    setup.pages.map(0x4000, 0x3000, Perm::READ_WRITE);
    for byte in [0x4000, 0x4010, 0x4000] {
        setup.kernel.access(byte, Access::Write);
    }
    setup.iotlb.service();
    assert!(setup.kernel.state().unanswered.is_empty());
    assert_eq!(setup.kernel.state().woken.len(), 3);
    assert!(setup.agrees());
    setup.pages.unmap(&[0x4000]);
    assert!(setup.kernel.state().list.is_empty(), "a copy stayed");
}

/// A driver that unmaps a buffer as soon as an answer lets the device use it.
struct Hasty {
    kernel: Arc<Kernel>,
    pages: Arc<Pages>,
    unmaps: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Channel for Hasty {
    fn send(&self, message: &Message) -> io::Result<()> {
        let sent = self.kernel.send(message);
        let mut unmaps = self.unmaps.lock().unwrap();
        if unmaps.is_none() {
            let pages = Arc::clone(&self.pages);
            *unmaps = Some(std::thread::spawn(move || pages.unmap(&[0x4000])));
            while self.pages.state().pages.contains_key(&0x4000) {
                std::thread::yield_now();
            }
            // Time for the driver's thread to reach the gate, where it waits.
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        sent
    }

    fn receive(&self) -> io::Result<Option<Miss>> {
        self.kernel.receive()
    }

    fn halt(&self) {
        self.kernel.halt();
    }
}

#[test]
fn miss_reported_twice_is_no_fault_after_its_first_answer() {
    let setup = setup(UNMAP, 16);
    let hasty = Arc::new(Hasty {
        kernel: Arc::clone(&setup.kernel),
        pages: Arc::clone(&setup.pages),
        unmaps: Mutex::default(),
    });
    let options = setup.iotlb.sender.options.clone();
    let channel = Arc::clone(&hasty) as Arc<dyn Channel>;
    let iotlb = VhostIotlb::new("test", channel, options, Arc::clone(&setup.failure)).unwrap();
    let region = setup.space.region().unwrap();
    iotlb.attach(&setup.space, region).unwrap();
    setup.pages.map(0x4000, 0x3000, Perm::READ);
    setup.kernel.access(0x4000, Access::Read);
    setup.kernel.access(0x4000, Access::Read);
    iotlb.service();
    let unmaps = hasty.unmaps.lock().unwrap().take();
    unmaps.expect("it was answered").join().unwrap();
    assert_eq!(iotlb.stats().faults, 0);
    assert_eq!(setup.pages.state().faults, []);
    assert!(setup.kernel.state().unanswered.is_empty());
    assert!(setup.kernel.state().list.is_empty(), "it is unmapped");
}

#[test]
fn miss_that_faults_is_answered_when_a_mapping_appears() {
    let setup = Setup::attached(map_unmap(), 16);
    setup.kernel.access(0x4008, Access::Write);
    setup.iotlb.service();
    let stats = setup.iotlb.stats();
    assert_eq!((stats.faults, stats.stalled), (1, 1));
    assert_eq!(setup.pages.state().faults, [(Iova(0x4008), Access::Write)]);
    setup.pages.map(0x4000, 0x3000, Perm::READ);
    assert_eq!(setup.iotlb.stats().stalled, 1, "it may not write there");
    setup.pages.unmap(&[0x4000]);
    setup.pages.map(0x4000, 0x3000, Perm::READ_WRITE);
    assert_eq!(setup.kernel.state().woken, [Iova(0x4008)]);
    assert_eq!(setup.iotlb.stats().stalled, 0);
    assert!(setup.agrees());
}

#[test]
fn miss_that_faults_is_tried_again_after_an_invalidation() {
    let setup = Setup::attached(UNMAP, 16);
    setup.kernel.access(0x4008, Access::Write);
    setup.iotlb.service();
    setup.pages.map(0x4000, 0x3000, Perm::READ_WRITE);
    assert!(setup.kernel.state().woken.is_empty(), "a ring was woken");
    setup.pages.unmap(&[0x9000]);
    assert!(setup.iotlb.wake().read().is_ok(), "the thread is woken");
    setup.iotlb.retry();
    assert_eq!(setup.kernel.state().woken, [Iova(0x4008)]);
    assert_eq!(setup.pages.state().faults.len(), 1, "once is enough");
}

#[test]
fn faulting_kicks_do_not_pile_up_in_the_kernel() {
    let setup = Setup::attached(UNMAP, 16);
    for _ in 0..5000_u64 {
        setup.kernel.access(0x4000, Access::Read);
        setup.iotlb.service();
    }
    for place in 0..500 {
        setup.kernel.access(0x10_0000 + place * PAGE, Access::Read);
        setup.iotlb.service();
    }
    let most = MAX_PENDING + 1 + usize::try_from(MAX_UNANSWERED).unwrap();
    assert!(setup.kernel.state().unanswered.len() <= most);
    assert!(setup.iotlb.stats().stalled <= MAX_PENDING);
    assert!(setup.agrees());
    assert!(setup.kernel.state().list.is_empty());
}

#[test]
fn ring_entries_stay_however_many_others_are_added() {
    let setup = Setup::attached(UNMAP, 16);
    let ring = setup.ring(16, 0x10_0000, 0x1_0000);
    setup.iotlb.start_ring(0, ring).unwrap();
    for n in 0..100 {
        let iova = 0x40_0000 + n * PAGE;
        setup.pages.map(iova, 0x3000, Perm::READ_WRITE);
        setup.kernel.access(iova, Access::Read);
        setup.iotlb.service();
        for part in [0x10_0000, 0x10_1000, 0x10_2000] {
            assert!(setup.kernel.holds(part).is_some(), "after {n}: {part:#x}");
        }
        assert!(setup.agrees());
    }
    setup.iotlb.stop_ring(0);
    for n in 0..20 {
        let iova = 0x80_0000 + n * PAGE;
        setup.pages.map(iova, 0x3000, Perm::READ_WRITE);
        setup.kernel.access(iova, Access::Read);
    }
    setup.iotlb.service();
    assert!(setup.kernel.holds(0x10_0000).is_none(), "it ages again");
}

#[test]
fn prefill_leaves_room_for_misses() {
    let setup = Setup::attached(map_unmap(), 16);
    for n in 0..40 {
        setup.pages.map(n * PAGE, 0x3000, Perm::READ);
    }
    assert_eq!(setup.kernel.state().list.len(), 14);
    assert!(setup.kernel.access(0, Access::Read));
    setup.kernel.access(39 * PAGE, Access::Read);
    setup.iotlb.service();
    assert!(setup.kernel.access(39 * PAGE, Access::Read));
    assert!(setup.agrees());
}

#[test]
fn replay_of_a_new_view_ends_at_the_prefill_limit() {
    let setup = Setup::attached(map_unmap(), 16);
    let last = 39 * PAGE;
    setup.kernel.access(last, Access::Read);
    setup.iotlb.service();
    assert_eq!(setup.iotlb.stats().stalled, 1);
    for n in 0..40 {
        let to = (0x3000, Perm::READ);
        setup.pages.state().pages.insert(n * PAGE, to);
    }
    let _ = setup.iotlb.wake().read();
    setup.pages.region().reload();
    assert_eq!(setup.space.region().unwrap().stats().maps, 14);
    assert_eq!(setup.kernel.state().list.len(), 14);
    assert_eq!(setup.iotlb.wake().read().unwrap(), 1);
    setup.iotlb.retry();
    assert!(
        setup.kernel.access(last, Access::Read),
        "it waited for this"
    );
    assert_eq!(setup.iotlb.stats().stalled, 0);
    assert!(setup.agrees());
}

#[test]
fn one_miss_prefetches_every_available_buffer() {
    let setup = Setup::attached(UNMAP, 256);
    let ring = setup.ring(64, 0x10_0000, 0x1_0000);
    setup.iotlb.start_ring(0, ring).unwrap();
    let buffers: Vec<_> = (0..40)
        .map(|n| (0x40_0000 + n * PAGE + 0xf00, 0x200, 2))
        .collect();
    for n in 0..=40 {
        setup
            .pages
            .map(0x40_0000 + n * PAGE, 0x4_0000 + n * PAGE, Perm::WRITE);
    }
    setup.post(0x1_0000, &buffers);
    setup.kernel.access(buffers[0].0, Access::Write);
    setup.iotlb.service();
    for &(iova, len, _) in &buffers {
        assert!(setup.kernel.access(iova, Access::Write));
        assert!(
            setup
                .kernel
                .access(iova + u64::from(len) - 1, Access::Write)
        );
    }
    let stats = setup.iotlb.stats();
    assert_eq!((stats.misses, stats.prefetched), (1, 40));
    assert!(setup.agrees());
    assert!(setup.pages.state().faults.is_empty());
}

#[test]
fn prefetch_of_unmapped_buffers_records_no_fault() {
    let setup = Setup::attached(UNMAP, 256);
    let ring = setup.ring(64, 0x10_0000, 0x1_0000);
    setup.iotlb.start_ring(0, ring).unwrap();
    setup.pages.map(0x40_0000, 0x4_0000, Perm::READ_WRITE);
    setup.post(0x1_0000, &[(0x40_0000, 64, 0), (0xdead_0000, 64, 0)]);
    setup.kernel.access(0x40_0000, Access::Read);
    setup.iotlb.service();
    assert!(setup.kernel.access(0x40_0000, Access::Read));
    assert!(setup.pages.state().faults.is_empty());
    assert_eq!(setup.iotlb.stats().faults, 0);
}

#[test]
fn ring_entries_are_sent_again_after_a_flush() {
    let setup = Setup::attached(UNMAP, 64);
    let ring = setup.ring(16, 0x10_0000, 0x1_0000);
    setup.iotlb.start_ring(0, ring).unwrap();
    setup.pages.region().invalidate_all();
    assert!(setup.kernel.state().list.is_empty());
    setup.iotlb.retry();
    for part in [0x10_0000, 0x10_1000, 0x10_2000] {
        assert!(setup.kernel.holds(part).is_some());
    }
}

#[test]
fn ring_that_is_not_mapped_does_not_start() {
    let setup = Setup::attached(UNMAP, 64);
    let ring = setup.ring(16, 0x10_0000, 0x1_0000);
    setup.pages.unmap(&[0x10_1000]);
    assert!(matches!(
        setup.iotlb.start_ring(0, ring),
        Err(DeviceError::BadQueue { queue: 0, .. })
    ));
}

#[test]
fn forbidden_access_is_a_fault_and_continues_when_it_is_permitted() {
    let setup = Setup::attached(map_unmap(), 64);
    let ring = setup.ring(16, 0x10_0000, 0x1_0000);
    let kick = Arc::clone(&ring.kick);
    setup.iotlb.start_ring(0, ring).unwrap();
    setup.pages.map(0x40_0000, 0x4_0000, Perm::READ);
    setup.post(0x1_0000, &[(0x40_0010, 64, 2)]);
    assert!(!setup.kernel.access(0x40_0010, Access::Write));
    assert!(
        setup.kernel.state().to_read.is_empty(),
        "no miss tells of it"
    );
    setup.iotlb.ring_failed(0);
    let stats = setup.iotlb.stats();
    assert_eq!((stats.faults, stats.stalled), (1, 1));
    assert_eq!(
        setup.pages.state().faults,
        [(Iova(0x40_0010), Access::Write)]
    );
    assert!(setup.failure.take().is_none(), "the device still works");
    setup.pages.unmap(&[0x40_0000]);
    setup.pages.map(0x40_0000, 0x4_0000, Perm::READ_WRITE);
    assert!(kick.read().is_ok(), "the queue is set going");
    assert!(setup.kernel.access(0x40_0010, Access::Write));
    assert_eq!(setup.iotlb.stats().stalled, 0);
}

#[test]
fn broken_ring_fails_the_device() {
    let setup = Setup::attached(UNMAP, 64);
    let ring = setup.ring(16, 0x10_0000, 0x1_0000);
    setup.iotlb.start_ring(0, ring).unwrap();
    setup
        .ram
        .write_slice(&100_u16.to_le_bytes(), GuestAddress(0x1_1002))
        .unwrap();
    setup.iotlb.ring_failed(0);
    let failure = setup.failure.take();
    assert!(matches!(failure, Some(DeviceError::BadQueue { .. })));
}

#[test]
fn failed_invalidation_halts_the_device() {
    let setup = Setup::attached(UNMAP, 64);
    setup.pages.map(0x4000, 0x3000, Perm::READ);
    setup.kernel.access(0x4000, Access::Read);
    setup.iotlb.service();
    setup.kernel.state().refuses = true;
    setup.pages.unmap(&[0x4000]);
    assert!(setup.kernel.state().halted);
    assert!(setup.failure.take().is_some());
}

#[test]
fn detaching_clears_the_kernel_and_the_shadow() {
    let setup = Setup::attached(map_unmap(), 64);
    let ring = setup.ring(16, 0x10_0000, 0x1_0000);
    setup.iotlb.start_ring(0, ring).unwrap();
    setup.kernel.access(0x70_0000, Access::Read);
    setup.iotlb.service();
    setup.kernel.access(0x71_0000, Access::Read);
    setup.iotlb.stop_ring(0);
    setup.iotlb.detach();
    let stats = setup.iotlb.stats();
    assert_eq!((stats.entries, stats.stalled), (0, 0));
    assert!(setup.kernel.state().list.is_empty());
    assert!(setup.kernel.state().unanswered.is_empty());
    let faults = setup.pages.state().faults.len();
    setup.pages.map(0x4000, 0x3000, Perm::READ);
    setup.kernel.access(0x4000, Access::Read);
    setup.iotlb.service();
    assert!(setup.kernel.state().list.is_empty());
    assert_eq!(setup.pages.state().faults.len(), faults);
    assert_eq!(
        Arc::strong_count(&setup.iotlb),
        1,
        "the region knows it still"
    );
}

#[derive(Clone, Debug)]
enum Step {
    Map(u64, u64, u8),
    Unmap(Vec<u64>),
    Access(u64, bool),
    Flush,
    Service,
    Retry,
}

fn step() -> impl Strategy<Value = Step> {
    let at = || 0_u64..24;
    prop_oneof![
        4 => (at(), 0_u64..64, 0_u8..3).prop_map(|(a, b, c)| Step::Map(a, b, c)),
        2 => prop::collection::vec(at(), 1..4).prop_map(Step::Unmap),
        4 => (at(), any::<bool>()).prop_map(|(a, b)| Step::Access(a, b)),
        1 => Just(Step::Flush),
        3 => Just(Step::Service),
        1 => Just(Step::Retry),
    ]
}

proptest! {
    /// After every step the shadow equals the kernel's list, and the kernel has
    /// no translation that the IOMMU has not.
    #[test]
    fn kernel_holds_only_what_is_mapped_and_the_shadow_agrees(
        prefill in any::<bool>(),
        limit in prop_oneof![Just(0_usize), 4_usize..12],
        steps in prop::collection::vec(step(), 0..80),
    ) {
        let setup = Setup::attached(if prefill { map_unmap() } else { UNMAP }, limit);
        for step in steps {
            match step {
                Step::Map(iova, gpa, perm) => {
                    let iova = iova * PAGE;
                    if !setup.pages.state().pages.contains_key(&iova) {
                        let perms = [Perm::READ, Perm::WRITE, Perm::READ_WRITE];
                        setup.pages.map(iova, gpa * PAGE, perms[usize::from(perm)]);
                    }
                }
                Step::Unmap(pages) => {
                    let pages: Vec<_> = pages.iter().map(|page| page * PAGE).collect();
                    setup.pages.unmap(&pages);
                }
                Step::Access(at, write) => {
                    let access = if write { Access::Write } else { Access::Read };
                    setup.kernel.access(at * PAGE + 5, access);
                }
                Step::Flush => setup.pages.region().invalidate_all(),
                Step::Service => {
                    setup.iotlb.service();
                }
                Step::Retry => setup.iotlb.retry(),
            }
            prop_assert!(setup.agrees());
            let pages = setup.pages.state().pages.clone();
            for entry in &setup.kernel.state().list {
                let mapped = pages.get(&entry.iova.first().0).copied();
                let (gpa, perm) = mapped.expect("it is mapped");
                prop_assert_eq!(entry.hva, setup.host(gpa));
                prop_assert_eq!(entry.perm, perm);
            }
        }
        setup.iotlb.service();
        setup.iotlb.retry();
        let pages = setup.pages.state().pages.clone();
        let stalled: Vec<_> = {
            let table = setup.iotlb.sender.table.lock();
            table.stalled.waits().map(|(iova, _)| iova).collect()
        };
        for iova in &setup.kernel.state().unanswered {
            prop_assert!(stalled.contains(iova), "{iova} is neither answered nor known");
        }
        for (iova, access) in setup.iotlb.sender.table.lock().stalled.waits() {
            let page = pages.get(&(iova.0 & !(PAGE - 1)));
            prop_assert!(!page.is_some_and(|(_, perm)| perm.allows(access)));
        }
    }
}
