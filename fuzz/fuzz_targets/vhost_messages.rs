//! Messages of a vhost file, between changes of mappings: after any message, the
//! kernel has only translations that are mapped, and the shadow equals its list.
#![no_main]

use std::sync::Arc;

use devices::failure::FailureLatch;
use devices::queue::posted::Layout;
use devices::testing::Kernel;
use devices::vhost::iotlb::{IotlbOptions, Ring, VhostIotlb};
use devices::vhost::message::{Miss, SIZE};
use iommu::testing::{PAGE, Pages, page};
use iommu::{
    AddressSpace, GuestRam, IommuRegion, Iova, IovaRange, NotifierEvents, Perm, StreamId,
    StreamSink,
};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

const LIMIT: usize = 12;

fuzz_target!(|data: &[u8]| {
    let pages = Pages::new(NotifierEvents::MAP | NotifierEvents::UNMAP);
    let region = IommuRegion::new(pages.clone(), StreamId(8));
    let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), 64 << 12)]).unwrap());
    let rings = data.get(..64).unwrap_or(data);
    ram.write_slice(rings, GuestAddress(0)).unwrap();
    let space = AddressSpace::translated(region.clone(), ram);
    let kernel = Arc::new(Kernel::default());
    kernel.state().limit = LIMIT;
    let options = IotlbOptions {
        limit: LIMIT,
        prefill: true,
        prefetch: true,
        pair: None,
    };
    let failure = Arc::new(FailureLatch::default());
    let iotlb = VhostIotlb::new("fuzz", kernel.clone(), options, failure).unwrap();
    iotlb.attach(&space, &region).unwrap();
    let mut rest = data;
    while let Some((&[what, at, more], later)) = rest.split_first_chunk::<3>() {
        rest = later;
        let at = u64::from(at % 32) * PAGE;
        match what % 8 {
            0 | 1 => {
                let perms = [Perm::READ, Perm::WRITE, Perm::READ_WRITE];
                let (gpa, perm) = (
                    u64::from(more % 72) * PAGE,
                    perms[usize::from(what / 8) % 3],
                );
                let old = pages.state().pages.insert(at, (gpa, perm));
                if old.is_none() {
                    pages.map(at, gpa, perm);
                } else {
                    region.invalidate(&[page(at)]);
                }
            }
            2 => {
                let last = at + u64::from(more % 4) * PAGE;
                let kept = |page: u64| page < at || page > last;
                pages.state().pages.retain(|page, _| kept(*page));
                let gone = IovaRange::new(Iova(at), Iova(last + PAGE - 1)).unwrap();
                region.invalidate(&[gone]);
            }
            3 => iotlb.retry(),
            4 => iotlb.ring_failed(0),
            5 => {
                let ring = Ring {
                    number: 0,
                    layout: Layout {
                        size: 1 << (more % 6),
                        desc: Iova(at),
                        avail: Iova(at + 16),
                        used: Iova(at + 32),
                    },
                    kick: Arc::new(EventFd::new(0).unwrap()),
                };
                let _ = iotlb.start_ring(0, ring);
            }
            _ => {
                let mut bytes = vec![0; SIZE];
                bytes[0] = 2;
                bytes[8..16].copy_from_slice(&(at + u64::from(more)).to_ne_bytes());
                bytes[32..34].copy_from_slice(&[1 + more % 2, 1]);
                if what > 200 {
                    let count = rest.len().min(usize::from(more) % (SIZE + 2));
                    bytes.splice(..count.min(SIZE), rest[..count].iter().copied());
                }
                kernel.state().to_read.push_back(Miss::parse(&bytes));
                iotlb.service();
            }
        }
        assert!(!kernel.state().halted, "an invalidation was not taken");
        let held = kernel.state().list.clone();
        assert_eq!(held.len(), iotlb.stats().entries);
        for entry in &held {
            let to = pages.state().pages.get(&entry.iova.first().0).copied();
            assert_eq!(to.map(|(_, perm)| perm), Some(entry.perm));
        }
    }
    iotlb.detach();
    assert!(kernel.state().list.is_empty());
});
