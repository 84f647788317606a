//! Drives a virtio-iommu from inside a guest whose kernel does not use it, to keep a vCPU inside
//! the device: full rings of requests, over a given number of mappings.
//!
//! `flood ADDRESS ENDPOINT OTHER MAPPINGS` takes over the virtio-iommu at PCI address ADDRESS, and
//! attaches the endpoint ENDPOINT to a domain with MAPPINGS mappings. Then it makes rings available
//! that attach the endpoint OTHER to that domain and detach it, and unmap and map the domain's
//! ends. It prints a line for each ring, and ends with a message when an answer is wrong. Linux
//! only, as root.

#[path = "../memory.rs"]
#[allow(dead_code, reason = "isolation uses the rest")]
mod memory;

use std::fs::{self, File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use memory::{Shared, page_size};

/// Descriptors of the request queue; two for each request.
const SIZE: u16 = 256;
const REQUESTS: usize = SIZE as usize / 2;
/// Bytes of BAR 0, and offsets of its structures: the product's layout.
const BAR_SIZE: usize = 0x8000;
const COMMON: usize = 0;
const NOTIFY: usize = 0x3000;

/// Offsets in the common configuration structure (virtio 1.2 §4.1.4.3).
mod common {
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    pub const DEVICE_FEATURE: usize = 4;
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    pub const DRIVER_FEATURE: usize = 12;
    pub const DEVICE_STATUS: usize = 20;
    pub const QUEUE_SELECT: usize = 22;
    pub const QUEUE_SIZE: usize = 24;
    pub const QUEUE_ENABLE: usize = 28;
    pub const QUEUE_DESC: usize = 32;
    pub const QUEUE_DRIVER: usize = 40;
    pub const QUEUE_DEVICE: usize = 48;
}

const ACKNOWLEDGE_AND_DRIVER: u8 = 3;
const FEATURES_OK: u8 = 8;
const DRIVER_OK: u8 = 4;
/// Device-specific feature bits, below those of the ring and the transport.
const DEVICE_FEATURES: u32 = 0x00ff_ffff;
const F_VERSION_1_HIGH: u32 = 1;

/// Types of requests (virtio 1.2 §5.13.6), and their length in bytes without the tail.
const ATTACH: (u8, usize) = (1, 20);
const DETACH: (u8, usize) = (2, 20);
const MAP: (u8, usize) = (3, 36);
const UNMAP: (u8, usize) = (4, 28);
const TAIL: u32 = 4;

/// Bytes of memory for one request and its tail.
const SLOT: usize = 64;
const TAIL_AT: usize = 40;
const DOMAIN: u32 = 1;
/// Each mapping is a page, with a hole after it, so that no two are adjacent.
const STRIDE: u64 = 0x2000;
/// Above the window of message-signalled interrupts.
const FIRST: u64 = 1 << 32;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [address, endpoint, other, mappings] = arguments.as_slice() else {
        anyhow::bail!("usage: flood ADDRESS ENDPOINT OTHER MAPPINGS");
    };
    let (endpoint, other): (u32, u32) = (endpoint.parse()?, other.parse()?);
    let mappings: u64 = mappings.parse()?;
    let mut queue = Queue::start(address)?;
    queue.answered(&[attach(endpoint)])?;
    let mut next = 0;
    while next < mappings {
        let batch: Vec<_> = (next..mappings).take(REQUESTS).map(map).collect();
        next += u64::try_from(batch.len())?;
        queue.answered(&batch)?;
    }
    println!("flood: {mappings} mappings");
    let last = mappings - 1;
    let round = [
        attach(other),
        unmap(0),
        map(0),
        unmap(last),
        map(last),
        detach(other),
    ];
    let ring: Vec<_> = round
        .iter()
        .cycle()
        .take(REQUESTS / 6 * 6)
        .cloned()
        .collect();
    for rings in 1_u64.. {
        queue.answered(&ring)?;
        println!("flood: ring {rings}");
    }
    Ok(())
}

