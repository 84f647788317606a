//! An SMMUv3.2 as a model (IHI 0070): non-secure streams, stage 1, stage 2 and
//! both, VMSAv8-64 tables.
//!
//! * `spec` has the layouts, `registers` what the guest may write;
//! * `ste`, `cd` and `walk` are the steps of a translation, each without any
//!   state, and `translate` puts them in order;
//! * `commands` decodes, `execute` carries out, `tlb` says what an
//!   invalidation reaches;
//! * `events` and `queues` are how the guest hears of it, `stalls` what waits
//!   for its answer.
//!
//! # How an invalidation becomes complete
//! A command changes the caches under the state lock, and notes which streams
//! may hold what went. Before the CMD_SYNC after it is consumed (or at the end
//! of the queue) the state is unlocked and each of those streams is told:
//! [`IommuRegion::invalidate`] waits for accesses under the old translation.
//! A walk and the insertion of its result into the TLB happen under one hold
//! of the state lock, so none that began before an invalidation ends after it.

mod cd;
mod commands;
mod events;
mod execute;
mod listing;
mod queues;
mod registers;
mod spec;
mod stalls;
mod state;
mod ste;
mod tlb;
mod translate;
mod walk;

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes as _, GuestAddress};

use self::commands::Signal;
pub use self::commands::{CommandKind, PageResponse, Resume};

pub use self::events::EventKind;
use self::execute::{Pending, Step};
pub use self::listing::{StreamMode, StreamState};
use self::registers::{Registers, SUBSTREAM_BITS, in_page_0};
use self::spec::{cr0, gbpa, gerror, reg};
use self::state::{Notice, State};
pub use self::state::{PageRequest, SmmuLine, SmmuStats, Stalled};
use self::translate::Asked;
use crate::{
    Fault, FaultReason, Gpa, GuestRam, Iommu, IovaRange, Mapping, NotifierEvents, Refused, Request,
    StreamId, StreamSink,
};

/// Which stages are offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stages {
    /// Stage 1 only.
    #[default]
    One,
    /// Stage 2 only.
    Two,
    /// Both, also nested.
    Nested,
}

/// Bits of a physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressSize {
    /// 44 bits.
    Bits44,
    /// 48 bits.
    #[default]
    Bits48,
    /// 52 bits, with 64 KiB granules; virtual addresses too.
    Bits52,
}

/// What does not change while the machine runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmmuConfig {
    /// Which stages are offered.
    pub stages: Stages,
    /// ATS is offered.
    pub ats: bool,
    /// PRI is offered; needs ATS.
    pub pri: bool,
    /// Bits of a physical address.
    pub address_size: AddressSize,
}

impl SmmuConfig {
    /// Whether stage 1 is offered.
    #[must_use]
    pub const fn stage1(&self) -> bool {
        !matches!(self.stages, Stages::Two)
    }

    /// Whether stage 2 is offered.
    #[must_use]
    pub const fn stage2(&self) -> bool {
        !matches!(self.stages, Stages::One)
    }

    /// Whether the EL2 regimes are offered; they come with both stages.
    #[must_use]
    pub const fn hyp(&self) -> bool {
        matches!(self.stages, Stages::Nested)
    }

    /// Whether PRI is offered.
    #[must_use]
    pub const fn pri(&self) -> bool {
        self.ats && self.pri
    }

    /// Bits of a physical address, and of an intermediate one.
    #[must_use]
    pub const fn address_bits(&self) -> u32 {
        match self.address_size {
            AddressSize::Bits44 => 44,
            AddressSize::Bits48 => 48,
            AddressSize::Bits52 => 52,
        }
    }

    /// Bits of a SubstreamID.
    #[must_use]
    pub const fn substream_bits(&self) -> u32 {
        if self.stage1() { SUBSTREAM_BITS } else { 0 }
    }
}

