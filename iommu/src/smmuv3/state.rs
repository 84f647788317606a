//! What the model knows, under one lock: registers, caches, streams, stalled
//! transactions, and the queues that it writes.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Weak;

use serde::{Deserialize, Serialize};

use super::SmmuConfig;
use super::cd::Cd;
use super::commands::CommandKind;
use super::events::{Event, EventKind};
use super::queues::{CMDQ, EVENTQ, PRIQ, Queue, QueueRegisters, Unwritten};
use super::registers::{Registers, STALL_MAX};
use super::spec::{Cerror, MSI_ADDRESS, cr0, event, gerror, irq_ctrl, pri, queue, reg};
use super::ste::Ste;
use super::tlb::{Held, Tag, Tlb};
use crate::{Access, GuestRam, Iova, Request, StreamId, StreamSink};

/// Most cached STEs, and CDs. When there are more all are forgotten.
const MAX_CACHED: usize = 1024;
/// Most tags of translations remembered for a stream. Beyond it every
/// invalidation reaches the stream.
const MAX_HELD: usize = 64;

/// The SMMU's interrupts (§3.18).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SmmuLine {
    /// The event queue is not empty.
    Eventq,
    /// The PRI queue is not empty.
    Priq,
    /// A CMD_SYNC completed.
    CmdSync,
    /// A global error.
    Gerror,
}

/// An interrupt that is due, once the state is unlocked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Notice {
    pub(super) line: SmmuLine,
    /// Address and data of a message, in place of or (CMD_SYNC) beside the
    /// wire.
    pub(super) message: Option<(u64, u32)>,
}

/// A page request of a function (§8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// Who asks.
    pub stream: StreamId,
    /// With which SubstreamID.
    pub substream: Option<u32>,
    /// The page, of which the low 12 bits are ignored.
    pub iova: Iova,
    /// Whether it shall be readable.
    pub read: bool,
    /// Whether it shall be writable.
    pub write: bool,
    /// Last of its group.
    pub last: bool,
    /// Its group, 9 bits.
    pub group: u16,
}

/// A transaction that waits for CMD_RESUME (§3.12.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stalled {
    /// Whose.
    pub stream: StreamId,
    /// With which SubstreamID.
    pub substream: Option<u32>,
    /// Where.
    pub iova: Iova,
    /// What it wanted to do.
    pub access: Access,
    /// Its event record is in the queue. One without is tried again when the
    /// queue becomes writable (§3.12.2).
    pub(super) recorded: bool,
}

/// Why an event record is not in the queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum EventUnwritten {
    /// The queue is enabled and full.
    Full,
    /// The queue is disabled, or its memory is not RAM.
    Disabled,
}

/// What the model knows of a connected stream.
#[derive(Default)]
pub(super) struct Stream {
    pub(super) sink: Option<Weak<dyn StreamSink>>,
    /// What its consumers may hold, since everything was last invalidated.
    pub(super) held: BTreeMap<Tag, Held>,
    /// More than could be remembered.
    pub(super) held_more: bool,
    /// It asked with a SubstreamID.
    pub(super) substreams: bool,
    /// ATS is enabled in the function's capability.
    pub(super) ats_enabled: bool,
    /// What was last answered to notifiers that ask for `DEVIOTLB_UNMAP`.
    pub(super) device_iotlb: bool,
    pub(super) faults: BTreeMap<EventKind, u64>,
}

impl Stream {
    pub(super) fn hold(&mut self, tag: Tag, held: Held) {
        let known = self.held.len();
        match self.held.entry(tag) {
            std::collections::btree_map::Entry::Occupied(mut entry) => {
                let both = entry.get().and(held);
                entry.insert(both);
            }
            std::collections::btree_map::Entry::Vacant(entry) if known < MAX_HELD => {
                entry.insert(held);
            }
            std::collections::btree_map::Entry::Vacant(_) => self.held_more = true,
        }
    }

    /// Everything was, or is about to be, invalidated.
    pub(super) fn forget(&mut self) {
        self.held.clear();
        self.held_more = false;
        self.substreams = false;
    }
}

/// What happened, for the API.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SmmuStats {
    /// Commands that were consumed, by kind.
    pub commands: BTreeMap<CommandKind, u64>,
    /// Translations that the TLB answered.
    pub tlb_hits: u64,
    /// Translations that walked tables.
    pub tlb_misses: u64,
    /// Entries in the TLB now.
    pub tlb_entries: usize,
    /// Event records that were written, by kind.
    pub events: BTreeMap<EventKind, u64>,
    /// Events that found the queue full, disabled or unreachable.
    pub events_dropped: u64,
}

