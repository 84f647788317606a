//! The parts of the model's state under one lock, and the operations on several
//! of them.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::caches::Caches;
use super::command::{Command, PageResponse, Resume, Signal};
use super::command_queue::CommandQueue;
use super::config::SmmuConfig;
use super::event_queue::{EventQueue, Stalled};
use super::pri_queue::PriQueue;
use super::registers::{InterruptRequest, Registers, SmmuLine};
use super::spec::{cr0, gbpa, reg};
use super::stream_tlb::StreamTlbs;
use super::streams::{PendingInvalidations, Streams};
use super::translate::{Failure, TranslationContext, Translator};
use crate::addr::{Gpa, StreamId};
use crate::ram::GuestRam;
use crate::translate::Request;

const FIRST_STREAM: StreamId = StreamId(0);
const LAST_STREAM: StreamId = StreamId(u32::MAX);

/// Commands that are executed under one hold of the state lock.
const MAX_RUN: u32 = 64;

/// Why the execution of commands stops: work to be done without the state lock.
#[derive(Debug)]
pub(super) enum Step {
    /// The queue is empty, interrupted, or stopped by an error.
    Idle,
    /// The lock was held for [`MAX_RUN`] commands, or the pending invalidations
    /// are to be delivered.
    Pause,
    /// CMD_PRI_RESP was consumed; the response goes to a function.
    Respond {
        stream: StreamId,
        substream: Option<u32>,
        group: u16,
        response: PageResponse,
    },
    /// CMD_RESUME or CMD_STALL_TERM was consumed; these transactions are no
    /// longer stalled.
    Resumed(Vec<Stalled>, Resume),
    /// CMD_SYNC, to be consumed when all earlier commands are complete.
    Sync(Signal),
}

/// The state of the model that the state lock protects.
pub(super) struct State {
    config: SmmuConfig,
    pub(super) registers: Registers,
    pub(super) caches: Caches,
    pub(super) streams: Streams,
    pub(super) commands: CommandQueue,
    pub(super) events: EventQueue,
    pub(super) pri: PriQueue,
}

impl State {
    pub(super) fn new(config: SmmuConfig, tlbs: Arc<StreamTlbs>) -> Self {
        Self {
            registers: Registers::new(&config),
            caches: Caches::default(),
            streams: Streams::new(tlbs),
            commands: CommandQueue::new(config),
            events: EventQueue::new(&config),
            pri: PriQueue::new(&config),
            config,
        }
    }

    /// Borrows the parts of the state that a translation uses.
    pub(super) fn translator<'a>(&'a mut self, ram: &'a GuestRam) -> Translator<'a> {
        Translator {
            config: &self.config,
            ram,
            registers: &self.registers,
            caches: &mut self.caches,
            streams: &mut self.streams,
        }
    }

    /// Replaces the parts that are in a snapshot, and resets all others.
    pub(super) fn replace(
        &mut self,
        registers: Registers,
        stalled: BTreeMap<u16, Stalled>,
        ats_enabled: &[StreamId],
        pending: &mut PendingInvalidations,
    ) {
        self.registers = registers;
        self.caches.clear();
        self.events.set_stalled(stalled);
        self.streams.set_all_ats_enabled(ats_enabled);
        self.reconfigure_all(pending);
    }

    /// Returns to the state after reset.
    pub(super) fn reset(&mut self, pending: &mut PendingInvalidations) {
        let registers = Registers::new(&self.config);
        self.replace(registers, BTreeMap::new(), &[], pending);
    }

    /// Writes CR0 (§6.3.9). Returns the stalled transactions that this ends.
    pub(super) fn write_cr0(
        &mut self,
        value: u32,
        pending: &mut PendingInvalidations,
    ) -> Vec<Stalled> {
        let was_enabled = self.registers.enabled(cr0::SMMUEN);
        self.registers.write(reg::CR0, value);
        let is_enabled = self.registers.enabled(cr0::SMMUEN);
        if was_enabled != is_enabled {
            self.reconfigure_all(pending);
        }
        if was_enabled && !is_enabled {
            self.events.remove(|_, _| true)
        } else {
            Vec::new()
        }
    }

    /// Writes GBPA (§6.3.14). Ignored without UPDATE.
    pub(super) fn write_gbpa(&mut self, value: u32, pending: &mut PendingInvalidations) {
        if value & gbpa::UPDATE == 0 {
            return;
        }
        let before = self.registers.get(reg::GBPA);
        self.registers.write(reg::GBPA, value & !gbpa::UPDATE);
        let changed = (before ^ self.registers.get(reg::GBPA)) & gbpa::ABORT != 0;
        if changed && !self.registers.enabled(cr0::SMMUEN) {
            self.reconfigure_all(pending);
        }
    }

    /// Counts a failure of `request`, and records its event or stalls the
    /// transaction according to the configuration.
    pub(super) fn fail(&mut self, ram: &GuestRam, request: &Request, failure: &Failure) {
        let Some(event) = &failure.event else {
            return;
        };
        self.streams.count_fault(request.stream, event.kind);
        if failure.stall {
            self.events.stall(&mut self.registers, ram, event, request);
        } else if failure.record {
            self.events.record(&mut self.registers, ram, event, request);
        }
    }

