//! Executes one operation of a model `REPEATS` times, each inside `measured`, so that
//! callgrind counts its instructions and no others.
//!
//!     cargo xtask bench models
//!
//! builds this program with symbols, runs every operation in callgrind and prints
//! the tables. The arguments are an operation, the mappings of a domain and the
//! streams; each stream has a domain of its own.

use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use iommu::smmuv3::{Smmu, SmmuConfig, SmmuLine, SmmuWires};
use iommu::virtio::spec::{Features, request};
use iommu::virtio::{FaultReport, FaultSink, VirtioIommu, VirtioIommuConfig};
use iommu::{
    Access, AddressSpace, Gpa, GuestRam, Iommu, IommuNotifier, IommuRegion, Iova, IovaRange,
    Mapping, NotifierEvents, NotifierSink, Registration, StreamId,
};
use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, Permissions};

/// Executions per run; `xtask/src/bench/models.rs` divides by it.
const REPEATS: u64 = 200;
const PAGE: u64 = 4096;
/// Mappings of each domain but the first.
const OTHERS: u64 = 64;
/// Entries of the kernel's IOTLB.
const ROOM: usize = 2048;

/// The operation. Its name is a pattern of callgrind's `--toggle-collect`.
#[inline(never)]
fn measured(operation: &mut dyn FnMut()) {
    operation();
}

/// Runs `operation` with the number of each repeat. It returns the part to be measured.
fn repeat<O: FnMut()>(mut operation: impl FnMut(u64) -> O) {
    for at in 0..REPEATS {
        measured(&mut operation(at));
    }
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

fn stream(number: u64) -> StreamId {
    StreamId::from_bdf(0, u8::try_from(number + 1).expect("at most 31 streams"), 0)
}

fn regions(model: &Arc<dyn Iommu>, events: NotifierEvents, streams: u64) -> Vec<Arc<IommuRegion>> {
    let region = |number| {
        let region = IommuRegion::new(Arc::clone(model), stream(number));
        region.register(IommuNotifier {
            acceptable: vec![events],
            range: IovaRange::ALL,
            sink: Arc::new(Consumer::default()),
        });
        region
    };
    (0..streams).map(region).collect()
}

/// A page of a domain of `count` mappings; consecutive numbers are not adjacent.
fn scattered(at: u64, count: u64) -> u64 {
    at.wrapping_mul(7919) % count
}

fn halves(value: u64) -> [u32; 2] {
    let mask = u64::from(u32::MAX);
    [value & mask, value >> 32].map(|half| u32::try_from(half).expect("32 bits"))
}

struct NoFaults;

impl FaultSink for NoFaults {
    fn report(&self, _report: &FaultReport) {}
}

/// A virtio-iommu; stream N is attached to domain N + 1.
struct Virtio {
    model: Arc<VirtioIommu>,
    regions: Vec<Arc<IommuRegion>>,
    ram: Arc<GuestRam>,
}

impl Virtio {
    /// Pages of RAM, which all mappings share.
    const PAGES: u64 = 16;

    fn new(mappings: u64, streams: u64) -> Self {
        let bytes = usize::try_from(Self::PAGES * PAGE).expect("64 KiB");
        let ram = Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), bytes)]).expect("memory"));
        let config = VirtioIommuConfig {
            input_range: IovaRange::block(Iova(0), 48),
            msi_window: None,
            boot_bypass: false,
            max_mappings: 1 << 21,
        };
        let model = VirtioIommu::new(config, Arc::clone(&ram), Arc::new(NoFaults));
        let model = Arc::new(model);
        model.negotiated(Features::MAP_UNMAP);
        let connected = Arc::clone(&model) as Arc<dyn Iommu>;
        let events = NotifierEvents::MAP | NotifierEvents::UNMAP;
        // One more, which is not attached.
        let virtio = Self {
            regions: regions(&connected, events, streams + 1),
            model,
            ram,
        };
        for number in 0..streams {
            virtio.attach(number, number + 1);
            let count = if number == 0 { mappings } else { OTHERS };
            (0..count).for_each(|page| virtio.map(number + 1, page));
        }
        virtio
    }

    fn send(&self, kind: u8, words: &[u32]) {
        let mut request = [0; 40];
        request[0] = kind;
        for (bytes, word) in request[4..].chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let mut reply = [0xff; request::TAIL_SIZE];
        let _ = self.model.handle(&request, &mut reply);
        self.model.flush();
        assert_eq!(reply, [0; request::TAIL_SIZE], "type {kind}");
    }

    fn attach(&self, number: u64, domain: u64) {
        let domain = halves(domain)[0];
        self.send(request::ATTACH, &[domain, stream(number).0, 0, 0]);
    }

    fn map(&self, domain: u64, page: u64) {
        let [a, b] = halves(page * PAGE);
        let [c, d] = halves(page * PAGE + (PAGE - 1));
        let [e, f] = halves(page % Self::PAGES * PAGE);
        self.send(request::MAP, &[halves(domain)[0], a, b, c, d, e, f, 3]);
    }

    fn unmap(&self, domain: u64, page: u64) {
        let [a, b] = halves(page * PAGE);
        let [c, d] = halves(page * PAGE + (PAGE - 1));
        self.send(request::UNMAP, &[halves(domain)[0], a, b, c, d, 0]);
    }

    fn run(&self, operation: &str, mappings: u64, streams: u64) {
        let page = |at| scattered(at, mappings);
        match operation {
            "nothing" => repeat(|at| move || _ = black_box(at)),
            "translate" => translate(&self.regions[0], |at| page(at) * PAGE),
            "fault" => translate(&self.regions[0], |at| (mappings + page(at)) * PAGE),
            "map" => repeat(|at| {
                self.unmap(1, page(at));
                move || self.map(1, page(at))
            }),
            "unmap" => repeat(|at| {
                let last = at.checked_sub(1).map(page);
                last.into_iter().for_each(|page| self.map(1, page));
                move || self.unmap(1, page(at))
            }),
            "attach" => repeat(|_| {
                self.attach(streams, streams + 1);
                || self.attach(streams, 1)
            }),
            "dma-open" | "dma-hit" | "dma-read" | "ram-read" => self.dma(operation, mappings),
            _ => panic!("no such operation: {operation}"),
        }
    }

    /// Accesses by an emulated device, whose cache has the page.
    fn dma(&self, operation: &str, mappings: u64) {
        let space = AddressSpace::translated(Arc::clone(&self.regions[0]), Arc::clone(&self.ram));
        let dma = space.dma();
        if operation == "dma-open" {
            return repeat(|_| || drop(black_box(dma.view())));
        }
        let (view, ram) = (&dma.view(), &self.ram);
        let address = |at| {
            let page = scattered(at, mappings);
            let address = GuestAddress(page * PAGE + at % 512 * 8);
            let _: u64 = view.read_obj(address).expect("mapped");
            (address, GuestAddress(page % Self::PAGES * PAGE))
        };
        match operation {
            "dma-hit" => repeat(|at| {
                let (address, _) = address(at);
                move || {
                    let slices = view.get_slices(address, 8, Permissions::Read);
                    let slice = slices.expect("a range").next();
                    black_box(slice.expect("a slice").expect("mapped"));
                }
            }),
            "dma-read" => repeat(|at| {
                let (address, _) = address(at);
                move || {
                    black_box(view.read_obj::<u64>(address).expect("mapped"));
                }
            }),
            _ => repeat(|at| {
                let (_, target) = address(at);
                let slice = ram.get_slices(target, 8, Permissions::Read);
                let slice = slice.expect("RAM").next().expect("a slice").expect("RAM");
                move || {
                    black_box(slice.read_obj::<u64>(0).expect("RAM"));
                }
            }),
        }
    }
}