/// A request: its bytes, without the tail.
type Request = Vec<u8>;

fn request((kind, len): (u8, usize), fields: &[&[u8]]) -> Request {
    let mut bytes = vec![kind, 0, 0, 0];
    bytes.extend(fields.concat());
    bytes.resize(len, 0);
    bytes
}

fn attach(endpoint: u32) -> Request {
    request(ATTACH, &[&DOMAIN.to_le_bytes(), &endpoint.to_le_bytes()])
}

fn detach(endpoint: u32) -> Request {
    request(DETACH, &[&DOMAIN.to_le_bytes(), &endpoint.to_le_bytes()])
}

fn map(index: u64) -> Request {
    const READ_AND_WRITE: u32 = 3;
    let start = FIRST + index * STRIDE;
    let fields: [&[u8]; 5] = [
        &DOMAIN.to_le_bytes(),
        &start.to_le_bytes(),
        &(start + 0xfff).to_le_bytes(),
        &0x10_0000_u64.to_le_bytes(),
        &READ_AND_WRITE.to_le_bytes(),
    ];
    request(MAP, &fields)
}

fn unmap(index: u64) -> Request {
    let start = FIRST + index * STRIDE;
    let fields: [&[u8]; 3] = [
        &DOMAIN.to_le_bytes(),
        &start.to_le_bytes(),
        &(start + 0xfff).to_le_bytes(),
    ];
    request(UNMAP, &fields)
}

/// Memory in pages that need not be adjacent, with their guest-physical addresses.
struct Pages {
    memory: Shared,
    physical: Vec<u64>,
}

impl Pages {
    fn new(count: usize) -> Result<Self> {
        let memory = Shared::anonymous(count * page_size())?;
        // Present from here on; this guest reclaims no pages.
        memory.fill(0);
        let pagemap = File::open("/proc/self/pagemap")?;
        let page = u64::try_from(page_size())?;
        let physical = (0..u64::try_from(count)?).map(|index| {
            let mut entry = [0; 8];
            let at = (memory.address() / page + index) * 8;
            pagemap.read_exact_at(&mut entry, at)?;
            let frame = u64::from_le_bytes(entry) & ((1 << 55) - 1);
            ensure!(frame != 0, "the kernel does not tell where a page is");
            Ok(frame * page)
        });
        let physical = physical.collect::<Result<_>>()?;
        Ok(Self { memory, physical })
    }

    fn physical(&self, offset: usize) -> u64 {
        let at = u64::try_from(offset % page_size()).unwrap_or(0);
        self.physical[offset / page_size()] + at
    }
}

/// The request queue of a running device.
struct Queue {
    bar: Shared,
    descriptors: Pages,
    avail: Pages,
    used: Pages,
    slots: Pages,
    next: u16,
}