/// Where the model's signals go. Called with none of its state locked, but
/// perhaps with a stream's gate held shared: it must not translate, and must
/// not call back into the model.
pub trait SmmuWires: Send + Sync {
    /// An edge on a wired interrupt.
    fn pulse(&self, line: SmmuLine);

    /// Writes a message-signalled interrupt to an address that is not RAM;
    /// `false` when nobody answers there.
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

    /// The guest resumed a stalled transaction: it is tried again, or its
    /// device gets the abort.
    fn resumed(&self, _transaction: &Stalled, _action: Resume) {}

    /// Whether to leave the rest of the command queue until
    /// [`Smmu::resume`]. Asked before each command.
    fn interrupts(&self) -> bool {
        false
    }
}

/// What a snapshot keeps. Caches are not part of it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmmuState {
    registers: Registers,
    stalled: BTreeMap<u16, Stalled>,
    ats_enabled: Vec<StreamId>,
}

/// The model.
pub struct Smmu {
    config: SmmuConfig,
    ram: Arc<GuestRam>,
    wires: Arc<dyn SmmuWires>,
    /// The command lock.
    pending: Mutex<Pending>,
    state: Mutex<State>,
}

impl Smmu {
    /// An SMMU after reset: every stream bypasses it.
    #[must_use]
    pub fn new(config: SmmuConfig, ram: Arc<GuestRam>, wires: Arc<dyn SmmuWires>) -> Self {
        Self {
            config,
            ram,
            wires,
            pending: Mutex::default(),
            state: Mutex::new(State::new(config)),
        }
    }

    /// What it offers.
    #[must_use]
    pub const fn config(&self) -> &SmmuConfig {
        &self.config
    }

    /// Reads the 32-bit word at `offset` from the start of page 0 (§6.2).
    /// What is reserved reads as zero.
    #[must_use]
    pub fn read(&self, offset: u64) -> u32 {
        self.lock().registers.read(offset)
    }

    /// Reads the 64 bits at `offset`, a multiple of 8: a 64-bit register as it is
    /// at one point in time, or two adjacent 32-bit ones (§6.2).
    #[must_use]
    pub fn read64(&self, offset: u64) -> u64 {
        let state = self.lock();
        let word = |offset| u64::from(state.registers.read(offset));
        word(offset) | word(offset.saturating_add(4)) << 32
    }

    /// Writes the 64 bits at `offset`, a multiple of 8: a 64-bit register at
    /// once, or two adjacent 32-bit ones in rising order (§6.2).
    pub fn write64(&self, offset: u64, value: u64) {
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        let low = u32::from_le_bytes([a, b, c, d]);
        let high = u32::from_le_bytes([e, f, g, h]);
        if registers::is_64_bit(offset) {
            self.with(|state| {
                state.write_plain(offset, low);
                state.write_plain(offset + 4, high);
            });
        } else {
            self.write(offset, low);
            self.write(offset.saturating_add(4), high);
        }
    }

    /// Writes a 32-bit word. When it returns, what the write set in motion is
    /// done: commands are carried out up to CMDQ_PROD, an error, or
    /// [`SmmuWires::interrupts`].
    pub fn write(&self, offset: u64, value: u32) {
        let offset = in_page_0(offset);
        match offset {
            reg::EVENTQ_CONS | reg::PRIQ_CONS => {
                self.with(|state| state.write_plain(offset, value));
                self.retry_unrecorded();
            }
            reg::CR0 | reg::GBPA | reg::GERRORN | reg::CMDQ_PROD | reg::CMDQ_CONS => {
                self.write_control(offset, value);
            }
            _ => self.with(|state| {
                state.write_plain(offset, value);
                if offset == reg::IRQ_CTRL {
                    let enabled = state.registers.get(reg::IRQ_CTRL);
                    state.registers.set(reg::IRQ_CTRLACK, enabled);
                }
            }),
        }
    }

