//! Measures the cost of requests to a virtio-iommu by the number of mappings
//! in the domain.
//!
//!     cargo run --release -p iommu --example mapping_cost
//!
//! The tables have the bytes of memory per mapping, and the CPU time of requests that
//! concern all mappings of a domain at once, as the kernel accounts them. The
//! instructions of single requests are in `model_cost`.

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use iommu::virtio::spec::{Features, request};
use iommu::virtio::{FaultReport, FaultSink, VirtioIommu, VirtioIommuConfig};
use iommu::{
    GuestRam, Iommu, IommuNotifier, IommuRegion, Iova, IovaRange, Mapping, NotifierEvents,
    NotifierSink, Registration, StreamId,
};
use vm_memory::GuestAddress;

const PAGE: u64 = 4096;
/// Mappings of a large domain.
const ALL: u64 = 1 << 20;
/// Pages over which `ALL` mappings are spread so that chunks are 3/8 full.
const SPREAD: u64 = ALL / 48 * 128;
const FIRST: StreamId = StreamId(0x08);
const SECOND: StreamId = StreamId(0x10);
/// Entries of the kernel's IOTLB.
const ROOM: usize = 2048;

struct NoFaults;

impl FaultSink for NoFaults {
    fn report(&self, _report: &FaultReport) {}
}

/// Counts mappings up to the limit of a kernel IOTLB.
#[derive(Default)]
struct Consumer(AtomicUsize);

impl NotifierSink for Consumer {
    fn map(&self, _mapping: &Mapping) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }

    fn wants_more(&self) -> bool {
        self.0.load(Ordering::Relaxed) < ROOM
    }

    fn unmap(&self, _ranges: &[IovaRange]) {
        self.0.store(0, Ordering::Relaxed);
    }

    fn registered(&self, _outcome: &Registration) {}
}

struct Machine {
    iommu: Arc<VirtioIommu>,
    _regions: [Arc<IommuRegion>; 2],
}

impl Machine {
    fn new() -> Self {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("memory");
        let config = VirtioIommuConfig {
            input_range: IovaRange::block(Iova(0), 48),
            msi_window: None,
            boot_bypass: false,
            max_mappings: 1 << 21,
        };
        let iommu = Arc::new(VirtioIommu::new(config, Arc::new(ram), Arc::new(NoFaults)));
        iommu.negotiated(Features::MAP_UNMAP);
        let regions = [FIRST, SECOND].map(|stream| {
            let region = IommuRegion::new(Arc::clone(&iommu) as Arc<dyn Iommu>, stream);
            region.register(IommuNotifier {
                acceptable: vec![NotifierEvents::MAP | NotifierEvents::UNMAP],
                range: IovaRange::ALL,
                sink: Arc::new(Consumer::default()),
            });
            region
        });
        Self {
            iommu,
            _regions: regions,
        }
    }

    /// Attaches the first endpoint to domain 1 and maps each page of `pages`.
    fn with_mappings(pages: impl Iterator<Item = u64>) -> Self {
        let machine = Self::new();
        machine.attach(1, FIRST);
        pages.for_each(|page| machine.map(page));
        machine
    }

    fn send(&self, kind: u8, words: &[u32]) {
        let mut request = [0; 40];
        request[0] = kind;
        for (bytes, word) in request[4..].chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let mut reply = [0xff; request::TAIL_SIZE];
        let _ = self.iommu.handle(&request, &mut reply);
        self.iommu.flush();
        assert_eq!(reply, [0; request::TAIL_SIZE], "type {kind}");
    }

    fn attach(&self, domain: u32, endpoint: StreamId) {
        self.send(request::ATTACH, &[domain, endpoint.0, 0, 0]);
    }

    fn detach(&self, domain: u32, endpoint: StreamId) {
        self.send(request::DETACH, &[domain, endpoint.0, 0, 0]);
    }

