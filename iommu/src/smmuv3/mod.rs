//! An SMMUv3.2 as a model (IHI 0070): non-secure streams, stage 1, stage 2 and
//! both, VMSAv8-64 tables.
//!
//! * `config` has the offered features, `spec` the layouts;
//! * `registers`, `command_queue`, `event_queue` (with the stalled transactions),
//!   `pri_queue`, `caches` and `streams` each own a part of the state, and
//!   `state` holds them under one lock;
//! * `command` decodes, `ste`, `cd`, `descriptor` and `walk` are the steps of a translation,
//!   none of them with state, and `translate` puts the steps in order;
//! * `address` has the addresses of each stage, which are types of their own in a walk;
//! * `tlb` has the translations and the scope of an invalidation, `stream_tlb` the
//!   latest answers of each stream;
//! * `inspect` lists configuration and mappings for the API.
//!
//! # How an invalidation becomes complete
//! A command changes the caches under the state lock, and records the streams
//! that may hold the dropped entries. Before the CMD_SYNC after it is consumed
//! (or at the end of the queue) the state is unlocked and each of those streams
//! is notified: [`StreamSink::invalidate`] waits for accesses under the old
//! translation. A walk and the insertion of its result into the TLB happen
//! under one hold of the state lock, so none that began before an invalidation
//! ends after it.

mod address;
mod caches;
mod cd;
mod command;
mod command_queue;
mod config;
mod descriptor;
mod event;
mod event_queue;
mod inspect;
mod pri_queue;
mod queue;
mod registers;
mod spec;
mod state;
mod ste;
mod stream_tlb;
mod streams;
mod tlb;
mod translate;
mod walk;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, Weak};

use serde::{Deserialize, Serialize};
use vm_memory::Bytes as _;

pub use self::command::{CommandKind, PageResponse, Resume};
pub use self::config::{AddressSize, SmmuConfig, Stages};
pub use self::event::EventKind;
pub use self::event_queue::Stalled;
pub use self::inspect::{StreamMode, StreamState};
pub use self::pri_queue::PageRequest;
use self::pri_queue::PageRequestOutcome;
pub use self::registers::SmmuLine;
use self::registers::{InterruptRequest, Registers, in_page_0};
use self::spec::{cr0, gerror, reg};
use self::state::{State, Step};
use self::stream_tlb::StreamTlbs;
use self::streams::PendingInvalidations;
use self::translate::TranslationContext;
use crate::addr::{Gpa, Iova, IovaRange, StreamId};
use crate::lock::{RankedGuard, RankedMutex};
use crate::mapping::Mapping;
use crate::notifier::{NotifierEvents, Refused, StreamSink};
use crate::ram::GuestRam;
use crate::translate::{Fault, Iommu, Request};

/// Receives the model's interrupts and responses. Called without the state
/// lock except where a method says so, perhaps with a stream's gate held shared:
/// it must neither translate nor call the model.
pub trait SmmuWires: Send + Sync {
    /// An edge on a wired interrupt.
    fn pulse(&self, line: SmmuLine);

    /// Writes a message-signalled interrupt to an address that is not RAM;
    /// `false` when the address is no doorbell.
    fn message(&self, address: Gpa, data: u32) -> bool;

    /// The guest answered a page request group.
    fn page_response(
        &self,
        _stream: StreamId,
        _substream: Option<u32>,
        _group: u16,
        _response: PageResponse,
    ) {
    }

    /// The guest resumed a stalled transaction: the device repeats it, or
    /// receives an abort.
    fn resumed(&self, _transaction: &Stalled, _action: Resume) {}

    /// Whether to leave the rest of the command queue until
    /// [`Smmu::resume`]. Called before each command with the state lock held, so
    /// it takes no lock with a rank.
    fn interrupts(&self) -> bool {
        false
    }
}

