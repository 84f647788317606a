//! Bytes in a virtio-iommu's request queue, in any number of buffers of any
//! length: every request has a status that the specification permits, endpoints
//! access only mapped memory, and the shadow of a notifier is exact.
#![no_main]

mod driver;
#[path = "../../iommu/src/virtio/tests/naive.rs"]
mod naive;

use std::sync::{Arc, Mutex};

use devices::interrupt::{MsiAllocator as _, MsiVector};
use devices::queue::{Interrupt, RunningQueue};
use devices::testing::{Board, eventfd};
use devices::virtio::VirtioDevice as _;
use devices::virtio::iommu::{EventQueue, VirtioIommuDevice};
use driver::{AVAIL, SIZE, TABLE, USED};
use iommu::virtio::spec::request::{ATTACH, DETACH, MAP, PROBE, UNMAP};
use iommu::virtio::spec::{CONFIG_BYPASS, Features};
use iommu::virtio::{FaultSink, VirtioIommu, VirtioIommuConfig};
use iommu::{
    Access, FaultReason, GuestRam, Iommu, IommuNotifier, IommuRegion, Iova, IovaRange, Mapping,
    NotifierEvents, NotifierSink, Registration, StreamId,
};
use libfuzzer_sys::fuzz_target;
use naive::{Mapped, Naive, PROBE_REPLY, Seen, ShadowMappings};
use vm_memory::{Bytes as _, GuestAddress};

/// Features of a driver that accepts all of them.
const ALL: Features =
    Features::all().difference(Features::INPUT_RANGE.union(Features::DOMAIN_RANGE));
const STREAMS: [u32; 2] = [0x08, 0x10];
const INPUT: (u64, u64) = (0x1000, (1 << 48) - 1);
const MSI: (u64, u64) = (0xfee0_0000, 0xfeef_ffff);
/// Address of the first request and reply, and bytes for each request of a batch.
const REQUESTS: u64 = 0x8000;
const SLOT: u64 = 0x1000;
/// Upper bounds on requests of a batch, and on descriptors of each.
const BATCH: usize = 4;
const PARTS: usize = 4;
/// Upper bound on bytes of a request that the device reads.
const READ_AT_MOST: usize = 128;

/// Kinds of errors in a request: a byte, its length, the room for its reply, or
/// the address of the request or the reply.
const BYTE: u8 = 251;
const LENGTH: u8 = 252;
const ROOM: u8 = 253;
const OUTSIDE: u8 = 254;
const REPLY_OUTSIDE: u8 = 255;

/// A request decoded from eleven bytes, or from more when it is random bytes.
struct Request<'a> {
    kind: u8,
    raw: &'a [u8],
    domain: u8,
    endpoint: u8,
    page: u8,
    pages: u8,
    flags: u8,
    gpa: u8,
    /// Split of the request into buffers, and the room for the reply.
    cut: u8,
    /// Kind of error: mostly none, otherwise no state would build up.
    wrong: u8,
    how: [u8; 2],
    /// The driver waits for the reply: the request ends its batch.
    last: bool,
}

enum Step<'a> {
    Post(Request<'a>),
    Bypass(u8),
    Reset { features: Features },
    Look { who: usize, iova: u64, write: bool },
}

/// Decodes and removes a step from the front of the input.
fn step<'a>(data: &mut &'a [u8]) -> Option<Step<'a>> {
    let (&[what, a, b, page, pages, flags, gpa, cut, wrong, c, d], rest) =
        data.split_first_chunk()?;
    *data = rest;
    let kind = match what % 32 {
        0..=4 => ATTACH,
        5 => DETACH,
        6..=18 => MAP,
        19..=26 => UNMAP,
        27 => PROBE,
        28 => 0,
        29 => return Some(Step::Bypass(flags % 4)),
        30 if wrong > 0xc0 => {
            // Most of the time every feature is accepted.
            let all = [
                Features::BYPASS_CONFIG,
                Features::MMIO,
                Features::MAP_UNMAP,
                Features::PROBE,
            ];
            let features = (0..)
                .zip(all)
                .filter(|(bit, _)| flags & (0x11 << bit) != 0x11 << bit);
            let features = features.map(|(_, feature)| feature).collect();
            return Some(Step::Reset { features });
        }
        _ => {
            let iova = u64::from_le_bytes([a, b, page, pages, flags, gpa, cut, wrong]);
            let (who, write) = (usize::from(c % 2), d & 1 == 1);
            return Some(Step::Look { who, iova, write });
        }
    };
    let raw = rest.split_at(rest.len().min(usize::from(d)));
    if kind == 0 {
        *data = raw.1;
    }
    Some(Step::Post(Request {
        kind,
        raw: raw.0,
        domain: a,
        endpoint: b,
        page,
        pages,
        flags,
        gpa,
        cut,
        wrong,
        how: [c, d],
        last: what & 0x60 == 0,
    }))
}

