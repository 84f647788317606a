//! Test fixture: an SMMU with the memory, queues and tables of a driver, and
//! its recorded signals.

use std::cell::Cell;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use vm_memory::{Bytes as _, GuestAddress};

use super::super::descriptor::Granule;
use super::super::spec::{
    Field, Raw, cd, cd::RawCd, command as cmd, command::RawCommand, cr0, cr2, event,
    event::RawEvent, irq_ctrl, pri::RawPageRequest, reg, ste, ste::RawSte,
};
use super::super::*;
use crate::{
    Access, AddressSpace, Gpa, IommuNotifier, IommuRegion, Iova, IovaRange, Mapping,
    NotifierEvents, NotifierSink, Registration, Request,
};

pub const RAM: u64 = 0x4000_0000;
pub const RAM_SIZE: usize = 64 << 20;
const CMDQ: u64 = RAM + 0x1_0000;
const CMDQ_LOG2: u32 = 8;
const EVENTQ: u64 = RAM + 0x2_0000;
pub const EVENTQ_LOG2: u32 = 3;
const PRIQ: u64 = RAM + 0x3_0000;
pub const PRIQ_LOG2: u32 = 2;
pub const STRTAB: u64 = RAM + 0x4_0000;
pub const STRTAB_LOG2: u32 = 8;
pub const STREAM: StreamId = StreamId(8);
pub const OTHER: StreamId = StreamId(16);

/// Stream, SubstreamID, group and response.
pub type Answer = (StreamId, Option<u32>, u16, PageResponse);

#[derive(Default)]
pub struct Wires {
    pub pulses: Mutex<Vec<SmmuLine>>,
    pub messages: Mutex<Vec<(Gpa, u32)>>,
    pub responses: Mutex<Vec<Answer>>,
    pub resumed: Mutex<Vec<(StreamId, Iova, Resume)>>,
    pub without_doorbells: AtomicBool,
    /// Number of commands until the queue is interrupted.
    pub interrupted_after: Mutex<Option<u32>>,
}

impl SmmuWires for Wires {
    fn pulse(&self, line: SmmuLine) {
        self.pulses.lock().unwrap().push(line);
    }

    fn message(&self, address: Gpa, data: u32) -> bool {
        self.messages.lock().unwrap().push((address, data));
        !self.without_doorbells.load(Ordering::Relaxed)
    }

    fn page_response(
        &self,
        stream: StreamId,
        substream: Option<u32>,
        group: u16,
        response: PageResponse,
    ) {
        let answer = (stream, substream, group, response);
        self.responses.lock().unwrap().push(answer);
    }

    fn resumed(&self, transaction: &Stalled, action: Resume) {
        let what = (transaction.stream, transaction.iova, action);
        self.resumed.lock().unwrap().push(what);
    }

    fn interrupts(&self) -> bool {
        let mut left = self.interrupted_after.lock().unwrap();
        let interrupts = *left == Some(0);
        *left = left.map(|count| count.saturating_sub(1));
        interrupts
    }
}

/// Records its notifications.
#[derive(Default)]
pub struct Sink {
    pub unmapped: Mutex<Vec<IovaRange>>,
    pub outcomes: Mutex<Vec<NotifierEvents>>,
}

impl NotifierSink for Sink {
    fn map(&self, _: &Mapping) {
        panic!("an SMMU maps nothing");
    }

    fn unmap(&self, ranges: &[IovaRange]) {
        self.unmapped.lock().unwrap().extend(ranges);
    }

    fn registered(&self, outcome: &Registration) {
        self.outcomes.lock().unwrap().push(outcome.events);
    }
}

impl Sink {
    pub fn take(&self) -> Vec<IovaRange> {
        std::mem::take(&mut self.unmapped.lock().unwrap())
    }
}

pub struct Rig {
    pub ram: Arc<GuestRam>,
    pub smmu: Arc<Smmu>,
    pub wires: Arc<Wires>,
    page: Cell<u64>,
    events: Cell<u32>,
}