/// Statistics of the model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SmmuStats {
    /// Commands that were consumed, by kind.
    pub commands: BTreeMap<CommandKind, u64>,
    /// Translations that hit the TLB.
    pub tlb_hits: u64,
    /// Translations that missed the TLB.
    pub tlb_misses: u64,
    /// Entries that the TLB has now.
    pub tlb_entries: usize,
    /// Event records that were written, by kind.
    pub events: BTreeMap<EventKind, u64>,
    /// Events that were not recorded: the queue was full, disabled or not in
    /// RAM.
    pub events_dropped: u64,
}

/// State of a snapshot: registers, stalls and ATS enable bits, no caches.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmmuState {
    registers: Registers,
    stalled: BTreeMap<u16, Stalled>,
    ats_enabled: Vec<StreamId>,
}

type StateGuard<'a> = RankedGuard<MutexGuard<'a, State>>;

/// The model of an SMMUv3; `Sync`, with a command lock and a state lock.
pub struct Smmu {
    config: SmmuConfig,
    ram: Arc<GuestRam>,
    wires: Arc<dyn SmmuWires>,
    /// The command lock.
    pending: RankedMutex<PendingInvalidations, 4>,
    state: RankedMutex<State, 9>,
    tlbs: Arc<StreamTlbs>,
}

impl Smmu {
    /// An SMMU after reset: every stream bypasses it.
    #[must_use]
    pub fn new(config: SmmuConfig, ram: Arc<GuestRam>, wires: Arc<dyn SmmuWires>) -> Self {
        let tlbs = Arc::new(StreamTlbs::default());
        Self {
            config,
            ram,
            wires,
            pending: RankedMutex::default(),
            state: RankedMutex::new(State::new(config, Arc::clone(&tlbs))),
            tlbs,
        }
    }

    /// Features that the model offers.
    #[must_use]
    pub const fn config(&self) -> &SmmuConfig {
        &self.config
    }

    /// Reads the 32-bit word at `offset` from the start of page 0 (§6.2).
    /// Reserved words read as zero.
    #[must_use]
    pub fn read(&self, offset: u64) -> u32 {
        self.state.lock().registers.read(offset)
    }

    /// Reads the 64 bits at `offset`, a multiple of 8: a 64-bit register
    /// atomically, or two adjacent 32-bit ones (§6.2).
    #[must_use]
    pub fn read64(&self, offset: u64) -> u64 {
        let state = self.state.lock();
        let word = |offset| u64::from(state.registers.read(offset));
        word(offset) | word(offset.saturating_add(4)) << 32
    }

    /// Writes the 64 bits at `offset`, a multiple of 8: a 64-bit register
    /// atomically, or two adjacent 32-bit ones in ascending order (§6.2).
    pub fn write64(&self, offset: u64, value: u64) {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        let low = u32::from_le_bytes([a, b, c, d]);
        let high = u32::from_le_bytes([e, f, g, h]);
        if registers::is_64_bit(offset) {
            let mut state = self.state.lock();
            state.registers.write(offset, low);
            state.registers.write(offset + 4, high);
        } else {
            self.write(offset, low);
            self.write(offset.saturating_add(4), high);
        }
    }

    /// Writes the 32-bit word at `offset`. When it returns, the effects of the
    /// write are complete: commands are executed up to CMDQ_PROD, an error, or
    /// [`SmmuWires::interrupts`].
    pub fn write(&self, offset: u64, value: u32) {
        match in_page_0(offset) {
            reg::CR0 => self.write_cr0(value),
            reg::GBPA => self.write_gbpa(value),
            reg::IRQ_CTRL => self.state.lock().registers.write_irq_ctrl(value),
            reg::GERRORN => self.write_gerrorn(value),
            reg::CMDQ_PROD => self.write_cmdq_prod(value),
            register @ (reg::EVENTQ_CONS | reg::PRIQ_CONS) => {
                self.state.lock().registers.write(register, value);
                self.retry_unrecorded();
            }
            register => self.state.lock().registers.write(register, value),
        }
    }