/// A notifier that keeps an exact shadow of the mappings.
#[derive(Default)]
struct Shadow(Mutex<ShadowMappings>);

fn mapped(mapping: &Mapping) -> Mapped {
    let may = |access, bit| if mapping.perm.allows(access) { bit } else { 0 };
    Mapped {
        first: mapping.iova.first().0,
        last: mapping.iova.last().0,
        to: mapping.gpa.0,
        perm: may(Access::Read, naive::READ) | may(Access::Write, naive::WRITE),
    }
}

impl NotifierSink for Shadow {
    fn map(&self, mapping: &Mapping) {
        self.0.lock().unwrap().map(mapped(mapping));
    }

    fn unmap(&self, ranges: &[IovaRange]) {
        for range in ranges {
            let (first, last) = (range.first().0, range.last().0);
            self.0.lock().unwrap().unmap(first, last);
        }
    }

    fn registered(&self, _: &Registration) {}
}

fn listen(region: &IommuRegion) -> Arc<Shadow> {
    let shadow = Arc::new(Shadow::default());
    region.register(IommuNotifier {
        acceptable: vec![NotifierEvents::MAP | NotifierEvents::UNMAP],
        range: IovaRange::ALL,
        sink: Arc::clone(&shadow) as Arc<dyn NotifierSink>,
    });
    shadow
}

impl Request<'_> {
    fn domain(&self) -> u32 {
        match self.domain % 16 {
            0..=9 => 1,
            10..=13 => 2,
            14 => 3,
            _ => u32::MAX,
        }
    }

    fn endpoint(&self) -> u32 {
        match self.endpoint % 8 {
            0..=3 => STREAMS[0],
            4..=6 => STREAMS[1],
            _ => 0x99,
        }
    }

    /// First and last address, inclusive, in the middle or at an edge.
    fn span(&self) -> (u64, u64) {
        let base = match self.page >> 4 {
            0..=11 => 0,
            12 | 13 => MSI.0 - 0x4000,
            14 => INPUT.1 - 0x3fff,
            _ => u64::MAX - 0x7fff,
        };
        let first = base + (u64::from(self.page % 8) << 12);
        let more = u64::from(self.pages % if self.pages < 0xf0 { 3 } else { 16 });
        (first, first.wrapping_add((more << 12) | 0xfff))
    }

    fn bytes(&self) -> Vec<u8> {
        let words = |kind: u8, words: &[u32]| {
            let words = words.iter().flat_map(|word| word.to_le_bytes());
            [kind, 0, 0, 0].into_iter().chain(words).collect::<Vec<_>>()
        };
        let halves = |value: u64| [value as u32, (value >> 32) as u32];
        let (domain, endpoint) = (self.domain(), self.endpoint());
        let (first, last) = self.span();
        let ([a, b], [c, d]) = (halves(first), halves(last));
        let mut bytes = match self.kind {
            ATTACH => {
                let flags = u32::from(self.flags % 16).saturating_sub(12);
                words(ATTACH, &[domain, endpoint, flags, 0])
            }
            DETACH => words(DETACH, &[domain, endpoint, 0, 0]),
            MAP => {
                let [e, f] = halves(u64::from(self.gpa) << 12);
                let flags = self.flags % if self.flags < 0xf0 { 4 } else { 16 };
                words(MAP, &[domain, a, b, c, d, e, f, u32::from(flags)])
            }
            UNMAP => words(UNMAP, &[domain, a, b, c, d, 0]),
            PROBE => [words(PROBE, &[endpoint]), vec![0; 64]].concat(),
            _ => self.raw.to_vec(),
        };
        let [at, value] = self.how;
        match (self.wrong, bytes.len().checked_sub(1)) {
            (BYTE, Some(last)) => bytes[usize::from(at).min(last)] = value,
            (LENGTH, _) => bytes.resize(self.how() % 0x400, 0),
            _ => {}
        }
        bytes
    }

    fn how(&self) -> usize {
        usize::from(u16::from_le_bytes(self.how))
    }

    /// Bytes of room for the reply.
    fn room(&self) -> usize {
        if self.wrong == ROOM {
            self.how() % 0x800
        } else {
            PROBE_REPLY
        }
    }

    /// Whether the device accesses addresses outside of RAM, if it writes
    /// `written` bytes.
    fn is_outside(&self, read: &[u8], written: usize) -> bool {
        (self.wrong == REPLY_OUTSIDE && written != 0) || (self.wrong == OUTSIDE && !read.is_empty())
    }
}