    fn map(&self, page: u64) {
        let [a, b] = halves(page * PAGE);
        let [c, d] = halves(page * PAGE + (PAGE - 1));
        self.send(request::MAP, &[1, a, b, c, d, a, b, 3]);
    }

    fn unmap(&self, first: u64, count: u64) {
        let [a, b] = halves(first * PAGE);
        let [c, d] = halves((first + count) * PAGE - 1);
        self.send(request::UNMAP, &[1, a, b, c, d, 0]);
    }
}

fn halves(value: u64) -> [u32; 2] {
    let mask = u64::from(u32::MAX);
    [value & mask, value >> 32].map(|half| u32::try_from(half).expect("32 bits"))
}

/// Permutes the numbers below 2^20: each step is a bijection.
fn shuffled(at: u64) -> u64 {
    let mixed = at.wrapping_mul(0x9e37_79b1) % ALL;
    (mixed ^ (mixed >> 10)).wrapping_mul(0x85eb_ca6b) % ALL
}

/// CPU time of this thread in nanoseconds.
fn cpu_time() -> u64 {
    // The kernel updates the accounting when it schedules.
    std::thread::yield_now();
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    let first = text.split_whitespace().next().expect("a number");
    first.parse().expect("a number")
}

/// Resident set size of this process in bytes.
fn resident() -> u64 {
    let text = std::fs::read_to_string("/proc/self/statm").expect("statm");
    let pages = text.split_whitespace().nth(1).expect("a number");
    pages.parse::<u64>().expect("a number") * PAGE
}

fn time(what: &str, machine: &Machine, request: impl FnOnce(&Machine)) {
    let before = cpu_time();
    request(machine);
    let taken = cpu_time() - before;
    println!(
        "| {what} | {}.{:03} ms |",
        taken / 1_000_000,
        taken / 1000 % 1000
    );
}

fn main() {
    if let Some(which) = std::env::args().nth(1) {
        return bulk_case(which.parse().expect("a number"));
    }
    // A process per case: memory that an earlier case freed would distort it.
    let program = std::env::current_exe().expect("this program");
    for which in 0..3 {
        let status = Command::new(&program).arg(which.to_string()).status();
        assert!(status.is_ok_and(|status| status.success()));
    }
}

fn bulk_case(which: u64) {
    match which {
        0 => bulk("in order", || Machine::with_mappings(0..ALL)),
        1 => bulk("in no order", || {
            Machine::with_mappings((0..ALL).map(shuffled))
        }),
        _ => bulk("so that chunks are as empty as they get", || {
            let machine = Machine::with_mappings(0..0);
            for first in (0..SPREAD).step_by(128) {
                (first..first + 128).for_each(|page| machine.map(page));
                (first..first + 80).for_each(|page| machine.unmap(page, 1));
            }
            machine
        }),
    }
}

/// Measures requests that concern all mappings of the domain from `build`.
fn bulk(how: &str, build: impl Fn() -> Machine) {
    println!("\n| 2^20 mappings, made {how} | |\n|---|---|");
    let before = resident();
    let machine = build();
    let each = resident().saturating_sub(before) / ALL;
    println!("| memory of a mapping | {each} bytes |");
    time("UNMAP of all", &machine, |m| m.unmap(0, SPREAD));
    time("the next request", &machine, |m| m.map(0));
    time("UNMAP of the lower half", &build(), |m| {
        m.unmap(0, ALL / 2);
    });
    let machine = build();
    time("ATTACH of a second endpoint", &machine, |m| {
        m.attach(1, SECOND);
    });
    time("DETACH of one of two endpoints", &machine, |m| {
        m.detach(1, SECOND);
    });
    time("ATTACH to another domain, the last one", &machine, |m| {
        m.attach(2, FIRST);
    });
    time("DETACH of the last endpoint", &build(), |m| {
        m.detach(1, FIRST);
    });
    time("reset of the device", &build(), |m| m.iommu.reset());
}