    /// Writes that commands depend on, or that make them run.
    fn write_control(&self, offset: u64, value: u32) {
        let mut pending = self.command();
        let ended = self.with(|state| match offset {
            reg::CR0 => state.write_cr0(value, &mut pending),
            reg::GBPA => {
                state.write_gbpa(value, &mut pending);
                Vec::new()
            }
            _ => {
                state.write_plain(offset, value);
                Vec::new()
            }
        });
        self.deliver(&mut pending);
        for stalled in &ended {
            self.wires.resumed(stalled, Resume::Terminate);
        }
        self.with(|state| {
            let enabled = state.registers.get(reg::CR0);
            state.registers.set(reg::CR0ACK, enabled);
        });
        self.retry_unrecorded();
        self.drain(&mut pending);
    }

    /// Goes on with stalled transactions that have no record yet.
    fn retry_unrecorded(&self) {
        let ended = self.with(|state| state.retry_unrecorded(&self.ram));
        for (stalled, action) in &ended {
            self.wires.resumed(stalled, *action);
        }
    }

    /// Goes on with the command queue from CMDQ_CONS, where
    /// [`SmmuWires::interrupts`] made it stop.
    pub fn resume(&self) {
        self.drain(&mut self.command());
    }

    /// Whether the guest enabled translation.
    #[must_use]
    pub fn is_enabled(&self) -> bool {
        self.lock().registers.enabled(cr0::SMMUEN)
    }

    /// Back to reset, as when the machine restarts. Functions lose their ATS
    /// enable bit.
    pub fn reset(&self) {
        let mut pending = self.command();
        self.with(|state| {
            state.registers = Registers::new(&self.config);
            state.clear();
            for stream in state.streams.values_mut() {
                stream.ats_enabled = false;
            }
            state.all_reconfigured(&mut pending);
        });
        self.deliver(&mut pending);
    }

    /// The guest set or cleared the enable bit in a function's ATS capability
    /// (PCIe 6.0 §10.5.1.3). Called without the stream's gate.
    pub fn set_ats_enabled(&self, stream: StreamId, enabled: bool) {
        let mut pending = self.command();
        let changed = self.with(|state| {
            let known = state.streams.get_mut(&stream)?;
            let changed = known.ats_enabled != enabled;
            known.ats_enabled = enabled;
            Some(changed)
        });
        if changed == Some(true) {
            // What is due as a plain or device invalidation goes out under
            // the registration that it was meant for.
            self.deliver(&mut pending);
            self.renegotiate(stream);
        }
    }

    /// A function asks for a page (§8). Answers the response that the SMMU
    /// gives by itself when the request cannot be queued and is the last of
    /// its group; `None` when the answer comes from the guest, or not at all.
    pub fn page_request(&self, request: &PageRequest) -> Option<PageResponse> {
        let queued = self.with(|state| state.page_request(&self.ram, request));
        match queued {
            Some(true) => None,
            _ if !request.last => None,
            Some(false) => Some(PageResponse::Success),
            None => Some(PageResponse::Failure),
        }
    }

    /// What happened so far.
    #[must_use]
    pub fn stats(&self) -> SmmuStats {
        let state = self.lock();
        SmmuStats {
            tlb_entries: state.tlb.entries(),
            ..state.stats.clone()
        }
    }

    /// Faults of a stream so far, by kind, recorded or not.
    #[must_use]
    pub fn faults(&self, stream: StreamId) -> BTreeMap<EventKind, u64> {
        let state = self.lock();
        let known = state.streams.get(&stream);
        known
            .map(|stream| stream.faults.clone())
            .unwrap_or_default()
    }

    /// What a snapshot keeps. The machine is paused.
    #[must_use]
    pub fn save(&self) -> SmmuState {
        let state = self.lock();
        SmmuState {
            registers: state.registers.clone(),
            stalled: state.stalled.clone(),
            ats_enabled: state
                .streams
                .iter()
                .filter(|(_, stream)| stream.ats_enabled)
                .map(|(id, _)| *id)
                .collect(),
        }
    }

