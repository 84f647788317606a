//! Available buffers on the rings of a vhost file, read through the IOMMU while
//! another processor writes them: a miss is answered or counted, its work is
//! bounded, and the kernel has only translations that are mapped.
#![no_main]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Entries of the kernel's IOTLB.
const LIMIT: usize = 64;
/// Pages of RAM, and of I/O virtual addresses that may be mapped.
const RAM_PAGES: u64 = 64;
const IOVA_PAGES: u8 = 96;
/// Upper bounds on operations of an input, and on those that the other processor
/// repeats.
const MAX_OPS: usize = 100;
const MAX_RACING: usize = 50;
/// Upper bound on translations per operation: one per step, and those for misses,
/// rings and stalled queues.
const MAX_QUESTIONS: usize = (16 << 10) + 4096;
/// Offsets of the available and the used ring from the table, in bytes.
const AVAIL: u64 = 8 * PAGE;
const USED: u64 = 10 * PAGE;

#[derive(Arbitrary, Debug, Clone, Copy)]
enum Op {
    Desc {
        ring: bool,
        index: u16,
        at: u16,
        len: u32,
        flags: u8,
        next: u16,
    },
    Fill {
        ring: bool,
        from: u16,
        count: u16,
        stride: u16,
        indirect: bool,
    },
    Avail {
        ring: bool,
        index: u16,
        used: u16,
    },
    Head {
        ring: bool,
        at: u16,
        head: u16,
    },
    Map {
        page: u8,
        to: u8,
        perm: u8,
    },
    Unmap {
        page: u8,
    },
    Flush,
    Miss {
        at: u16,
        write: bool,
    },
    Start {
        ring: bool,
        size: u8,
        skew: u8,
    },
    Stop {
        ring: bool,
    },
    Retry,
    Failed {
        ring: bool,
    },
}

/// Address of a ring's table: 8 pages, followed by 2 pages of available and 4 of
/// used entries.
fn base(ring: bool) -> u64 {
    if ring { 0x10 * PAGE } else { 0 }
}

fn put(ram: &GuestRam, at: u64, bytes: &[u8]) {
    // Bytes beyond the end of RAM are not written.
    let _ = ram.write(bytes, GuestAddress(at % (RAM_PAGES * PAGE)));
}

