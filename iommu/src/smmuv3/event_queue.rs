//! The event queue and stalled transactions (IHI 0070 §3.12.2, §7.2, §7.4).

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use super::config::SmmuConfig;
use super::event::{Event, EventKind};
use super::queue::{EVENTQ, Producer, QueueWriteError};
use super::registers::{Registers, STALL_MAX, SmmuLine};
use super::spec::event::RawEvent;
use super::spec::{cr0, gerror};
use crate::addr::{Iova, StreamId};
use crate::mapping::Access;
use crate::ram::GuestRam;
use crate::translate::Request;

/// A transaction that waits for CMD_RESUME (§3.12.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stalled {
    /// Stream of the transaction.
    pub stream: StreamId,
    /// SubstreamID of the transaction.
    pub substream: Option<u32>,
    /// Input address.
    pub iova: Iova,
    /// Direction.
    pub access: Access,
    /// The event record was written. A transaction without one is translated
    /// again when the queue becomes writable (§3.12.2).
    pub(super) recorded: bool,
}

impl Stalled {
    /// The request of the transaction, for translating it again.
    pub(super) const fn request(&self) -> Request {
        let mut request = Request::untranslated(self.stream, self.iova, self.access);
        request.substream = self.substream;
        request
    }

    /// Whether `request` is for the same page, in the same direction.
    fn is_same_page(&self, request: &Request) -> bool {
        (self.stream, self.substream) == (request.stream, request.substream)
            && self.iova.0 >> 12 == request.iova.0 >> 12
            && self.access == request.access
    }
}

/// The event queue's producer and the stalled transactions.
pub(super) struct EventQueue {
    producer: Producer,
    stalled: BTreeMap<u16, Stalled>,
    free_stags: VecDeque<u16>,
    written: BTreeMap<EventKind, u64>,
    dropped: u64,
}

impl EventQueue {
    pub(super) fn new(config: &SmmuConfig) -> Self {
        Self {
            producer: Producer::new(EVENTQ, config.address_bits()),
            stalled: BTreeMap::new(),
            free_stags: all_stags().collect(),
            written: BTreeMap::new(),
            dropped: 0,
        }
    }

    /// Number of written records by kind.
    pub(super) const fn written(&self) -> &BTreeMap<EventKind, u64> {
        &self.written
    }

    /// Number of terminated transactions whose event was not recorded.
    pub(super) const fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Stalled transactions by STAG.
    pub(super) const fn stalled(&self) -> &BTreeMap<u16, Stalled> {
        &self.stalled
    }

    /// Replaces the stalled transactions when a snapshot is restored.
    pub(super) fn set_stalled(&mut self, stalled: BTreeMap<u16, Stalled>) {
        self.free_stags = all_stags()
            .filter(|stag| !stalled.contains_key(stag))
            .collect();
        self.stalled = stalled;
    }

    /// Whether a record can be written now (§7.2.1).
    pub(super) fn is_writable(&self, registers: &Registers) -> bool {
        is_enabled(registers) && !self.producer.is_full(registers)
    }

    /// Records the event of a terminated transaction, or drops it. A drop marks
    /// an overflow only when the queue is full (§7.4).
    pub(super) fn record(
        &mut self,
        registers: &mut Registers,
        ram: &GuestRam,
        event: &Event,
        request: &Request,
    ) {
        match self.push(registers, ram, &event.record(request, None)) {
            Ok(()) => self.count(event.kind),
            Err(error) => {
                self.dropped += 1;
                if error == QueueWriteError::Full {
                    self.producer.overflow(registers);
                }
            }
        }
    }

    /// Stalls a transaction. A second one to the same page is not recorded
    /// (§3.12.2.1); one that finds the event queue full waits without a record.
    pub(super) fn stall(
        &mut self,
        registers: &mut Registers,
        ram: &GuestRam,
        event: &Event,
        request: &Request,
    ) {
        let mut stalled = self.stalled.values();
        if stalled.any(|stalled| stalled.is_same_page(request)) {
            return;
        }
        let Some(stag) = self.free_stags.pop_front() else {
            return;
        };
        // The record is written later, so this is no overflow (§7.4).
        let record = event.record(request, Some(stag));
        let recorded = self.push(registers, ram, &record).is_ok();
        if recorded {
            self.count(event.kind);
        }
        self.stalled.insert(
            stag,
            Stalled {
                stream: request.stream,
                substream: request.substream,
                iova: request.iova,
                access: request.access,
                recorded,
            },
        );
    }

    /// STAGs of the stalled transactions without a record.
    pub(super) fn unrecorded(&self) -> Vec<u16> {
        let unrecorded = self.stalled.iter().filter(|(_, stalled)| !stalled.recorded);
        unrecorded.map(|(stag, _)| *stag).collect()
    }

    /// Removes and returns the stalled transactions that `which` selects by
    /// STAG.
    pub(super) fn remove(&mut self, which: impl Fn(u16, &Stalled) -> bool) -> Vec<Stalled> {
        let free_stags = &mut self.free_stags;
        let removed = self.stalled.extract_if(.., |stag, stalled| {
            let selected = which(*stag, stalled);
            if selected {
                free_stags.push_back(*stag);
            }
            selected
        });
        removed.map(|(_, stalled)| stalled).collect()
    }

    /// Writes a record. The caller handles a failure: the record of a
    /// terminated transaction is lost, that of a stalled one is not.
    fn push(
        &self,
        registers: &mut Registers,
        ram: &GuestRam,
        record: &RawEvent,
    ) -> Result<(), QueueWriteError> {
        if !is_enabled(registers) {
            return Err(QueueWriteError::Abort);
        }
        let outcome = self.producer.push(registers, ram, record);
        match outcome {
            // An interrupt for each record, not only for the first one in an
            // empty queue: a handler that is about to return misses none.
            Ok(()) => registers.interrupt(SmmuLine::Eventq),
            Err(QueueWriteError::Full) => {}
            Err(QueueWriteError::Abort) => registers.global_error(gerror::EVENTQ_ABT),
        }
        outcome
    }

    fn count(&mut self, kind: EventKind) {
        *self.written.entry(kind).or_default() += 1;
    }
}

/// Whether records may be written, unless the queue is full (§7.2.1).
fn is_enabled(registers: &Registers) -> bool {
    registers.enabled(cr0::EVENTQEN) && !registers.error_active(gerror::EVENTQ_ABT)
}

fn all_stags() -> impl Iterator<Item = u16> {
    (0..u16::try_from(STALL_MAX).unwrap_or(u16::MAX)).map(|stag| stag + 1)
}