    /// Acknowledges CR0 when every stream was notified (§6.3.9, §6.3.10).
    fn write_cr0(&self, value: u32) {
        let mut pending = self.pending.lock();
        let ended = self.state.lock().write_cr0(value, &mut pending);
        self.deliver(&mut pending);
        for stalled in &ended {
            self.wires.resumed(stalled, Resume::Terminate);
        }
        self.state.lock().registers.acknowledge_cr0();
        self.retry_unrecorded();
        self.drain(&mut pending);
    }

    fn write_gbpa(&self, value: u32) {
        let mut pending = self.pending.lock();
        self.state.lock().write_gbpa(value, &mut pending);
        self.deliver(&mut pending);
    }

    /// Acknowledges errors; the command queue continues (§7.5).
    fn write_gerrorn(&self, value: u32) {
        let mut pending = self.pending.lock();
        self.state.lock().registers.write(reg::GERRORN, value);
        self.retry_unrecorded();
        self.drain(&mut pending);
    }

    fn write_cmdq_prod(&self, value: u32) {
        let mut pending = self.pending.lock();
        let mut state = self.state.lock();
        state.registers.write(reg::CMDQ_PROD, value);
        self.drain_from(state, &mut pending);
    }

    /// Retries stalled transactions that have no record yet.
    fn retry_unrecorded(&self) {
        let ended = self.with(|state| state.retry_unrecorded(&self.ram));
        for (stalled, action) in &ended {
            self.wires.resumed(stalled, *action);
        }
    }

    /// Continues the command queue at CMDQ_CONS, after
    /// [`SmmuWires::interrupts`] stopped it.
    pub fn resume(&self) {
        self.drain(&mut self.pending.lock());
    }