    /// Takes over a snapshot of an SMMU with the same configuration. Every
    /// stream is connected and the machine is paused.
    pub fn restore(&self, saved: &SmmuState) {
        let mut pending = self.command();
        self.with(|state| {
            state.clear();
            state.registers = saved.registers.clone();
            state.restore_stalled(saved.stalled.clone());
            for (id, stream) in &mut state.streams {
                stream.ats_enabled = saved.ats_enabled.contains(id);
            }
            state.all_reconfigured(&mut pending);
        });
        self.deliver(&mut pending);
    }

    /// Carries out what waits in the command queue: at most as many commands
    /// as waited at the start, so a hostile index costs one queue's worth.
    fn drain(&self, pending: &mut Pending) {
        let waiting = self.lock().commands_waiting();
        for _ in 0..waiting {
            if self.wires.interrupts() {
                break;
            }
            match self.with(|state| state.step(&self.ram, pending)) {
                Step::Idle => break,
                Step::Consumed => {
                    if pending.is_full() {
                        self.deliver(pending);
                    }
                }
                Step::Respond {
                    stream,
                    substream,
                    group,
                    response,
                } => self.wires.page_response(stream, substream, group, response),
                Step::Resumed(transactions, action) => {
                    for transaction in &transactions {
                        self.wires.resumed(transaction, action);
                    }
                }
                Step::Sync(signal) => {
                    self.deliver(pending);
                    self.with(State::consume);
                    self.signal_sync(signal);
                }
            }
        }
        self.deliver(pending);
    }

    /// §4.7.3: seeing the signal means that the command is consumed.
    fn signal_sync(&self, signal: Signal) {
        let Signal::Interrupt { address, data } = signal else {
            return;
        };
        let address = address & ((1 << self.config.address_bits()) - 1);
        self.notify(Notice {
            line: SmmuLine::CmdSync,
            message: (address != 0).then_some((address, data)),
        });
    }

    /// Tells every stream what is due. No lock but the command lock is held.
    fn deliver(&self, pending: &mut Pending) {
        for (stream, due) in std::mem::take(&mut pending.streams) {
            let Some(region) = self.sink(stream) else {
                continue;
            };
            if due.configuration {
                region.invalidate_all();
                self.renegotiate(stream);
                continue;
            }
            region.invalidate(&due.ranges);
            region.invalidate_device_iotlb(&due.device);
        }
    }

    fn sink(&self, stream: StreamId) -> Option<Arc<dyn StreamSink>> {
        self.lock().streams.get(&stream)?.sink.as_ref()?.upgrade()
    }

    /// Negotiates a stream's registrations again if it can deliver otherwise
    /// than when they were last negotiated.
    fn renegotiate(&self, stream: StreamId) {
        let changed = self.with(|state| {
            let now = state.device_iotlb(&self.ram, stream).is_ok();
            let known = state.streams.get_mut(&stream)?;
            Some(std::mem::replace(&mut known.device_iotlb, now) != now)
        });
        if changed == Some(true)
            && let Some(region) = self.sink(stream)
        {
            region.renegotiate();
        }
    }

    /// Sends an interrupt; a message that nobody takes is a global error.
    fn notify(&self, notice: Notice) {
        let wired = notice.message.is_none() || notice.line == SmmuLine::CmdSync;
        if let Some((address, data)) = notice.message {
            let place = GuestAddress(address);
            let written = self.ram.store(data.to_le(), place, Ordering::Release);
            if written.is_err() && !self.wires.message(Gpa(address), data) {
                let bit = match notice.line {
                    SmmuLine::Eventq => gerror::MSI_EVENTQ_ABT,
                    SmmuLine::Priq => gerror::MSI_PRIQ_ABT,
                    SmmuLine::CmdSync => gerror::MSI_CMDQ_ABT,
                    SmmuLine::Gerror => gerror::MSI_GERROR_ABT,
                };
                self.with(|state| state.global_error(bit));
            }
        }
        if wired {
            self.wires.pulse(notice.line);
        }
    }