/// The device, and the naive model that it must agree with.
struct Rig {
    ram: Arc<GuestRam>,
    model: Arc<VirtioIommu>,
    events: Arc<EventQueue>,
    device: VirtioIommuDevice,
    interrupt: Arc<dyn MsiVector>,
    regions: [Arc<IommuRegion>; 2],
    shadows: [Arc<Shadow>; 2],
    naive: Naive,
    posted: u16,
    faults: u64,
}

impl Rig {
    fn new() -> Self {
        let ram = driver::ram();
        let config = VirtioIommuConfig {
            input_range: IovaRange::new(Iova(INPUT.0), Iova(INPUT.1)).unwrap(),
            msi_window: IovaRange::new(Iova(MSI.0), Iova(MSI.1)).ok(),
            boot_bypass: true,
            max_mappings: 1 << 16,
        };
        let events = Arc::new(EventQueue::default());
        let sink = Arc::clone(&events) as Arc<dyn FaultSink>;
        let model = Arc::new(VirtioIommu::new(config, Arc::clone(&ram), sink));
        let region = |id| IommuRegion::new(Arc::clone(&model) as Arc<dyn Iommu>, StreamId(id));
        let regions = STREAMS.map(region);
        let mut rig = Self {
            device: VirtioIommuDevice::new(Arc::clone(&model), Arc::clone(&events)),
            interrupt: Board::default().vector().expect("an eventfd"),
            shadows: [&regions[0], &regions[1]].map(|region| listen(region)),
            naive: Naive {
                input: INPUT,
                msi: MSI,
                ram: driver::RAM - 1,
                features: 0,
                bypass: true,
                endpoints: STREAMS.map(|stream| (stream, None)).into(),
                domains: [].into(),
            },
            ram,
            model,
            events,
            regions,
            posted: 0,
            faults: 0,
        };
        rig.reset(ALL);
        rig
    }

    /// Resets and negotiates, as a driver that is bound.
    fn reset(&mut self, features: Features) {
        self.device.stop_queue(0);
        self.device.reset();
        self.device
            .negotiated(features.bits())
            .expect("it takes them");
        self.naive.reset(features.bits());
        self.posted = 0;
        driver::write(&self.ram, AVAIL, [0_u16; 2]);
        driver::write(&self.ram, USED, [0_u16; 2]);
        let queue = RunningQueue {
            queue: driver::queue(false),
            dma: driver::space(&self.ram).dma(),
            kick: Arc::new(eventfd()),
            interrupt: Interrupt::new(Arc::clone(&self.interrupt)),
        };
        self.device.start_queue(0, queue).expect("it is empty");
    }