fn translate(region: &IommuRegion, address: impl Fn(u64) -> u64) {
    let inside = region.enter();
    repeat(|at| {
        let (inside, iova) = (&inside, Iova(address(at)));
        move || {
            let _ = black_box(inside.translate(black_box(iova), Access::Read));
        }
    });
}

struct NoWires;

impl SmmuWires for NoWires {
    fn pulse(&self, _line: SmmuLine) {}

    fn message(&self, _address: Gpa, _data: u32) -> bool {
        false
    }
}

/// An SMMUv3 with stage 1; stream N has ASID N + 1 and a table of its own.
struct Smmuv3 {
    smmu: Arc<Smmu>,
    regions: Vec<Arc<IommuRegion>>,
    ram: Arc<GuestRam>,
}

impl Smmuv3 {
    const RAM: usize = 64 << 20;
    const CMDQ: u64 = 0x1_0000;
    const CMDQ_LOG2: u32 = 8;
    const CMDQ_PROD: u64 = 0x98;
    const STRTAB: u64 = 0x4_0000;
    const CDS: u64 = 0x5_0000;
    const TABLES: u64 = 0x10_0000;
    /// CMD_TLBI_NH_VA, CMD_TLBI_NSNH_ALL and CMD_SYNC.
    const TLBI_NH_VA: u64 = 0x12;
    const TLBI_NSNH_ALL: u64 = 0x30;
    const SYNC: [u64; 2] = [0x46, 0];