    /// Translates the stalled transactions without a record again, as new ones,
    /// while the event queue is writable (§3.12.2, §7.2.1): their records
    /// follow from the present configuration and tables. Returns those that are
    /// no longer stalled, with the action of their device.
    pub(super) fn retry_unrecorded(&mut self, ram: &GuestRam) -> Vec<(Stalled, Resume)> {
        let mut ended = Vec::new();
        for stag in self.events.unrecorded() {
            if !self.events.is_writable(&self.registers) {
                break;
            }
            for stalled in self.events.remove(|known, _| known == stag) {
                let request = stalled.request();
                let context = TranslationContext {
                    request: &request,
                    update: true,
                };
                match self.translator(ram).resolve(context) {
                    Ok(_) => ended.push((stalled, Resume::Retry)),
                    Err(failure) => {
                        self.fail(ram, &request, &failure);
                        if !failure.stall {
                            ended.push((stalled, Resume::Terminate));
                        }
                    }
                }
            }
        }
        ended
    }

    /// Executes commands until one needs work without the state lock or
    /// `interrupts` is true, at most `left`, from which the executed ones are
    /// subtracted.
    pub(super) fn run(
        &mut self,
        ram: &GuestRam,
        interrupts: impl Fn() -> bool,
        left: &mut u32,
        pending: &mut PendingInvalidations,
    ) -> Step {
        for _ in 0..MAX_RUN {
            if *left == 0 || interrupts() {
                return Step::Idle;
            }
            let Some(command) = self.commands.fetch(&mut self.registers, ram) else {
                return Step::Idle;
            };
            *left -= 1;
            match self.execute(command, pending) {
                Some(Step::Sync(signal)) if pending.is_empty() => self.complete_sync(signal),
                Some(step @ Step::Sync(_)) => return step,
                step => {
                    self.commands.consume(&mut self.registers);
                    if let Some(step) = step {
                        return step;
                    }
                }
            }
            if pending.is_full() {
                break;
            }
        }
        Step::Pause
    }

    /// Consumes CMD_SYNC and requests its interrupt (§4.7.3). All earlier commands
    /// are complete.
    pub(super) fn complete_sync(&mut self, signal: Signal) {
        self.commands.consume(&mut self.registers);
        if let Signal::Interrupt { address, data } = signal {
            let address = address & ((1 << self.config.address_bits()) - 1);
            self.registers.request(InterruptRequest {
                line: SmmuLine::CmdSync,
                message: (address != 0).then_some((Gpa(address), data)),
            });
        }
    }

    /// Executes a command. `None`: it needs no work without the state lock.
    fn execute(&mut self, command: Command, pending: &mut PendingInvalidations) -> Option<Step> {
        let enabled = self.registers.enabled(cr0::SMMUEN);
        match command {
            Command::Prefetch => {}
            Command::ConfigStreams(first, last) => {
                self.caches.drop_streams(first, last);
                self.reconfigure(first, last, pending);
            }
            Command::ConfigCd(stream, index) => {
                self.caches.drop_cds(stream, Some(index));
                self.reconfigure(stream, stream, pending);
            }
            Command::ConfigCds(stream) => {
                self.caches.drop_cds(stream, None);
                self.reconfigure(stream, stream, pending);
            }
            Command::Tlb(scope) => {
                self.caches.invalidate(&scope);
                self.streams.invalidate(&scope, pending);
            }
            Command::Atc {
                stream,
                substream,
                range,
            } if enabled => {
                self.streams
                    .invalidate_atc(stream, substream, range, pending);
            }
            Command::PageResponse {
                stream,
                substream,
                group,
                response,
            } if enabled => {
                return Some(Step::Respond {
                    stream,
                    substream,
                    group,
                    response,
                });
            }
            // Ignored while SMMUEN is 0 (§4.5.1, §4.5.2).
            Command::Atc { .. } | Command::PageResponse { .. } => {}
            Command::Resume(stream, stag, action) => {
                let resumed = self.events.remove(|known, stalled| {
                    known == stag && stalled.stream == stream && stalled.recorded
                });
                return Some(Step::Resumed(resumed, action));
            }
            Command::StallTerm(stream) => {
                let ended = self.events.remove(|_, stalled| stalled.stream == stream);
                return Some(Step::Resumed(ended, Resume::Terminate));
            }
            Command::Sync(signal) => return Some(Step::Sync(signal)),
        }
        None
    }

    /// Marks the configuration of streams as changed. Does nothing while
    /// `SMMUEN` is 0: no consumer has a translation that depends on it.
    fn reconfigure(&mut self, first: StreamId, last: StreamId, pending: &mut PendingInvalidations) {
        if self.registers.enabled(cr0::SMMUEN) {
            self.streams.reconfigure(first, last, pending);
        }
    }

    /// Marks the configuration of every stream as changed.
    fn reconfigure_all(&mut self, pending: &mut PendingInvalidations) {
        self.streams.reconfigure(FIRST_STREAM, LAST_STREAM, pending);
    }
}