pub(super) struct State {
    pub(super) config: SmmuConfig,
    pub(super) registers: Registers,
    pub(super) stes: BTreeMap<StreamId, Ste>,
    pub(super) cds: BTreeMap<(StreamId, u32), Cd>,
    pub(super) tlb: Tlb,
    pub(super) streams: BTreeMap<StreamId, Stream>,
    pub(super) stalled: BTreeMap<u16, Stalled>,
    pub(super) free_stags: VecDeque<u16>,
    pub(super) stats: SmmuStats,
    pub(super) notices: Vec<Notice>,
}

impl State {
    pub(super) fn new(config: SmmuConfig) -> Self {
        Self {
            registers: Registers::new(&config),
            config,
            stes: BTreeMap::new(),
            cds: BTreeMap::new(),
            tlb: Tlb::default(),
            streams: BTreeMap::new(),
            stalled: BTreeMap::new(),
            free_stags: all_stags().collect(),
            stats: SmmuStats::default(),
            notices: Vec::new(),
        }
    }

    /// Forgets what was cached and who was stalled.
    pub(super) fn clear(&mut self) {
        self.forget_streams(StreamId(0), StreamId(u32::MAX));
        self.tlb = Tlb::default();
        self.stalled.clear();
        self.free_stags = all_stags().collect();
    }

    /// Takes over stalled transactions from a snapshot.
    pub(super) fn restore_stalled(&mut self, stalled: BTreeMap<u16, Stalled>) {
        self.free_stags = all_stags()
            .filter(|stag| !stalled.contains_key(stag))
            .collect();
        self.stalled = stalled;
    }

    /// Drops cached STEs and CDs of the streams from `first` to `last`.
    pub(super) fn forget_streams(&mut self, first: StreamId, last: StreamId) {
        self.stes
            .retain(|stream, _| !(first..=last).contains(stream));
        self.cds
            .retain(|(stream, _), _| !(first..=last).contains(stream));
    }

    pub(super) fn cache_ste(&mut self, stream: StreamId, ste: Ste) {
        if self.stes.len() >= MAX_CACHED {
            self.stes.clear();
        }
        self.stes.insert(stream, ste);
    }

    pub(super) fn cache_cd(&mut self, key: (StreamId, u32), cd: Cd) {
        if self.cds.len() >= MAX_CACHED {
            self.cds.clear();
        }
        self.cds.insert(key, cd);
    }

    fn queue(&self, of: &QueueRegisters) -> Queue {
        Queue::new(&self.registers, of, self.config.address_bits())
    }

    pub(super) fn command_queue(&self) -> Queue {
        self.queue(&CMDQ)
    }

    /// Activates a global error (§7.5), unless it is active.
    pub(super) fn global_error(&mut self, bit: u32) {
        if self.registers.error_active(bit) {
            return;
        }
        let value = self.registers.get(reg::GERROR) ^ bit;
        self.registers.set(reg::GERROR, value);
        if bit != gerror::MSI_GERROR_ABT {
            self.interrupt(SmmuLine::Gerror);
        }
    }

    /// Stops the command queue at the command it is at (§7.1).
    pub(super) fn command_error(&mut self, error: Cerror) {
        let cons = self.registers.get(reg::CMDQ_CONS) & !queue::ERR_MASK;
        let cons = cons | u32::from(error as u8) << queue::ERR;
        self.registers.set(reg::CMDQ_CONS, cons);
        self.global_error(gerror::CMDQ);
    }

    /// Makes an interrupt due, as IRQ_CTRL and the IRQ_CFG registers say.
    fn interrupt(&mut self, line: SmmuLine) {
        let (enable, base) = match line {
            SmmuLine::Eventq => (irq_ctrl::EVENTQ, reg::EVENTQ_IRQ_CFG0),
            SmmuLine::Priq => (irq_ctrl::PRIQ, reg::PRIQ_IRQ_CFG0),
            SmmuLine::Gerror => (irq_ctrl::GERROR, reg::GERROR_IRQ_CFG0),
            SmmuLine::CmdSync => return,
        };
        if self.registers.get(reg::IRQ_CTRL) & enable == 0 {
            return;
        }
        let address = self.registers.get64(base) & MSI_ADDRESS;
        let data = self.registers.get(base + 8);
        let notice = Notice {
            line,
            message: (address != 0).then_some((address, data)),
        };
        if !self.notices.contains(&notice) {
            self.notices.push(notice);
        }
    }

    /// Whether the event queue takes records apart from being full (§7.2.1).
    fn events_enabled(&self) -> bool {
        self.registers.enabled(cr0::EVENTQEN) && !self.registers.error_active(gerror::EVENTQ_ABT)
    }