/// Encodes a command.
pub fn command(opcode: u64, fields: &[(Field<RawCommand>, u64)]) -> RawCommand {
    let mut words = RawCommand::ZERO;
    cmd::OPCODE.put(&mut words, opcode);
    for (field, value) in fields {
        field.put(&mut words, *value);
    }
    words
}

pub fn sync() -> RawCommand {
    command(cmd::op::SYNC, &[])
}

/// An event record, with fields by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen(pub RawEvent);

impl Seen {
    pub fn number(&self) -> u64 {
        event::NUMBER.of(&self.0)
    }

    pub fn get(&self, field: Field<RawEvent>) -> u64 {
        field.of(&self.0)
    }
}

/// A valid CD of stage 1.
pub fn cd_words(granule: Granule, tsz: u64, ttb0: u64, asid: u64) -> RawCd {
    let mut words = RawCd::ZERO;
    for (field, value) in [
        (cd::V, 1),
        (cd::AA64, 1),
        (cd::A, 1),
        (cd::R, 1),
        (cd::IPS, 5),
        (cd::EPD1, 1),
        (cd::T0SZ, tsz),
        (cd::TG0, tg0(granule)),
        (cd::TTB0, ttb0 >> 4),
        (cd::ASID, asid),
    ] {
        field.put(&mut words, value);
    }
    words
}

pub fn tg0(granule: Granule) -> u64 {
    match granule {
        Granule::K4 => 0,
        Granule::K64 => 1,
        Granule::K16 => 2,
    }
}

pub fn ste_stage1(context: u64) -> RawSte {
    let mut words = RawSte::ZERO;
    ste::V.put(&mut words, 1);
    ste::CONFIG.put(&mut words, 0b101);
    ste::S1CONTEXTPTR.put(&mut words, context >> 6);
    words
}

pub fn put_stage2(words: &mut RawSte, granule: Granule, table: &Root, vmid: u64) {
    for (field, value) in [
        (ste::V, 1),
        (ste::S2AA64, 1),
        (ste::S2R, 1),
        (ste::S2PS, 5),
        (ste::S2T0SZ, u64::from(64 - table.input_bits)),
        (ste::S2SL0, sl0(granule, table.level)),
        (ste::S2TG, tg0(granule)),
        (ste::S2TTB, table.base >> 4),
        (ste::S2VMID, vmid),
    ] {
        field.put(words, value);
    }
    let config = ste::CONFIG.of(words) & 1 | 0b110;
    ste::CONFIG.put(words, config);
}

fn sl0(granule: Granule, level: u32) -> u64 {
    match granule {
        Granule::K4 => u64::from(2 - level),
        _ => u64::from(3 - level),
    }
}

/// A translation table of the test.
#[derive(Clone, Copy, Debug)]
pub struct Root {
    pub granule: Granule,
    pub base: u64,
    pub input_bits: u32,
    pub level: u32,
}

/// Attributes of a stage 1 leaf: valid, accessed, unprivileged, not global.
pub const RW: u64 = 1 << 11 | 1 << 10 | 1 << 6 | 1;
/// The same, read-only.
pub const RO: u64 = RW | 1 << 7;
/// Attributes of a stage 2 leaf: normal memory, readable and writable.
pub const S2_RW: u64 = 1 << 10 | 3 << 6 | 0xf << 2 | 1;
/// The same, read-only.
pub const S2_RO: u64 = 1 << 10 | 1 << 6 | 0xf << 2 | 1;

impl Rig {
    pub fn new(config: SmmuConfig) -> Self {
        let ram = GuestRam::from_ranges(&[(GuestAddress(RAM), RAM_SIZE)]).unwrap();
        let (ram, wires) = (Arc::new(ram), Arc::new(Wires::default()));
        let smmu = Arc::new(Smmu::new(config, ram.clone(), wires.clone()));
        Self {
            ram,
            smmu,
            wires,
            page: Cell::new(RAM + 0x10_0000),
            events: Cell::new(0),
        }
    }

    pub fn nested() -> Self {
        Self::new(SmmuConfig {
            stages: Stages::Nested,
            ..SmmuConfig::default()
        })
    }

    /// An SMMU with queues and stream table, enabled.
    pub fn enabled(config: SmmuConfig) -> Self {
        let rig = Self::new(config);
        rig.enable();
        rig
    }

