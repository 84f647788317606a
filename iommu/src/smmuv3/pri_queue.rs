//! The PRI queue (IHI 0070 §8).

use super::config::SmmuConfig;
use super::queue::{PRIQ, Producer, QueueWriteError};
use super::registers::{Registers, SmmuLine};
use super::spec::pri::{self, RawPageRequest};
use super::spec::{Raw as _, cr0, gerror, reg};
use crate::addr::{Iova, StreamId};
use crate::ram::GuestRam;

/// A page request of a function (§8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PageRequest {
    /// Stream of the function.
    pub stream: StreamId,
    /// SubstreamID (PASID) of the request.
    pub substream: Option<u32>,
    /// The page; the low 12 bits are ignored.
    pub iova: Iova,
    /// The page shall be readable.
    pub read: bool,
    /// The page shall be writable.
    pub write: bool,
    /// The request is the last of its group.
    pub last: bool,
    /// Page request group index, 9 bits.
    pub group: u16,
}

impl PageRequest {
    fn record(&self) -> RawPageRequest {
        let mut record = RawPageRequest::ZERO;
        for (field, value) in [
            (pri::SID, u64::from(self.stream.0)),
            (pri::SSID, u64::from(self.substream.unwrap_or(0))),
            (pri::SSV, u64::from(self.substream.is_some())),
            (pri::READ, u64::from(self.read)),
            (pri::WRITE, u64::from(self.write)),
            (pri::LAST, u64::from(self.last)),
            (pri::PRG_INDEX, u64::from(self.group)),
            (pri::ADDRESS, self.iova.0 >> 12),
        ] {
            field.put(&mut record, value);
        }
        record
    }
}

/// Result of queueing a page request (§8.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PageRequestOutcome {
    /// The guest responds with CMD_PRI_RESP.
    Queued,
    /// The queue is full or has an unacknowledged overflow.
    Discarded,
    /// The queue is disabled, or its memory is not RAM.
    Unavailable,
}

/// The PRI queue's producer.
pub(super) struct PriQueue {
    producer: Producer,
    offered: bool,
}

impl PriQueue {
    pub(super) const fn new(config: &SmmuConfig) -> Self {
        Self {
            producer: Producer::new(PRIQ, config.address_bits()),
            offered: config.pri(),
        }
    }

    /// Queues a page request (§8.1).
    pub(super) fn push(
        &self,
        registers: &mut Registers,
        ram: &GuestRam,
        request: &PageRequest,
    ) -> PageRequestOutcome {
        let enabled = self.offered
            && registers.enabled(cr0::PRIQEN)
            && registers.enabled(cr0::SMMUEN)
            && !registers.error_active(gerror::PRIQ_ABT);
        if !enabled {
            return PageRequestOutcome::Unavailable;
        }
        if self.producer.is_overflowing(registers) {
            return PageRequestOutcome::Discarded;
        }
        match self.producer.push(registers, ram, &request.record()) {
            Ok(()) => {
                let last_only = registers.get(reg::PRIQ_IRQ_CFG2) >> 31 != 0;
                if request.last || !last_only {
                    registers.interrupt(SmmuLine::Priq);
                }
                PageRequestOutcome::Queued
            }
            Err(QueueWriteError::Full) => {
                self.producer.overflow(registers);
                PageRequestOutcome::Discarded
            }
            Err(QueueWriteError::Abort) => {
                registers.global_error(gerror::PRIQ_ABT);
                PageRequestOutcome::Unavailable
            }
        }
    }
}
