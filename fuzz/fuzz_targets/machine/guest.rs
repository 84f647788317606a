//! Operations of drivers: accesses of registers, and of rings and tables in memory.

use std::thread;

use iommu::virtio::spec::request::{ATTACH, DETACH, MAP, PROBE, UNMAP};
use iommu::virtio::spec::{CONFIG_BYPASS, PROBE_SIZE};
use vm_memory::{Bytes as _, GuestAddress};

use super::{DISK, ECAM, Machine, RAM, RNG, SLOTS, SMMU, VIRTIO_IOMMU};

/// Entries of each queue.
const QUEUE_SIZE: u16 = 16;
/// Address of the rings of the first queue: table, available and used ring, a
/// page each.
const RINGS: u64 = 0x1_0000;
const AVAIL: u64 = 0x1000;
const USED: u64 = 0x2000;
/// Addresses of a request of the virtio-iommu and its reply, and of a disk
/// request's header and status.
const REQUEST: u64 = 0x8000;
const REPLY: u64 = 0x9000;
const HEADER: u64 = 0xa000;
const STATUS: u64 = 0xb000;
/// Address of the data of requests that check the devices.
const DATA: u64 = 0xc000;
/// Addresses of the SMMUv3's structures, in a page each: stream table, context
/// descriptor, three levels of stage 1, command and event queue, three levels of
/// stage 2.
const STREAM_TABLE: u64 = 0x2_8000;
const CONTEXT: u64 = 0x2_a000;
const STAGE_1: u64 = 0x2_b000;
const COMMANDS: u64 = 0x2_e000;
const EVENTS: u64 = 0x2_f000;
const STAGE_2: u64 = 0x3_0000;
/// Entries of the command queue, as a shift.
const COMMANDS_LOG2: u32 = 4;

// Structures in a BAR, and registers of the common configuration (virtio 1.2
// §4.1.4.3).
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const DEVICE_STATUS: u64 = 20;
const READY: u8 = 15;
const NEEDS_RESET: u8 = 64;

// Registers of the SMMUv3 (IHI 0070 §6.3).
const CR0: u64 = 0x20;
const GBPA: u64 = 0x44;
const GBPA_UPDATE: u32 = 1 << 31;
const CMDQ_PROD: u64 = 0x98;

/// A well-formed request of the virtio-iommu. Addresses are in pages.
#[derive(Clone, Copy, Debug)]
pub struct IommuRequest {
    pub kind: u8,
    pub domain: u32,
    pub endpoint: u32,
    pub page: u64,
    pub pages: u64,
    pub gpa: u64,
    pub flags: u32,
}

impl IommuRequest {
    fn bytes(&self) -> Vec<u8> {
        let first = self.page << 12;
        let last = first + (self.pages << 12) - 1;
        let head = u32::from(self.kind).to_le_bytes().to_vec();
        let fields = match self.kind {
            MAP => [
                &self.domain.to_le_bytes()[..],
                &first.to_le_bytes(),
                &last.to_le_bytes(),
                &(self.gpa << 12).to_le_bytes(),
                &self.flags.to_le_bytes(),
            ]
            .concat(),
            UNMAP => [
                &self.domain.to_le_bytes()[..],
                &first.to_le_bytes(),
                &last.to_le_bytes(),
                &[0; 4],
            ]
            .concat(),
            PROBE => [&self.endpoint.to_le_bytes()[..], &[0; 64]].concat(),
            // ATTACH and DETACH, whose flags are reserved bytes.
            _ => [self.domain, self.endpoint, self.flags, 0]
                .map(u32::to_le_bytes)
                .concat(),
        };
        [head, fields].concat()
    }
}

impl Machine {
    pub fn put(&self, at: u64, bytes: &[u8]) {
        // Bytes beyond the end of RAM are not written.
        let _ = self.ram.write_slice(bytes, GuestAddress(at));
    }

    fn put_words(&self, at: u64, words: &[u64]) {
        let bytes: Vec<_> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.put(at, &bytes);
    }

    fn half_at(&self, at: u64) -> u16 {
        self.ram.read_obj(GuestAddress(at)).expect("it is inside")
    }