    /// Whether an event record can be written now (§7.2.1).
    pub(super) fn events_writable(&self) -> bool {
        let index = |register| self.registers.get(register);
        let full = self
            .queue(&EVENTQ)
            .is_full(index(EVENTQ.prod), index(EVENTQ.cons));
        self.events_enabled() && !full
    }

    /// Writes an event record. What becomes of one that is not written is the
    /// caller's: a record of a terminated transaction is lost, that of a stall
    /// is not.
    ///
    /// # Errors
    /// [`EventUnwritten`].
    pub(super) fn push_event(
        &mut self,
        ram: &GuestRam,
        record: &[u64; event::WORDS],
    ) -> Result<(), EventUnwritten> {
        if !self.events_enabled() {
            return Err(EventUnwritten::Disabled);
        }
        match self.produce(ram, &EVENTQ, record) {
            Ok(()) => {
                // An interrupt for each record, not only for the first one in
                // an empty queue: a driver that was about to leave sees it.
                self.interrupt(SmmuLine::Eventq);
                Ok(())
            }
            Err(Unwritten::Full) => Err(EventUnwritten::Full),
            Err(Unwritten::Abort) => {
                self.global_error(gerror::EVENTQ_ABT);
                Err(EventUnwritten::Disabled)
            }
        }
    }

    fn produce<const N: usize>(
        &mut self,
        ram: &GuestRam,
        of: &QueueRegisters,
        record: &[u64; N],
    ) -> Result<(), Unwritten> {
        let queue = self.queue(of);
        let index = self.registers.get(of.prod);
        queue.write(ram, (index, self.registers.get(of.cons)), record)?;
        self.registers.set(of.prod, queue.next(index));
        Ok(())
    }

    /// Whether an overflow is not acknowledged (§7.4, §8.1).
    fn overflowing(&self, of: &QueueRegisters) -> bool {
        (self.registers.get(of.prod) ^ self.registers.get(of.cons)) & queue::OVERFLOW != 0
    }

    /// A record was discarded because the queue is full.
    fn overflow(&mut self, of: &QueueRegisters) {
        if !self.overflowing(of) {
            let prod = self.registers.get(of.prod) ^ queue::OVERFLOW;
            self.registers.set(of.prod, prod);
        }
    }

    /// Records an event of a terminated transaction, or drops it. Only a full
    /// queue makes an overflow of that (§7.4).
    pub(super) fn record(&mut self, ram: &GuestRam, event: &Event, request: &Request) {
        match self.push_event(ram, &event.record(request, None)) {
            Ok(()) => self.count_event(event.kind),
            Err(unwritten) => {
                self.stats.events_dropped += 1;
                if unwritten == EventUnwritten::Full {
                    self.overflow(&EVENTQ);
                }
            }
        }
    }

    pub(super) fn count_event(&mut self, kind: EventKind) {
        *self.stats.events.entry(kind).or_default() += 1;
    }

    /// Queues a page request (§8.1). `false` when it was discarded because the
    /// queue overflows, `None` because there is no queue.
    pub(super) fn page_request(&mut self, ram: &GuestRam, request: &PageRequest) -> Option<bool> {
        let enabled = self.config.pri()
            && self.registers.enabled(cr0::PRIQEN)
            && self.registers.enabled(cr0::SMMUEN)
            && !self.registers.error_active(gerror::PRIQ_ABT);
        if !enabled {
            return None;
        }
        if self.overflowing(&PRIQ) {
            return Some(false);
        }
        let mut record = [0; pri::WORDS];
        for (field, value) in [
            (pri::SID, u64::from(request.stream.0)),
            (pri::SSID, u64::from(request.substream.unwrap_or(0))),
            (pri::SSV, u64::from(request.substream.is_some())),
            (pri::READ, u64::from(request.read)),
            (pri::WRITE, u64::from(request.write)),
            (pri::LAST, u64::from(request.last)),
            (pri::PRG_INDEX, u64::from(request.group)),
            (pri::ADDRESS, request.iova.0 >> 12),
        ] {
            field.put(&mut record, value);
        }
        match self.produce(ram, &PRIQ, &record) {
            Ok(()) => {
                let last_only = self.registers.get(reg::PRIQ_IRQ_CFG2) >> 31 != 0;
                if request.last || !last_only {
                    self.interrupt(SmmuLine::Priq);
                }
                Some(true)
            }
            Err(Unwritten::Full) => {
                self.overflow(&PRIQ);
                Some(false)
            }
            Err(Unwritten::Abort) => {
                self.global_error(gerror::PRIQ_ABT);
                None
            }
        }
    }
}

fn all_stags() -> impl Iterator<Item = u16> {
    (0..u16::try_from(STALL_MAX).unwrap_or(u16::MAX)).map(|stag| stag + 1)
}