    pub fn enable(&self) {
        self.write64(reg::STRTAB_BASE, STRTAB);
        self.smmu.write(reg::STRTAB_BASE_CFG, STRTAB_LOG2);
        self.write64(reg::CMDQ_BASE, CMDQ | u64::from(CMDQ_LOG2));
        self.write64(reg::EVENTQ_BASE, EVENTQ | u64::from(EVENTQ_LOG2));
        self.write64(reg::PRIQ_BASE, PRIQ | u64::from(PRIQ_LOG2));
        self.smmu.write(reg::CR2, cr2::RECINVSID | cr2::PTM);
        let irqs = irq_ctrl::EVENTQ | irq_ctrl::GERROR | irq_ctrl::PRIQ;
        self.smmu.write(reg::IRQ_CTRL, irqs);
        let enables = cr0::CMDQEN | cr0::EVENTQEN | cr0::PRIQEN | cr0::SMMUEN;
        self.smmu.write(reg::CR0, enables);
    }

    pub fn write64(&self, offset: u64, value: u64) {
        self.smmu.write(offset, value as u32);
        self.smmu.write(offset + 4, (value >> 32) as u32);
    }

    pub fn put(&self, address: u64, value: u64) {
        self.ram
            .write_obj(value.to_le(), GuestAddress(address))
            .unwrap();
    }

    pub fn get(&self, address: u64) -> u64 {
        u64::from_le(self.ram.read_obj(GuestAddress(address)).unwrap())
    }

    pub fn put_words(&self, address: u64, words: &impl Raw) {
        for (index, word) in words.words().iter().enumerate() {
            self.put(address + 8 * index as u64, *word);
        }
    }

    /// The structure at `address`.
    pub fn raw<T: Raw>(&self, address: u64) -> T {
        super::super::queue::read_raw(&self.ram, Gpa(address)).unwrap()
    }

    /// Allocates zeroed memory, aligned to its size.
    pub fn alloc(&self, bytes: u64) -> u64 {
        let start = self.page.get().next_multiple_of(bytes.next_power_of_two());
        self.page.set(start + bytes);
        assert!(start + bytes <= RAM + RAM_SIZE as u64);
        start
    }

    pub fn root(&self, granule: Granule, input_bits: u32) -> Root {
        let stride = granule.bits() - 3;
        let level = 4 - (input_bits - granule.bits()).div_ceil(stride);
        self.root_at(granule, input_bits, level)
    }

    /// A table whose walk starts at `level`, concatenated if `input_bits` needs
    /// it.
    pub fn root_at(&self, granule: Granule, input_bits: u32, level: u32) -> Root {
        let entries = 1 << (input_bits - granule.shift(level));
        Root {
            granule,
            base: self.alloc((entries * 8_u64).max(64)),
            input_bits,
            level,
        }
    }

    /// Address of the descriptor for `input` at `level`. Adds missing tables.
    pub fn descriptor(&self, root: &Root, input: u64, level: u32) -> u64 {
        let granule = root.granule;
        let mut base = root.base;
        let mut at = root.level;
        loop {
            let bits = if at == root.level {
                root.input_bits - granule.shift(at)
            } else {
                granule.bits() - 3
            };
            let place = base + 8 * (input >> granule.shift(at) & ((1 << bits) - 1));
            if at == level {
                return place;
            }
            let mut next = self.get(place);
            if next & 3 != 3 {
                next = self.alloc(1 << granule.bits()) | 3;
                self.put(place, next);
            }
            base = next & !((1 << granule.bits()) - 1) & 0xffff_ffff_ffff;
            at += 1;
        }
    }

    /// Maps the page or block at `input` to `output`.
    pub fn map(&self, root: &Root, input: u64, output: u64, level: u32, attributes: u64) {
        let place = self.descriptor(root, input, level);
        let page = if level == 3 { 2 } else { 0 };
        self.put(place, output | attributes | page);
    }

    pub fn unmap(&self, root: &Root, input: u64, level: u32) {
        let place = self.descriptor(root, input, level);
        self.put(place, 0);
    }