    /// Adds a batch and checks the replies.
    fn post(&mut self, batch: &[Request<'_>]) {
        let start = self.posted;
        for (slot, request) in batch.iter().enumerate() {
            self.post_one(slot, request);
        }
        let outcome = self.device.kicked(0);
        let used: u16 = driver::read(&self.ram, USED + 2);
        let mut done = 0;
        let mut stuck = false;
        for (slot, request) in batch.iter().enumerate() {
            let bytes = request.bytes();
            let bytes = &bytes[..bytes.len().min(READ_AT_MOST)];
            let room = request.room().min(PROBE_REPLY);
            let size = self.naive.written(bytes, room);
            stuck = request.is_outside(bytes, size);
            if stuck {
                break;
            }
            let place = USED + 4 + u64::from(start.wrapping_add(done) % SIZE) * 8;
            let element: [u32; 2] = driver::read(&self.ram, place);
            assert_eq!(element, [(slot * PARTS) as u32, size as u32]);
            if size != 0 {
                let tail = reply_at(slot) + size as u64 - 4;
                let status: [u8; 4] = driver::read(&self.ram, tail);
                let verdict = self.naive.verdict(bytes, room);
                assert!(verdict.contains(&status[0]), "{status:?}, not {verdict:?}");
                assert_eq!(status[1..], [0; 3]);
                if status[0] == naive::OK {
                    self.naive.carry_out(bytes);
                }
            }
            done += 1;
        }
        assert_eq!(outcome.is_err(), stuck, "{outcome:?}");
        assert_eq!(used, start.wrapping_add(done));
        if stuck {
            // The device needs a reset.
            self.reset(ALL);
        }
        self.agrees();
    }

    fn post_one(&mut self, slot: usize, request: &Request<'_>) {
        let bytes = request.bytes();
        let at = REQUESTS + slot as u64 * SLOT;
        self.ram.write_slice(&bytes, GuestAddress(at)).unwrap();
        self.ram
            .write_slice(&[0xff; 0x800], GuestAddress(reply_at(slot)))
            .unwrap();
        let (given, room) = (bytes.len() as u64, request.room() as u64);
        let cut = u64::from(request.cut).min(given);
        let torn = u64::from(request.cut).min(room);
        let beyond = |wrong| u64::from(request.wrong == wrong) * driver::RAM;
        let (from, to) = (at + beyond(OUTSIDE), reply_at(slot) + beyond(REPLY_OUTSIDE));
        let parts = [
            (from, cut, 0_u16),
            (from + cut, given - cut, 0),
            (to, torn, 2),
            (to + torn, room - torn, 2),
        ];
        let head = slot * PARTS;
        for (index, (address, len, flags)) in parts.into_iter().enumerate() {
            let entry = TABLE + (head + index) as u64 * 16;
            let more = u16::from(index + 1 < PARTS);
            driver::write(&self.ram, entry, address);
            driver::write(&self.ram, entry + 8, len as u32);
            driver::write(&self.ram, entry + 12, flags | more);
            driver::write(&self.ram, entry + 14, (head + index + 1) as u16);
        }
        let place = AVAIL + 4 + u64::from(self.posted % SIZE) * 2;
        driver::write(&self.ram, place, head as u16);
        self.posted = self.posted.wrapping_add(1);
        driver::write(&self.ram, AVAIL + 2, self.posted);
    }

    /// Checks translations, shadows and counters.
    fn agrees(&mut self) {
        for (region, shadow) in self.regions.iter().zip(&self.shadows) {
            let stream = region.stream();
            let expected = self.naive.shadow(stream.0);
            assert_eq!(shadow.0.lock().unwrap().in_order(), expected);
            let late = listen_once(region);
            assert_eq!(late, expected, "replayed");
            let state = self.model.endpoint(stream).expect("it is there");
            assert_eq!(state.domain, self.naive.endpoints[&stream.0]);
            assert_eq!(state.bypass, self.naive.in_bypass(stream.0));
        }
        let all = self.naive.domains.values();
        let all: usize = all.map(|domain| domain.mapped.len()).sum();
        assert_eq!(self.model.mapped(), all);
        for iova in self.naive.edges() {
            for who in 0..STREAMS.len() {
                self.look(who, iova, false);
                self.look(who, iova, true);
            }
        }
    }

    /// Translates and compares; the report of a fault finds no buffer.
    fn look(&mut self, who: usize, iova: u64, write: bool) {
        let (access, perm) = match write {
            true => (Access::Write, naive::WRITE),
            false => (Access::Read, naive::READ),
        };
        let answer = self.regions[who].enter().translate(Iova(iova), access);
        self.faults += u64::from(answer.is_err());
        let seen = match answer {
            Ok(mapping) => Seen::Mapping(mapped(&mapping)),
            Err(fault) => match fault.reason {
                FaultReason::Permission => Seen::Forbidden,
                FaultReason::Translation => Seen::Unmapped,
                _ => Seen::Blocked,
            },
        };
        assert_eq!(
            seen,
            self.naive.access(STREAMS[who], iova, perm),
            "{iova:#x}"
        );
        assert_eq!(self.events.counts(), (0, self.faults));
    }
}

fn reply_at(slot: usize) -> u64 {
    REQUESTS + slot as u64 * SLOT + 0x800
}

/// The mappings that a new notifier receives.
fn listen_once(region: &IommuRegion) -> Vec<Mapped> {
    let shadow = Arc::new(Shadow::default());
    let id = region.register(IommuNotifier {
        acceptable: vec![NotifierEvents::MAP | NotifierEvents::UNMAP],
        range: IovaRange::ALL,
        sink: Arc::clone(&shadow) as Arc<dyn NotifierSink>,
    });
    region.unregister(id);
    shadow.0.lock().unwrap().in_order()
}

fuzz_target!(|data: &[u8]| {
    let mut rig = Rig::new();
    rig.agrees();
    let mut batch = Vec::new();
    let mut data = data;
    while let Some(step) = step(&mut data) {
        if let Step::Post(request) = step {
            let last = request.last;
            batch.push(request);
            if last || batch.len() == BATCH {
                rig.post(&std::mem::take(&mut batch));
            }
            continue;
        }
        rig.post(&std::mem::take(&mut batch));
        match step {
            Step::Bypass(value) => {
                rig.device.write_config(CONFIG_BYPASS as u64, &[value]);
                rig.naive.set_bypass(value);
            }
            Step::Reset { features } => rig.reset(features),
            Step::Look { who, iova, write } => rig.look(who, iova, write),
            Step::Post(_) => {}
        }
        rig.agrees();
    }
    rig.post(&batch);
});
