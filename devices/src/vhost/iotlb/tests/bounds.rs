//! Upper bounds on work whose amount the guest chooses.

use std::sync::mpsc::{Sender, channel};
use std::sync::{Mutex, Weak};

use super::*;
use crate::vhost::worker::{EpollClient, VhostWorker};

/// A kernel whose queues miss the same address without end.
struct Endless(Arc<Kernel>);

impl Channel for Endless {
    fn send(&self, message: &Message) -> io::Result<()> {
        self.0.send(message)
    }

    fn receive(&self) -> io::Result<Option<Miss>> {
        let (iova, access) = (Iova(0x4000), Access::Read);
        Ok(Some(Miss { iova, access }))
    }

    fn halt(&self) {
        self.0.halt();
    }
}

/// An IOTLB whose file always has another miss.
fn busy(setup: &Setup) -> Arc<VhostIotlb> {
    let channel = Arc::new(Endless(Arc::clone(&setup.kernel)));
    let failure = Arc::clone(&setup.failure);
    let iotlb =
        VhostIotlb::new("busy", channel, setup.iotlb.sender.options.clone(), failure).unwrap();
    let region = setup.space.region().unwrap();
    iotlb.attach(&setup.space, region).unwrap();
    setup.pages.map(0x4000, 0x3000, Perm::READ);
    iotlb
}

#[test]
fn file_that_always_has_a_miss_yields_after_a_round() {
    let setup = setup(UNMAP, 16);
    let iotlb = busy(&setup);
    assert!(iotlb.service());
    assert_eq!(iotlb.stats().misses, u64::try_from(MAX_BATCH).unwrap());
    iotlb.stop_ring(0);
    let most = u64::try_from(MAX_BATCH * (1 + MAX_ROUNDS)).unwrap();
    assert!(iotlb.stats().misses <= most);
}

/// A client of the thread: readable until it is served, or always.
struct File {
    iotlb: Arc<VhostIotlb>,
    readable: EventFd,
    for_ever: bool,
    served: Mutex<Sender<()>>,
}

impl EpollClient for File {
    fn ready(&self, _source: u32) -> bool {
        if !self.for_ever {
            self.readable.read().unwrap();
        }
        let good = self.iotlb.service();
        // The receiver is dropped when the test ends.
        let _ = self.served.lock().unwrap().send(());
        good
    }
}

#[test]
fn busy_file_does_not_keep_the_thread_from_the_others() {
    let (busy_world, quiet_world) = (setup(UNMAP, 16), Setup::attached(UNMAP, 16));
    quiet_world.pages.map(0x8000, 0x3000, Perm::READ);
    let thread = VhostWorker::start().unwrap();
    let serve = |iotlb: &Arc<VhostIotlb>, for_ever| {
        let (served, serves) = channel();
        let readable = EventFd::new(EFD_NONBLOCK).unwrap();
        let file = Arc::new(File {
            iotlb: Arc::clone(iotlb),
            readable,
            for_ever,
            served: Mutex::new(served),
        });
        let client: Weak<File> = Arc::downgrade(&file);
        thread.serve(client, &[&file.readable]).unwrap();
        (file, serves)
    };
    let (quiet, quiet_serves) = serve(&quiet_world.iotlb, false);
    let (flood, flood_serves) = serve(&busy(&busy_world), true);
    flood.readable.write(1).unwrap();
    flood_serves.recv().unwrap();
    for turn in 0..20 {
        quiet_world.kernel.access(0x8000 + turn, Access::Read);
        quiet.readable.write(1).unwrap();
        quiet_serves.recv().unwrap();
    }
    assert!(quiet_world.kernel.holds(0x8000).is_some());
    drop(thread);
}

/// Number of entries that the shadow has read.
fn looks(iotlb: &VhostIotlb) -> usize {
    iotlb.sender.table.lock().shadow.looks.take()
}

/// A ring of 1024 descriptors of 4 GiB each, over about as many entries as a
/// kernel IOTLB has.
fn hostile(access: Perm) -> (Setup, u64) {
    const ENTRIES: u64 = 2000;
    const TABLE: u64 = 0x10_0000;
    let setup = Setup::attached(UNMAP, 0);
    let ring = Ring {
        layout: Layout {
            size: 1024,
            desc: Iova(TABLE),
            avail: Iova(TABLE + 4 * PAGE),
            used: Iova(TABLE + 5 * PAGE),
        },
        ..setup.ring(1024, TABLE, TABLE)
    };
    for page in 0..8 {
        let at = TABLE + page * PAGE;
        setup.pages.map(at, at, Perm::READ_WRITE);
    }
    let put = |bytes: &[u8], at| setup.ram.write_slice(bytes, GuestAddress(at)).unwrap();
    let start = 1_u64 << 40;
    for n in 0..1024_u16 {
        let mut descriptor = start.to_le_bytes().to_vec();
        descriptor.extend(u32::MAX.to_le_bytes());
        descriptor.extend([0; 4]);
        put(&descriptor, TABLE + 16 * u64::from(n));
        put(&n.to_le_bytes(), TABLE + 4 * PAGE + 4 + 2 * u64::from(n));
    }
    put(&1024_u16.to_le_bytes(), TABLE + 4 * PAGE + 2);
    setup.iotlb.start_ring(0, ring).unwrap();
    for page in 0..ENTRIES {
        let iova = start + page * PAGE;
        setup.pages.map(iova, page % 256 * PAGE, access);
        setup.kernel.access(iova, Access::Read);
    }
    while !setup.kernel.state().to_read.is_empty() {
        setup.iotlb.service();
    }
    (setup, start + ENTRIES * PAGE)
}

/// Upper bound on reads of entries: one per step, and those of the messages.
const MOST_LOOKS: usize = MAX_STEPS + 16 * MAX_PREFETCH;

#[test]
fn ring_of_huge_descriptors_costs_bounded_looks_a_round() {
    let (setup, next) = hostile(Perm::READ);
    looks(&setup.iotlb);
    setup.pages.map(next, 0x3000, Perm::READ);
    setup.kernel.access(next, Access::Read);
    assert!(setup.iotlb.service());
    assert!(setup.kernel.holds(next).is_some(), "it is answered");
    let one = looks(&setup.iotlb);
    assert!(one <= MOST_LOOKS, "{one} looks for one miss");
    for page in 1..=100 {
        let iova = next + page * PAGE;
        setup.pages.map(iova, 0x3000, Perm::READ);
        setup.kernel.access(iova, Access::Read);
    }
    assert!(setup.iotlb.service());
    let hundred = looks(&setup.iotlb);
    assert!(hundred <= MOST_LOOKS, "{hundred} looks for a round");
}

#[test]
fn error_on_a_ring_of_huge_descriptors_costs_bounded_looks() {
    let (setup, _) = hostile(Perm::READ);
    looks(&setup.iotlb);
    setup.iotlb.ring_failed(0);
    let looks = looks(&setup.iotlb);
    assert!(looks <= MOST_LOOKS, "{looks} looks for an error");
}