    fn new(mappings: u64, streams: u64) -> Self {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), Self::RAM)]).expect("memory");
        let ram = Arc::new(ram);
        let smmu = Smmu::new(SmmuConfig::default(), Arc::clone(&ram), Arc::new(NoWires));
        let smmu = Arc::new(smmu);
        let connected = Arc::clone(&smmu) as Arc<dyn Iommu>;
        let machine = Self {
            regions: regions(&connected, NotifierEvents::UNMAP, streams),
            smmu,
            ram,
        };
        let mut free = Self::TABLES;
        for number in 0..streams {
            let count = if number == 0 { mappings } else { OTHERS };
            machine.configure(number, count, &mut free);
        }
        machine.smmu.write64(0x80, Self::STRTAB); // STRTAB_BASE
        machine.smmu.write(0x88, 8); // STRTAB_BASE_CFG.LOG2SIZE
        let base = Self::CMDQ | u64::from(Self::CMDQ_LOG2);
        machine.smmu.write64(0x90, base); // CMDQ_BASE
        machine.smmu.write(0x20, 1 << 3 | 1); // CR0.CMDQEN, SMMUEN
        machine
    }

    fn put(&self, address: u64, words: &[u64]) {
        for (word, address) in words.iter().zip((address..).step_by(8)) {
            let stored = self.ram.write_obj(word.to_le(), GuestAddress(address));
            stored.expect("RAM");
        }
    }

    /// Writes the STE, the CD and the table of a stream with `count` pages of 4 KiB, no
    /// two of them contiguous in RAM. `free` is the lowest unused page.
    fn configure(&self, number: u64, count: u64, free: &mut u64) {
        let mut pages = |count: u64| {
            *free += count * PAGE;
            *free - count * PAGE
        };
        let (level_1, level_2, level_3) = (
            pages(1),
            pages(count.div_ceil(1 << 18)),
            pages(count.div_ceil(512)),
        );
        for index in 0..count.div_ceil(1 << 18) {
            self.put(level_1 + 8 * index, &[(level_2 + index * PAGE) | 3]);
        }
        for index in 0..count.div_ceil(512) {
            self.put(level_2 + 8 * index, &[(level_3 + index * PAGE) | 3]);
        }
        // Valid page, AF, nG, unprivileged.
        let attributes = 1 << 11 | 1 << 10 | 1 << 6 | 3;
        for index in 0..count {
            let page = index * 5 % 1024;
            self.put(level_3 + 8 * index, &[(page * PAGE) | attributes]);
        }
        let context = Self::CDS + 64 * number;
        // T0SZ 25, EPD1, V, IPS 48 bits, AA64, R, A; ASID.
        let cd = 25 | 1 << 30 | 1 << 31 | 5 << 32 | 1 << 41 | 1 << 45 | 1 << 46;
        self.put(context, &[cd | (number + 1) << 48, level_1]);
        let ste = Self::STRTAB + 64 * u64::from(stream(number).0);
        self.put(ste, &[0b101 << 1 | 1 | context]);
    }

    /// Writes commands to the queue; returns the index after them.
    fn queue(&self, commands: &[[u64; 2]]) -> u32 {
        let mut prod = self.smmu.read(Self::CMDQ_PROD);
        for command in commands {
            let index = u64::from(prod & ((1 << Self::CMDQ_LOG2) - 1));
            self.put(Self::CMDQ + 16 * index, command);
            prod = (prod + 1) & ((2 << Self::CMDQ_LOG2) - 1);
        }
        prod
    }

    fn touch(&self, number: u64, page: u64) {
        let region = &self.regions[usize::try_from(number).expect("a stream")];
        let touched = region.enter().translate(Iova(page * PAGE), Access::Read);
        touched.expect("mapped");
    }

    fn run(&self, operation: &str, mappings: u64, streams: u64) {
        let page = |at| scattered(at, mappings);
        match operation {
            "hit" => {
                // At most as many pages as the caches have entries.
                let few = |at| page(at % 50) * PAGE;
                (0..100).for_each(|at| self.touch(0, page(at % 50)));
                translate(&self.regions[0], few);
            }
            "second" | "miss" => repeat(|at| {
                let all = self.queue(&[[Self::TLBI_NSNH_ALL, 0], Self::SYNC]);
                self.smmu.write(Self::CMDQ_PROD, all);
                if operation == "second" {
                    self.touch(0, page(at));
                }
                let region = &self.regions[0];
                let inside = region.enter();
                move || {
                    let _ = black_box(inside.translate(Iova(page(at) * PAGE), Access::Read));
                }
            }),
            "tlbi" => self.invalidate(1, mappings, streams),
            "tlbi-16" => self.invalidate(16, mappings, streams),
            _ => panic!("no such operation: {operation}"),
        }
    }

    /// CMD_TLBI_NH_VA of `count` pages that one stream holds, and CMD_SYNC. The other
    /// streams hold translations too.
    fn invalidate(&self, count: u64, mappings: u64, streams: u64) {
        repeat(|at| {
            (0..streams).for_each(|number| {
                // Twice, because the second use of a translation adds it to a cache.
                (0..2 * OTHERS).for_each(|page| self.touch(number, page % OTHERS % mappings));
            });
            let asid = at % streams + 1;
            let mut commands: Vec<_> = (0..count)
                .map(|index| 2 * index % mappings * PAGE)
                .map(|address| [Self::TLBI_NH_VA | asid << 48, address])
                .collect();
            commands.push(Self::SYNC);
            let prod = self.queue(&commands);
            move || self.smmu.write(Self::CMDQ_PROD, prod)
        });
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [operation, mappings, streams] = &arguments[..] else {
        panic!("usage: model_cost OPERATION MAPPINGS STREAMS");
    };
    let number = |text: &String| text.parse().expect("a number");
    let (mappings, streams) = (number(mappings), number(streams));
    match operation.strip_prefix("smmuv3-") {
        Some(operation) => Smmuv3::new(mappings, streams).run(operation, mappings, streams),
        None => Virtio::new(mappings, streams).run(operation, mappings, streams),
    }
}