    fn answer(&self, request: &Request) -> Result<Mapping, Fault> {
        self.with(|state| {
            let asked = Asked {
                request,
                update: true,
            };
            let failure = match state.resolve(&self.ram, asked) {
                Ok(mapping) => return Ok(mapping),
                Err(failure) => failure,
            };
            state.fail(&self.ram, request, &failure);
            Err(fault(request, failure.reason))
        })
    }

    /// Works on the state, and sends the interrupts that come of it when it is
    /// unlocked.
    fn with<T>(&self, work: impl FnOnce(&mut State) -> T) -> T {
        let mut state = self.lock();
        let outcome = work(&mut state);
        let notices = std::mem::take(&mut state.notices);
        drop(state);
        for notice in notices {
            self.notify(notice);
        }
        outcome
    }

    fn command(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

const fn fault(request: &Request, reason: FaultReason) -> Fault {
    Fault {
        stream: request.stream,
        iova: request.iova,
        access: request.access,
        reason,
    }
}

impl State {
    /// A write without consequences beyond the register.
    fn write_plain(&mut self, offset: u64, value: u32) {
        if let Some(value) = self.registers.writable(offset, value) {
            self.registers.set(offset, value);
        }
    }

    /// CR0 (§6.3.9). Answers the stalled transactions that it ends.
    fn write_cr0(&mut self, value: u32, pending: &mut Pending) -> Vec<Stalled> {
        let before = self.registers.get(reg::CR0);
        self.write_plain(reg::CR0, value);
        let now = self.registers.get(reg::CR0);
        if (before ^ now) & cr0::SMMUEN == 0 {
            return Vec::new();
        }
        self.all_reconfigured(pending);
        if now & cr0::SMMUEN == 0 {
            self.unstall(|_, _| true)
        } else {
            Vec::new()
        }
    }

    /// GBPA (§6.3.14): taken over at once, when UPDATE says so.
    fn write_gbpa(&mut self, value: u32, pending: &mut Pending) {
        if value & gbpa::UPDATE == 0 {
            return;
        }
        let before = self.registers.get(reg::GBPA);
        self.write_plain(reg::GBPA, value & !gbpa::UPDATE);
        let changed = (before ^ self.registers.get(reg::GBPA)) & gbpa::ABORT != 0;
        if changed && !self.registers.enabled(cr0::SMMUEN) {
            self.all_reconfigured(pending);
        }
    }
}

impl Iommu for Smmu {
    fn translate(&self, request: &Request) -> Result<Mapping, Fault> {
        self.answer(request)
    }

    fn lookup(&self, request: &Request) -> Result<Mapping, Fault> {
        let asked = Asked {
            request,
            update: false,
        };
        let outcome = self.lock().resolve(&self.ram, asked);
        outcome.map_err(|failure| fault(request, failure.reason))
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
        // What counts is how things stood at the last invalidation of the
        // configuration: then all registrations were negotiated alike.
        let mut state = self.lock();
        if state
            .streams
            .get(&stream)
            .is_some_and(|known| known.device_iotlb)
        {
            return Ok(());
        }
        let reason = state.device_iotlb(&self.ram, stream).err();
        Err(Refused {
            events: NotifierEvents::DEVIOTLB_UNMAP,
            reason: reason.unwrap_or("STE.EATS does not allow ATS"),
        })
    }

    /// Nobody can ask for it: `MAP` is always refused.
    fn replay(
        &self,
        _stream: StreamId,
        _range: IovaRange,
        _visit: &mut dyn FnMut(&Mapping) -> std::ops::ControlFlow<()>,
    ) {
    }

    fn connect(&self, stream: StreamId, sink: Weak<dyn StreamSink>) {
        self.lock().streams.entry(stream).or_default().sink = Some(sink);
    }
}

#[cfg(test)]
mod tests;
