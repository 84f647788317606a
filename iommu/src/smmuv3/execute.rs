//! Carrying out commands, and what of it is due to the streams.

use std::collections::BTreeMap;

use super::commands::{Command, PageResponse, Resume, Signal};
use super::spec::{Cerror, cmd, cr0, gerror, reg};
use super::state::{Stalled, State};
use super::tlb::{Reach, Scope};
use crate::{GuestRam, Iova, IovaRange, StreamId};

/// Most ranges that wait for one invalidation of a stream.
const MAX_DUE: usize = 64;

/// What a stream has to be told before the next CMD_SYNC completes.
#[derive(Debug, Default)]
pub(super) struct Due {
    /// Its configuration changed: everything.
    pub(super) configuration: bool,
    /// Translations that went.
    pub(super) ranges: Vec<IovaRange>,
    /// Translations that its device IOTLB must drop.
    pub(super) device: Vec<IovaRange>,
}

/// What all streams have to be told. Its lock is the command lock: whoever
/// carries out commands, or changes what they depend on, holds it.
#[derive(Debug, Default)]
pub(super) struct Pending {
    pub(super) streams: BTreeMap<StreamId, Due>,
}

impl Pending {
    pub(super) fn configuration(&mut self, stream: StreamId) {
        self.streams.entry(stream).or_default().configuration = true;
    }

    /// Whether some stream's list should not grow any more.
    pub(super) fn is_full(&self) -> bool {
        self.streams
            .values()
            .any(|due| due.ranges.len().max(due.device.len()) >= MAX_DUE)
    }
}

/// Adds a range, as one with the last if they touch.
fn push(ranges: &mut Vec<IovaRange>, range: IovaRange) {
    match ranges.last_mut() {
        Some(last) if last.joined(range).is_some() => {
            *last = last.joined(range).unwrap_or(range);
        }
        _ => ranges.push(range),
    }
}

/// What a step of the command queue leaves to be done with the state unlocked.
#[derive(Debug)]
pub(super) enum Step {
    /// Nothing is left to do, or an error stopped the queue.
    Idle,
    /// A command was consumed.
    Consumed,
    /// A command was consumed; the answer goes to a function.
    Respond {
        stream: StreamId,
        substream: Option<u32>,
        group: u16,
        response: PageResponse,
    },
    /// A command was consumed; these transactions wait no more.
    Resumed(Vec<Stalled>, Resume),
    /// CMD_SYNC, to be consumed when everything before it is complete.
    Sync(Signal),
}

impl State {
    /// Commands that wait in the queue, if it may be processed (§4.1.2).
    pub(super) fn commands_waiting(&self) -> u32 {
        if !self.registers.enabled(cr0::CMDQEN) || self.registers.error_active(gerror::CMDQ) {
            return 0;
        }
        let prod = self.registers.get(reg::CMDQ_PROD);
        let cons = self.registers.get(reg::CMDQ_CONS);
        self.command_queue().used(prod, cons)
    }

    /// Carries out the next command.
    pub(super) fn step(&mut self, ram: &GuestRam, pending: &mut Pending) -> Step {
        if self.commands_waiting() == 0 {
            return Step::Idle;
        }
        let cons = self.registers.get(reg::CMDQ_CONS);
        let Some(words) = self.command_queue().read::<{ cmd::WORDS }>(ram, cons) else {
            self.command_error(Cerror::Abt);
            return Step::Idle;
        };
        let command = match Command::parse(&words, &self.config, &self.registers) {
            Ok(command) => command,
            Err(error) => {
                self.command_error(error);
                return Step::Idle;
            }
        };
        *self.stats.commands.entry(command.kind()).or_default() += 1;
        let step = self.execute(command, pending);
        if !matches!(step, Step::Sync(_)) {
            self.consume();
        }
        step
    }

    /// Moves CMDQ_CONS beyond the command it is at.
    pub(super) fn consume(&mut self) {
        let cons = self.registers.get(reg::CMDQ_CONS);
        let next = self.command_queue().next(cons);
        self.registers.set(reg::CMDQ_CONS, next);
    }