fn descriptor(ram: &GuestRam, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
    let mut bytes = address.to_le_bytes().to_vec();
    bytes.extend(len.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    put(ram, at, &bytes);
}

/// Performs the driver's writes of an operation.
fn write(ram: &GuestRam, op: Op) {
    match op {
        Op::Desc {
            ring,
            index,
            at,
            len,
            flags,
            next,
        } => {
            let entry = base(ring) + u64::from(index % 512) * 16;
            let fields = (u64::from(at) << 4, len, u16::from(flags % 8), next % 520);
            descriptor(ram, entry, fields);
        }
        Op::Fill {
            ring,
            from,
            count,
            stride,
            indirect,
        } => {
            for i in 0..count % 300 {
                let index = from.wrapping_add(i) % 512;
                let address = u64::from(i) * u64::from(stride);
                let flags = if indirect { 4 } else { 1 };
                let entry = base(ring) + u64::from(index) * 16;
                descriptor(ram, entry, (address, 4096, flags, (index + 1) % 512));
            }
        }
        Op::Avail { ring, index, used } => {
            put(ram, base(ring) + AVAIL + 2, &index.to_le_bytes());
            put(ram, base(ring) + USED + 2, &used.to_le_bytes());
        }
        Op::Head { ring, at, head } => {
            let entry = base(ring) + AVAIL + 4 + 2 * u64::from(at % 512);
            put(ram, entry, &(head % 520).to_le_bytes());
        }
        _ => {}
    }
}

struct Setup {
    pages: Arc<Pages>,
    region: Arc<IommuRegion>,
    ram: Arc<GuestRam>,
    kernel: Arc<Kernel>,
    iotlb: Arc<VhostIotlb>,
}

impl Setup {
    fn new() -> Self {
        let pages = Pages::new(NotifierEvents::MAP | NotifierEvents::UNMAP);
        let region = IommuRegion::new(pages.clone(), StreamId(8));
        let size = (RAM_PAGES * PAGE) as usize;
        let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), size)]).unwrap());
        let kernel = Arc::new(Kernel::default());
        kernel.state().limit = LIMIT;
        let options = IotlbOptions {
            limit: LIMIT,
            prefill: false,
            prefetch: true,
            pair: None,
        };
        let failure = Arc::new(FailureLatch::default());
        let iotlb = VhostIotlb::new("fuzz", kernel.clone(), options, failure).unwrap();
        for number in 0..RAM_PAGES {
            pages.map(number * PAGE, number * PAGE, Perm::READ_WRITE);
        }
        let space = AddressSpace::translated(region.clone(), ram.clone());
        iotlb.attach(&space, &region).unwrap();
        Self {
            pages,
            region,
            ram,
            kernel,
            iotlb,
        }
    }

    fn perform(&self, op: Op) {
        match op {
            Op::Map { page: at, to, perm } => {
                let at = u64::from(at % IOVA_PAGES) * PAGE;
                let perm = [Perm::READ, Perm::WRITE, Perm::READ_WRITE][usize::from(perm % 3)];
                let gpa = u64::from(to % 72) * PAGE;
                let old = self.pages.state().pages.insert(at, (gpa, perm));
                if old.is_none() {
                    self.pages.map(at, gpa, perm);
                } else {
                    self.region.invalidate(&[page(at)]);
                }
            }
            Op::Unmap { page } => self.pages.unmap(&[u64::from(page % IOVA_PAGES) * PAGE]),
            Op::Flush => self.region.invalidate(&[IovaRange::ALL]),
            Op::Miss { at, write } => {
                let mut bytes = vec![0; SIZE];
                bytes[0] = 2;
                bytes[8..16].copy_from_slice(&(u64::from(at) << 4).to_ne_bytes());
                bytes[32..34].copy_from_slice(&[1 + u8::from(write), 1]);
                self.kernel.state().to_read.push_back(Miss::parse(&bytes));
                assert!(self.iotlb.service());
                let left = self.kernel.state().to_read.len();
                assert_eq!(left, 0, "a round answers more than one miss");
            }
            Op::Start { ring, size, skew } => {
                let at = base(ring) + u64::from(skew & 0xf0);
                let ring = u16::from(ring);
                let layout = Layout {
                    size: 1 << (size % 10),
                    desc: Iova(at),
                    avail: Iova(at + AVAIL),
                    used: Iova(at + USED),
                };
                let kick = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
                let started = Ring {
                    number: ring,
                    layout,
                    kick,
                };
                // A ring that is not mapped is refused.
                let _ = self.iotlb.start_ring(ring, started);
            }
            Op::Stop { ring } => self.iotlb.stop_ring(u16::from(ring)),
            Op::Retry => self.iotlb.retry(),
            Op::Failed { ring } => self.iotlb.ring_failed(u16::from(ring)),
            other => write(&self.ram, other),
        }
    }

    /// Checks that the kernel's entries match the mappings, and the shadow the
    /// kernel's entries.
    fn check(&self) {
        assert!(!self.kernel.state().halted, "an invalidation was not taken");
        let held = self.kernel.state().list.clone();
        assert_eq!(held.len(), self.iotlb.stats().entries);
        for entry in &held {
            let to = self.pages.state().pages.get(&entry.iova.first().0).copied();
            assert_eq!(to.map(|(_, perm)| perm), Some(entry.perm));
        }
    }
}

fuzz_target!(|input: (Vec<Op>, Vec<Op>)| {
    let (ops, racing) = input;
    let setup = Setup::new();
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        if !racing.is_empty() {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    for op in racing.iter().take(MAX_RACING) {
                        write(&setup.ram, *op);
                    }
                }
            });
        }
        for op in ops.iter().take(MAX_OPS) {
            setup.pages.state().requests = (0, 0);
            setup.perform(*op);
            let (translations, lookups) = setup.pages.state().requests;
            let questions = translations + lookups;
            assert!(questions <= MAX_QUESTIONS, "{op:?} cost {questions}");
            setup.check();
        }
        stop.store(true, Ordering::Relaxed);
    });
    setup.iotlb.detach();
    assert!(setup.kernel.state().list.is_empty());
});
