//! IOTLBs of the queue pairs of one device.

use super::*;
use crate::thread;
use crate::vhost::pairs::{QueuePair, QueuePairs};

/// The IOTLBs of a device with two pairs, in a machine of two vCPUs.
struct Pairs {
    setup: Setup,
    all: Vec<(Arc<Kernel>, Arc<VhostIotlb>)>,
}

impl Pairs {
    fn new() -> Self {
        let setup = setup(map_unmap(), 16);
        let pairs = QueuePairs::new(2);
        pairs.set_active(2);
        let open = |index| {
            let kernel = Arc::new(Kernel::default());
            kernel.state().limit = 16;
            let options = IotlbOptions {
                pair: Some(QueuePair {
                    pairs: Arc::clone(&pairs),
                    index,
                }),
                ..setup.iotlb.sender.options.clone()
            };
            let channel = Arc::clone(&kernel) as Arc<dyn Channel>;
            let failure = Arc::clone(&setup.failure);
            let iotlb = VhostIotlb::new("pair", channel, options, failure).unwrap();
            let region = setup.space.region().unwrap();
            iotlb.attach(&setup.space, region).unwrap();
            (kernel, iotlb)
        };
        let all = [0, 1].map(open).into();
        Self { setup, all }
    }

    /// Maps a page on the thread of a vCPU.
    fn map_on(&self, vcpu: u32, iova: u64) {
        let pages = Arc::clone(&self.setup.pages);
        let work = move || {
            thread::set_vcpu(vcpu);
            pages.map(iova, 0x3000, Perm::READ);
        };
        std::thread::spawn(work).join().unwrap();
    }

    /// The pairs whose kernel has an entry for a byte.
    fn holders(&self, iova: u64) -> Vec<bool> {
        let kernels = self.all.iter();
        kernels
            .map(|(kernel, _)| kernel.holds(iova).is_some())
            .collect()
    }
}

#[test]
fn mapping_is_sent_to_the_pair_of_its_vcpu_and_the_other_misses_once() {
    let pairs = Pairs::new();
    pairs.map_on(1, 0x4000);
    assert_eq!(pairs.holders(0x4000), [false, true]);
    let (kernel, iotlb) = &pairs.all[0];
    assert!(!kernel.access(0x4000, Access::Read), "a miss");
    assert!(iotlb.service());
    assert!(kernel.access(0x4000, Access::Read));
    assert_eq!(iotlb.stats().misses, 1);
}

#[test]
fn invalidation_reaches_every_pair_that_has_the_entry() {
    let pairs = Pairs::new();
    pairs.map_on(0, 0x4000);
    pairs.all[1].0.access(0x4000, Access::Read);
    pairs.all[1].1.service();
    assert_eq!(pairs.holders(0x4000), [true, true]);
    pairs.setup.pages.unmap(&[0x4000]);
    assert_eq!(pairs.holders(0x4000), [false, false]);
}

#[test]
fn queue_that_waits_for_a_mapping_is_woken_whichever_vcpu_makes_it() {
    let pairs = Pairs::new();
    let (kernel, iotlb) = &pairs.all[0];
    kernel.access(0x4000, Access::Read);
    iotlb.service();
    assert_eq!(iotlb.stats().stalled, 1);
    pairs.map_on(1, 0x4000);
    assert_eq!(kernel.state().woken, [Iova(0x4000)]);
    assert_eq!(iotlb.stats().stalled, 0);
}

#[test]
fn replay_is_for_every_pair() {
    let pairs = Pairs::new();
    pairs.map_on(1, 0x4000);
    let space = &pairs.setup.space;
    for (_, iotlb) in &pairs.all {
        iotlb.detach();
        iotlb.attach(space, space.region().unwrap()).unwrap();
    }
    assert_eq!(pairs.holders(0x4000), [true, true]);
}