    fn execute(&mut self, command: Command, pending: &mut Pending) -> Step {
        let enabled = self.registers.enabled(cr0::SMMUEN);
        match command {
            Command::Prefetch => {}
            Command::ConfigStreams(first, last) => {
                self.forget_streams(first, last);
                self.reconfigured(first, last, pending);
            }
            Command::ConfigCd(stream, index) => {
                self.cds.remove(&(stream, index));
                self.reconfigured(stream, stream, pending);
            }
            Command::ConfigCds(stream) => {
                self.cds.retain(|(owner, _), _| *owner != stream);
                self.reconfigured(stream, stream, pending);
            }
            Command::Tlb(scope) => self.invalidate(&scope, pending),
            Command::Atc {
                stream,
                substream,
                range,
            } if enabled => self.invalidate_atc(stream, substream, range, pending),
            Command::PageResponse {
                stream,
                substream,
                group,
                response,
            } if enabled => {
                return Step::Respond {
                    stream,
                    substream,
                    group,
                    response,
                };
            }
            // Ignored while SMMUEN is 0 (§4.5.1, §4.5.2).
            Command::Atc { .. } | Command::PageResponse { .. } => {}
            Command::Resume(stream, stag, action) => {
                let resumed = self.unstall(|known, stalled| {
                    known == stag && stalled.stream == stream && stalled.recorded
                });
                return Step::Resumed(resumed, action);
            }
            Command::StallTerm(stream) => {
                let ended = self.unstall(|_, stalled| stalled.stream == stream);
                return Step::Resumed(ended, Resume::Terminate);
            }
            Command::Sync(signal) => return Step::Sync(signal),
        }
        Step::Consumed
    }

    /// Streams may be configured otherwise than before. While `SMMUEN` is 0
    /// nobody holds anything that came from their configuration.
    fn reconfigured(&mut self, first: StreamId, last: StreamId, pending: &mut Pending) {
        if first > last || !self.registers.enabled(cr0::SMMUEN) {
            return;
        }
        for (id, stream) in self.streams.range_mut(first..=last) {
            stream.forget();
            pending.configuration(*id);
        }
    }

    /// Every connected stream sees another memory than before.
    pub(super) fn all_reconfigured(&mut self, pending: &mut Pending) {
        for (id, stream) in &mut self.streams {
            stream.forget();
            pending.configuration(*id);
        }
    }

    /// Drops translations from the TLB and finds the streams that may hold
    /// them: those whose STE and CD named the VMID and ASID when they were
    /// translated (§4.4).
    fn invalidate(&mut self, scope: &Scope, pending: &mut Pending) {
        self.tlb.invalidate(scope);
        for (id, stream) in &mut self.streams {
            let mut reaches = stream
                .held
                .iter()
                .filter_map(|(tag, held)| scope.reach(tag, *held))
                .collect::<Vec<_>>();
            if stream.held_more {
                reaches.push(Reach::All);
            }
            if reaches.is_empty() {
                continue;
            }
            let due = pending.streams.entry(*id).or_default();
            for reach in reaches {
                let range = match reach {
                    Reach::All => IovaRange::ALL,
                    Reach::Range(first, last) => match IovaRange::new(Iova(first), Iova(last)) {
                        Ok(range) => range,
                        Err(_) => continue,
                    },
                };
                push(&mut due.ranges, range);
            }
        }
    }

    /// §4.5.1: an invalidation with a SubstreamID is for translations that
    /// were asked for with one.
    fn invalidate_atc(
        &mut self,
        id: StreamId,
        substream: Option<u32>,
        range: IovaRange,
        pending: &mut Pending,
    ) {
        let Some(stream) = self.streams.get(&id) else {
            return;
        };
        if stream.ats_enabled && (substream.is_none() || stream.substreams) {
            push(&mut pending.streams.entry(id).or_default().device, range);
        }
    }
}