    pub fn set_ste(&self, stream: StreamId, words: &RawSte) {
        self.put_words(STRTAB + 64 * u64::from(stream.0), words);
    }

    /// Configures a stream with a new stage 1 table: 4 KiB granule, 39 bits.
    pub fn stage1(&self, stream: StreamId, asid: u64) -> Root {
        let root = self.root(Granule::K4, 39);
        let context = self.alloc(64);
        self.put_words(context, &cd_words(Granule::K4, 25, root.base, asid));
        self.set_ste(stream, &ste_stage1(context));
        root
    }

    /// Writes commands to the queue and advances CMDQ_PROD.
    pub fn issue(&self, commands: &[RawCommand]) {
        let mask = (2 << CMDQ_LOG2) - 1;
        let mut prod = self.smmu.read(reg::CMDQ_PROD);
        for words in commands {
            let index = prod & (mask >> 1);
            self.put_words(CMDQ + 16 * u64::from(index), words);
            prod = prod.wrapping_add(1) & mask;
        }
        self.smmu.write(reg::CMDQ_PROD, prod);
    }

    /// Address of the command at `index`.
    pub fn command_address(&self, index: u32) -> u64 {
        CMDQ + 16 * u64::from(index)
    }

    /// Issues commands and a CMD_SYNC, and checks that all were consumed.
    pub fn complete(&self, commands: &[RawCommand]) {
        self.issue(commands);
        self.issue(&[sync()]);
        let prod = self.smmu.read(reg::CMDQ_PROD);
        assert_eq!(self.smmu.read(reg::CMDQ_CONS), prod, "queue stopped");
    }

    pub fn cfgi_ste(&self, stream: StreamId) {
        let sid = (cmd::SID, u64::from(stream.0));
        self.complete(&[command(cmd::op::CFGI_STE, &[sid])]);
    }

    /// Consumes the events since the last call and acknowledges an overflow.
    pub fn events(&self) -> Vec<Seen> {
        let mask = (2 << EVENTQ_LOG2) - 1;
        let prod = self.smmu.read(reg::PAGE_1 + reg::EVENTQ_PROD);
        let mut cons = self.events.get();
        let mut seen = Vec::new();
        while cons != prod & mask {
            let index = u64::from(cons & (mask >> 1));
            seen.push(Seen(self.raw(EVENTQ + 32 * index)));
            cons = (cons + 1) & mask;
        }
        self.events.set(cons);
        let ack = cons | prod & 1 << 31;
        self.smmu.write(reg::PAGE_1 + reg::EVENTQ_CONS, ack);
        seen
    }

    /// Consumes the events since the last call; returns their numbers.
    pub fn event_numbers(&self) -> Vec<u64> {
        self.events().iter().map(Seen::number).collect()
    }

    pub fn pri_record(&self, index: u64) -> RawPageRequest {
        self.raw(PRIQ + 16 * index)
    }

    pub fn read(&self, stream: StreamId, iova: u64) -> Result<Mapping, Fault> {
        self.access(stream, iova, Access::Read)
    }

    pub fn access(&self, stream: StreamId, iova: u64, access: Access) -> Result<Mapping, Fault> {
        let request = Request::untranslated(stream, Iova(iova), access);
        self.smmu.translate(&request)
    }

    /// Translates a read of `iova`; `None` for a fault.
    pub fn gpa(&self, stream: StreamId, iova: u64) -> Option<u64> {
        let mapping = self.read(stream, iova).ok()?;
        Some(mapping.gpa_of(Iova(iova)).unwrap().0)
    }

    /// Connects a stream and registers a notifier.
    pub fn listen(&self, stream: StreamId, wanted: &[NotifierEvents]) -> (AddressSpace, Arc<Sink>) {
        let region = IommuRegion::new(self.smmu.clone(), stream);
        let sink = Arc::new(Sink::default());
        region.register(IommuNotifier {
            acceptable: wanted.to_vec(),
            range: IovaRange::ALL,
            sink: sink.clone(),
        });
        (AddressSpace::translated(region, self.ram.clone()), sink)
    }
}