    /// Writes configuration space.
    pub fn config(&self, function: usize, offset: u64, bytes: &[u8]) {
        let at = ECAM + (u64::from(SLOTS[function]) << 15) + offset;
        self.memory.write(at, bytes);
    }

    pub fn config_word(&self, function: usize, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        let at = ECAM + (u64::from(SLOTS[function]) << 15) + offset;
        self.memory.read(at, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Writes a BAR.
    pub fn write_bar(&self, function: usize, offset: u64, bytes: &[u8]) {
        self.memory.write(self.bar(function) + offset, bytes);
    }

    pub fn kick(&self, function: usize, queue: u8) {
        self.write_bar(function, NOTIFY + 4 * u64::from(queue), &[queue, 0]);
    }

    fn status(&self, function: usize) -> u8 {
        let mut status = [0];
        let at = self.bar(function) + DEVICE_STATUS;
        self.memory.read(at, &mut status);
        status[0]
    }

    pub fn reset(&self, function: usize) {
        self.write_bar(function, DEVICE_STATUS, &[0]);
    }

    /// Initiates a function-level reset through the PCI Express capability.
    pub fn function_level_reset(&self, function: usize) {
        let mut at = u64::from(self.config_word(function, 0x34) & 0xff);
        // A slot without a function reads as all ones.
        for _ in 0..16 {
            let head = self.config_word(function, at & 0xfc);
            if head & 0xff == 0x10 {
                self.config(function, (at & 0xfc) + 8, &[0, 0x80]);
                return;
            }
            at = u64::from(head >> 8 & 0xff);
        }
    }

    pub fn move_bar(&self, function: usize, to: u64) {
        self.set_bar(function, to);
        let bytes = to.to_le_bytes();
        self.config(function, 0x10, &bytes[..4]);
        self.config(function, 0x14, &bytes[4..]);
    }

    /// Addresses of a queue's table, available and used ring.
    fn rings(function: usize, queue: u8) -> (u64, u64, u64) {
        let number = function as u64 * 2 + u64::from(queue % 2);
        let table = RINGS + number * 0x3000;
        (table, table + AVAIL, table + USED)
    }

    /// Writes an entry of a queue's table.
    pub fn descriptor(&self, function: usize, queue: u8, index: u16, entry: (u64, u32, u16, u16)) {
        let (table, ..) = Self::rings(function, queue);
        let (address, len, flags, next) = entry;
        let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
        self.put_words(table + u64::from(index) * 16, &[address, rest]);
    }

    /// Makes a head available and advances the index by `by`.
    pub fn make_available(&self, function: usize, queue: u8, head: u16, by: u16) {
        let (_, avail, _) = Self::rings(function, queue);
        let index = self.half_at(avail + 2);
        let entry = avail + 4 + 2 * u64::from(index % QUEUE_SIZE);
        self.put(entry, &head.to_le_bytes());
        self.put(avail + 2, &index.wrapping_add(by).to_le_bytes());
    }

    /// Adds one chain of (address, length, device-writable) and kicks.
    fn post(&self, function: usize, queue: u8, buffers: &[(u64, u32, bool)]) {
        for (index, &(at, len, written)) in (0..).zip(buffers) {
            let more = usize::from(index) + 1 < buffers.len();
            let flags = u16::from(more) | u16::from(written) << 1;
            self.descriptor(function, queue, index, (at, len, flags, index + 1));
        }
        self.make_available(function, queue, 0, 1);
        self.kick(function, queue);
    }

    /// Initializes a device up to DRIVER_OK (virtio 1.2 §3.1.1).
    pub fn bring_up(&self, function: usize, features: u64, queues: u8) {
        self.move_bar(function, self.bar(function));
        self.config(function, 4, &6_u16.to_le_bytes());
        self.reset(function);
        self.write_bar(function, DEVICE_STATUS, &[3]);
        for half in 0..2_u32 {
            self.write_bar(function, 0, &half.to_le_bytes());
            let mut offered = [0; 4];
            self.memory.read(self.bar(function) + 4, &mut offered);
            let [low, high] = [features as u32, (features >> 32) as u32 | 3];
            let kept = u32::from_le_bytes(offered) & if half == 0 { low } else { high };
            self.write_bar(function, 8, &half.to_le_bytes());
            self.write_bar(function, 12, &kept.to_le_bytes());
        }
        self.write_bar(function, DEVICE_STATUS, &[11]);
        for queue in 0..queues {
            self.write_bar(function, 22, &u16::from(queue).to_le_bytes());
            self.write_bar(function, 24, &QUEUE_SIZE.to_le_bytes());
            self.write_bar(function, 26, &u16::from(queue).to_le_bytes());
            let (table, avail, used) = Self::rings(function, queue);
            for (register, ring) in [(32, table), (40, avail), (48, used)] {
                self.write_bar(function, register, &ring.to_le_bytes());
            }
            self.write_bar(function, 28, &[1, 0]);
        }
        self.write_bar(function, DEVICE_STATUS, &[READY]);
    }

    pub fn iommu_request(&self, request: &IommuRequest) {
        let bytes = request.bytes();
        self.put(REQUEST, &bytes);
        let len = bytes.len() as u32;
        let chain = [(REQUEST, len, false), (REPLY, PROBE_SIZE + 4, true)];
        self.post(VIRTIO_IOMMU, 0, &chain);
    }

    pub fn disk_request(&self, queue: u8, kind: u32, sector: u64, data: (u64, u32)) {
        self.put_words(HEADER, &[u64::from(kind), sector]);
        let written = matches!(kind, 0 | 8);
        let chain = [
            (HEADER, 16, false),
            (data.0, data.1, written),
            (STATUS, 1, true),
        ];
        self.post(DISK, queue, &chain);
    }

    /// Enables the SMMUv3 with tables that map all of RAM, and configures a
    /// stream: both stages, one, or none.
    pub fn smmu_up(&self, stream: u64, config: u64, flags: u64) {
        // V and Config; EATS; VTCR for 39 bits from level 1 on, S2AA64, S2R.
        let ste = [
            CONTEXT | config << 1 | 1,
            flags << 28,
            1 | (5 << 48 | 1 << 6 | 25) << 32 | 1 << 51 | 1 << 58,
            STAGE_2,
        ];
        self.put_words(STREAM_TABLE + 64 * stream, &ste);
        let context = 1 << 46 | 1 << 45 | 1 << 41 | 5 << 32 | 1 << 31 | 1 << 30 | 25;
        self.put_words(CONTEXT, &[context, STAGE_1]);
        for (table, page) in [(STAGE_1, 0xc43), (STAGE_2, 0x4ff)] {
            self.put_words(table, &[(table + 0x1000) | 3]);
            self.put_words(table + 0x1000, &[(table + 0x2000) | 3]);
            let pages: Vec<_> = (0..RAM >> 12).map(|number| number << 12 | page).collect();
            self.put_words(table + 0x2000, &pages);
        }
        for (register, value) in [
            (0x80, STREAM_TABLE as u32),
            (0x88, 6),
            (0x90, COMMANDS as u32 | COMMANDS_LOG2),
            (0xa0, EVENTS as u32 | 3),
            (0x2c, 0xe),
            (0x50, 7),
            (CR0, 0xd),
        ] {
            self.memory.write(SMMU + register, &value.to_le_bytes());
        }
    }

    pub fn smmu_command(&self, command: [u64; 2]) {
        let mut bytes = [0; 4];
        self.memory.read(SMMU + CMDQ_PROD, &mut bytes);
        let index = u32::from_le_bytes(bytes);
        let entry = u64::from(index % (1 << COMMANDS_LOG2));
        self.put_words(COMMANDS + 16 * entry, &command);
        let next = index.wrapping_add(1) % (2 << COMMANDS_LOG2);
        self.memory.write(SMMU + CMDQ_PROD, &next.to_le_bytes());
    }

    /// Resets and initializes everything, and checks that each function answers a
    /// request.
    pub fn works_again(&self) {
        self.pause.clear();
        self.pause.resume_deferred();
        for (function, _) in &self.functions {
            // No BAR is decoded at the future address of another.
            self.config(*function, 4, &[0, 0]);
        }
        for (function, _) in &self.functions {
            self.move_bar(*function, super::first_bar(*function));
            for queue in 0..2 {
                let (_, avail, used) = Self::rings(*function, queue);
                self.put_words(avail, &[0]);
                self.put_words(used, &[0, 0]);
            }
        }
        if self.has_smmu {
            self.memory.write(SMMU + CR0, &[0; 4]);
            self.memory.write(SMMU + GBPA, &GBPA_UPDATE.to_le_bytes());
        } else {
            self.iommu_works();
        }
        self.bring_up(RNG, 0, 1);
        self.post(RNG, 0, &[(DATA, 64, true)]);
        assert_eq!(self.used(RNG), (1, 64));
        self.disk_works();
        if !self.has_smmu {
            self.nothing_mapped_is_reached();
        }
        // Two queues of the disk have a doorbell; inline devices have none.
        assert_eq!(self.board.doorbells().len(), 2);
    }

    /// The index of queue 0's used ring, and the length of its last entry.
    fn used(&self, function: usize) -> (u16, u32) {
        let (_, _, used) = Self::rings(function, 0);
        let index = self.half_at(used + 2);
        let last = u64::from(index.wrapping_sub(1) % QUEUE_SIZE);
        let at = GuestAddress(used + 8 + 8 * last);
        (index, self.ram.read_obj(at).expect("it is inside"))
    }

    fn answered(&self, request: &IommuRequest) {
        let (before, _) = self.used(VIRTIO_IOMMU);
        self.put(REPLY, &[0xff; 4]);
        self.iommu_request(request);
        assert_eq!(
            self.used(VIRTIO_IOMMU),
            (before.wrapping_add(1), 4),
            "{request:?}"
        );
        let tail: u32 = self.ram.read_obj(GuestAddress(REPLY)).unwrap();
        assert_eq!(tail, 0, "{request:?}");
    }

    fn iommu_works(&self) {
        self.bring_up(VIRTIO_IOMMU, u64::MAX, 1);
        assert_eq!(self.status(VIRTIO_IOMMU), READY);
        self.write_bar(VIRTIO_IOMMU, DEVICE + CONFIG_BYPASS as u64, &[0]);
        let mut request = IommuRequest {
            kind: ATTACH,
            domain: 1,
            endpoint: 0,
            page: 0,
            pages: RAM >> 12,
            gpa: 0,
            flags: 0,
        };
        for function in [RNG, DISK] {
            request.endpoint = u32::from(SLOTS[function]) << 3;
            self.answered(&request);
        }
        request.kind = MAP;
        request.flags = 3;
        self.answered(&request);
    }

    fn disk_works(&self) {
        self.bring_up(DISK, 0, 2);
        self.put(DATA, &[0x5a; 512]);
        for (done, (kind, at)) in (1..).zip([(1, DATA), (0, DATA + 512)]) {
            self.put(STATUS, &[0xff]);
            self.disk_request(0, kind, 7, (at, 512));
            while self.used(DISK).0 != done {
                assert_eq!(self.status(DISK), READY);
                thread::yield_now();
            }
            let status: u8 = self.ram.read_obj(GuestAddress(STATUS)).unwrap();
            assert_eq!(status, 0);
        }
        let mut read = [0; 512];
        self.ram
            .read_slice(&mut read, GuestAddress(DATA + 512))
            .unwrap();
        assert_eq!(read, [0x5a; 512]);
    }

    /// Detaches an endpoint, and checks that its device accesses no memory.
    fn nothing_mapped_is_reached(&self) {
        self.answered(&IommuRequest {
            kind: DETACH,
            domain: 1,
            endpoint: u32::from(SLOTS[RNG]) << 3,
            page: 0,
            pages: 1,
            gpa: 0,
            flags: 0,
        });
        self.put(DATA, &[0; 64]);
        self.post(RNG, 0, &[(DATA, 64, true)]);
        let mut data = [0xff; 64];
        self.ram.read_slice(&mut data, GuestAddress(DATA)).unwrap();
        assert_eq!(data, [0; 64]);
        assert_eq!(self.used(RNG).0, 1);
        assert_eq!(self.status(RNG), READY | NEEDS_RESET);
    }
}