    /// Whether CR0.SMMUEN is set.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.state.lock().registers.enabled(cr0::SMMUEN)
    }

    /// Returns to the state after reset. Clears the ATS enable bit of every
    /// function.
    pub fn reset(&self) {
        let mut pending = self.pending.lock();
        self.state.lock().reset(&mut pending);
        self.deliver(&mut pending);
    }

    /// The guest set or cleared the enable bit in a function's ATS capability
    /// (PCIe 6.0 §10.5.1.3). Called without the stream's gate.
    pub fn set_ats_enabled(&self, stream: StreamId, enabled: bool) {
        let mut pending = self.pending.lock();
        let changed = self.state.lock().streams.set_ats_enabled(stream, enabled);
        if changed {
            // Pending invalidations are delivered under the registration
            // that they were recorded for.
            self.deliver(&mut pending);
            self.renegotiate(stream);
        }
    }

    /// Queues a function's page request (§8). Returns the SMMU's automatic
    /// response when the request cannot be queued and is the last of its group;
    /// `None` when the guest responds, or nothing does.
    pub fn page_request(&self, request: &PageRequest) -> Option<PageResponse> {
        let outcome = self.with(|state| state.pri.push(&mut state.registers, &self.ram, request));
        match outcome {
            PageRequestOutcome::Discarded if request.last => Some(PageResponse::Success),
            PageRequestOutcome::Unavailable if request.last => Some(PageResponse::Failure),
            _ => None,
        }
    }

    /// Statistics since the model was created.
    #[must_use]
    pub fn stats(&self) -> SmmuStats {
        let state = self.state.lock();
        let (hits, tlb_misses) = state.caches.counts();
        SmmuStats {
            commands: state.commands.consumed().clone(),
            tlb_hits: hits + self.tlbs.hits(),
            tlb_misses,
            tlb_entries: state.caches.entries(),
            events: state.events.written().clone(),
            events_dropped: state.events.dropped(),
        }
    }

    /// Faults of a stream since the model was created, by kind, recorded or
    /// not.
    #[must_use]
    pub fn faults(&self, stream: StreamId) -> BTreeMap<EventKind, u64> {
        self.state.lock().streams.faults(stream)
    }

    /// Configuration of a connected stream; `None` for others.
    #[must_use]
    pub fn stream_state(&self, stream: StreamId) -> Option<StreamState> {
        self.state.lock().translator(&self.ram).stream_state(stream)
    }

    /// Up to `limit` mappings of a stream from `from` on, in order, and the
    /// address to continue from if there may be more. One call takes a bounded
    /// number of steps: in tables with many gaps it may return fewer mappings
    /// than `limit`, or none, and an address to continue from. A mapping is the
    /// result of [`translate`](Iommu::translate) for reading or, where that is
    /// not permitted, for writing.
    #[must_use]
    pub fn mappings(
        &self,
        stream: StreamId,
        from: Iova,
        limit: usize,
    ) -> (Vec<Mapping>, Option<Iova>) {
        let view = self.state.lock().translator(&self.ram).view(stream);
        inspect::mappings(&self.ram, &view, from, limit)
    }

    /// State for a snapshot. The machine is paused.
    #[must_use]
    pub fn save(&self) -> SmmuState {
        let state = self.state.lock();
        SmmuState {
            registers: state.registers.clone(),
            stalled: state.events.stalled().clone(),
            ats_enabled: state.streams.all_ats_enabled(),
        }
    }

    /// Replaces the state with the snapshot of an SMMU of the same
    /// configuration. Every stream is connected and the machine is paused.
    pub fn restore(&self, saved: &SmmuState) {
        let mut pending = self.pending.lock();
        let (registers, stalled) = (saved.registers.clone(), saved.stalled.clone());
        self.state
            .lock()
            .replace(registers, stalled, &saved.ats_enabled, &mut pending);
        self.deliver(&mut pending);
    }

    /// Executes the commands in the queue.
    fn drain(&self, pending: &mut PendingInvalidations) {
        self.drain_from(self.state.lock(), pending);
    }

    /// Executes the commands in the queue: at most as many as it has at the
    /// start, so that a hostile index costs at most one queue of commands. The
    /// state is unlocked only where a command needs that.
    fn drain_from<'a>(&'a self, mut state: StateGuard<'a>, pending: &mut PendingInvalidations) {
        let mut left = state.commands.waiting(&state.registers);
        loop {
            let step = state.run(&self.ram, || self.wires.interrupts(), &mut left, pending);
            self.unlock(state);
            match step {
                Step::Idle => break,
                Step::Pause if pending.is_full() => self.deliver(pending),
                Step::Pause => {}
                Step::Respond {
                    stream,
                    substream,
                    group,
                    response,
                } => self.wires.page_response(stream, substream, group, response),
                Step::Resumed(ref transactions, action) => {
                    for transaction in transactions {
                        self.wires.resumed(transaction, action);
                    }
                }
                Step::Sync(_) => self.deliver(pending),
            }
            state = self.state.lock();
            if let Step::Sync(signal) = step {
                state.complete_sync(signal);
            }
        }
        self.deliver(pending);
    }

    /// Delivers the pending invalidations. Only the command lock is held.
    fn deliver(&self, pending: &mut PendingInvalidations) {
        for (stream, invalidations) in pending.take() {
            let Some(sink) = invalidations.sink.and_then(|sink| sink.upgrade()) else {
                continue;
            };
            if invalidations.configuration {
                sink.invalidate_all();
                self.renegotiate(stream);
                continue;
            }
            sink.invalidate(&invalidations.ranges);
            sink.invalidate_device_iotlb(&invalidations.device);
        }
    }

    fn sink(&self, stream: StreamId) -> Option<Arc<dyn StreamSink>> {
        self.state.lock().streams.sink(stream)
    }

    /// Negotiates a stream's registrations again if the events that it can
    /// deliver changed since the last negotiation.
    fn renegotiate(&self, stream: StreamId) {
        let changed = {
            let mut state = self.state.lock();
            let available = state.translator(&self.ram).device_iotlb(stream).is_ok();
            state.streams.set_device_iotlb(stream, available)
        };
        if changed && let Some(sink) = self.sink(stream) {
            sink.renegotiate();
        }
    }

    /// Sends an interrupt; a message that cannot be delivered is a global
    /// error.
    fn send(&self, interrupt: InterruptRequest) {
        let wired = interrupt.message.is_none() || interrupt.line == SmmuLine::CmdSync;
        if let Some((address, data)) = interrupt.message {
            let written = self
                .ram
                .store(data.to_le(), address.into(), Ordering::Release);
            if written.is_err() && !self.wires.message(address, data) {
                let bit = match interrupt.line {
                    SmmuLine::Eventq => gerror::MSI_EVENTQ_ABT,
                    SmmuLine::Priq => gerror::MSI_PRIQ_ABT,
                    SmmuLine::CmdSync => gerror::MSI_CMDQ_ABT,
                    SmmuLine::Gerror => gerror::MSI_GERROR_ABT,
                };
                self.with(|state| state.registers.global_error(bit));
            }
        }
        if wired {
            self.wires.pulse(interrupt.line);
        }
    }

    /// Runs `work` under the state lock, and sends the requested interrupts
    /// after unlocking.
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.state.lock();
        let outcome = work(&mut state);
        self.unlock(state);
        outcome
    }

    /// Unlocks the state and sends the interrupts that were requested under the
    /// lock.
    fn unlock(&self, mut state: StateGuard<'_>) {
        let interrupts = state.registers.take_interrupts();
        drop(state);
        for interrupt in interrupts {
            self.send(interrupt);
        }
    }
}