impl Queue {
    fn start(address: &str) -> Result<Self> {
        let device = format!("/sys/bus/pci/devices/{address}");
        // The transport's driver owns the function; the device itself has no driver.
        let driver = format!("{device}/driver/unbind");
        if Path::new(&driver).exists() {
            fs::write(&driver, address).context("taking the device from its driver")?;
        }
        fs::write(format!("{device}/enable"), "1").context("enabling the device")?;
        set_bus_master(&device)?;
        let resource = OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("{device}/resource0"))?;
        let bar = Shared::of_file(resource.as_fd(), 0, BAR_SIZE)?;
        let slots = REQUESTS * SLOT / page_size() + 1;
        let queue = Self {
            bar,
            descriptors: Pages::new(1)?,
            avail: Pages::new(1)?,
            used: Pages::new(1)?,
            slots: Pages::new(slots)?,
            next: 0,
        };
        queue.negotiate()?;
        queue.describe();
        queue
            .bar
            .set_u8(COMMON + common::DEVICE_STATUS, queue.status() | DRIVER_OK);
        Ok(queue)
    }

    fn status(&self) -> u8 {
        self.bar.u8(COMMON + common::DEVICE_STATUS)
    }

    fn negotiate(&self) -> Result<()> {
        let bar = &self.bar;
        bar.set_u8(COMMON + common::DEVICE_STATUS, 0);
        bar.set_u8(COMMON + common::DEVICE_STATUS, ACKNOWLEDGE_AND_DRIVER);
        bar.set_u32(COMMON + common::DEVICE_FEATURE_SELECT, 0);
        let offered = bar.u32(COMMON + common::DEVICE_FEATURE);
        for (half, features) in [(0, offered & DEVICE_FEATURES), (1, F_VERSION_1_HIGH)] {
            bar.set_u32(COMMON + common::DRIVER_FEATURE_SELECT, half);
            bar.set_u32(COMMON + common::DRIVER_FEATURE, features);
        }
        bar.set_u8(COMMON + common::DEVICE_STATUS, self.status() | FEATURES_OK);
        ensure!(self.status() & FEATURES_OK != 0, "the features are refused");
        Ok(())
    }

    /// Writes the descriptors, two for each slot, and the ring. They never change.
    fn describe(&self) {
        let descriptors = &self.descriptors.memory;
        for slot in 0..REQUESTS {
            let (request, tail) = (slot * 32, slot * 32 + 16);
            let next = u16::try_from(slot * 2 + 1).unwrap_or(0);
            descriptors.set_u64(request, self.slots.physical(slot * SLOT));
            descriptors.set_u16(request + 12, 1);
            descriptors.set_u16(request + 14, next);
            descriptors.set_u64(tail, self.slots.physical(slot * SLOT + TAIL_AT));
            descriptors.set_u32(tail + 8, TAIL);
            descriptors.set_u16(tail + 12, 2);
        }
        let bar = &self.bar;
        bar.set_u16(COMMON + common::QUEUE_SELECT, 0);
        bar.set_u16(COMMON + common::QUEUE_SIZE, SIZE);
        for (register, pages) in [
            (common::QUEUE_DESC, &self.descriptors),
            (common::QUEUE_DRIVER, &self.avail),
            (common::QUEUE_DEVICE, &self.used),
        ] {
            bar.set_u64(COMMON + register, pages.physical(0));
        }
        bar.set_u16(COMMON + common::QUEUE_ENABLE, 1);
    }

    /// Makes requests available with one kick, spins until all are answered, and checks the
    /// answers.
    fn answered(&mut self, requests: &[Request]) -> Result<()> {
        const PENDING: u8 = 0xff;
        for (slot, bytes) in requests.iter().enumerate() {
            self.slots.memory.write(slot * SLOT, bytes);
            self.slots.memory.set_u8(slot * SLOT + TAIL_AT, PENDING);
            let length = u32::try_from(bytes.len())?;
            self.descriptors.memory.set_u32(slot * 32 + 8, length);
            let entry = 4 + 2 * usize::from(self.next % SIZE);
            let head = u16::try_from(slot * 2)?;
            self.avail.memory.set_u16(entry, head);
            self.next = self.next.wrapping_add(1);
        }
        self.avail.memory.set_u16(2, self.next);
        self.bar.set_u16(NOTIFY, 0);
        while self.used.memory.u16(2) != self.next {
            std::hint::spin_loop();
        }
        for (slot, bytes) in requests.iter().enumerate() {
            let status = self.slots.memory.u8(slot * SLOT + TAIL_AT);
            ensure!(status == 0, "request {slot}, {bytes:x?}: status {status}");
        }
        Ok(())
    }
}

/// Enables memory space and bus master in the command register.
fn set_bus_master(device: &str) -> Result<()> {
    const COMMAND: u64 = 4;
    const MEMORY_AND_MASTER: u8 = 6;
    let config = OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("{device}/config"))?;
    Ok(config.write_all_at(&[MEMORY_AND_MASTER, 0], COMMAND)?)
}