impl Iommu for Smmu {
    fn translate(&self, request: &Request) -> Result<Mapping, Fault> {
        if let Some(answer) = self.tlbs.find(request, true) {
            return Ok(answer);
        }
        self.with(|state| {
            let context = TranslationContext {
                request,
                update: true,
            };
            state
                .translator(&self.ram)
                .resolve(context)
                .map_err(|failure| {
                    state.fail(&self.ram, request, &failure);
                    Fault::new(request, failure.reason)
                })
        })
    }

    fn lookup(&self, request: &Request) -> Result<Mapping, Fault> {
        if let Some(answer) = self.tlbs.find(request, false) {
            return Ok(answer);
        }
        let context = TranslationContext {
            request,
            update: false,
        };
        let outcome = self.state.lock().translator(&self.ram).resolve(context);
        outcome.map_err(|failure| Fault::new(request, failure.reason))
    }

    fn notifier_events_changed(
        &self,
        stream: StreamId,
        _old: NotifierEvents,
        new: NotifierEvents,
    ) -> Result<(), Refused> {
        if new.contains(NotifierEvents::MAP) {
            return Err(Refused {
                events: NotifierEvents::MAP,
                reason: "an SMMUv3 does not see what the guest maps",
            });
        }
        if !new.contains(NotifierEvents::DEVIOTLB_UNMAP) {
            return Ok(());
        }
        // All registrations of a stream are negotiated alike: by its state at
        // the last invalidation of its configuration.
        let mut state = self.state.lock();
        if state.streams.device_iotlb(stream) {
            return Ok(());
        }
        let reason = state.translator(&self.ram).device_iotlb(stream).err();
        Err(Refused {
            events: NotifierEvents::DEVIOTLB_UNMAP,
            reason: reason.unwrap_or("STE.EATS does not allow ATS"),
        })
    }

    /// Never called: `MAP` is always refused.
    fn replay(
        &self,
        _stream: StreamId,
        _range: IovaRange,
        _visit: &mut dyn FnMut(&Mapping) -> std::ops::ControlFlow<()>,
    ) {
    }

    fn connect(&self, stream: StreamId, sink: Weak<dyn StreamSink>) {
        self.state.lock().streams.connect(stream, sink);
    }
}

#[cfg(test)]
mod tests;
