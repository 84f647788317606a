//! Counters of a kernel IOTLB.

use std::sync::atomic::{AtomicU64, Ordering};

use iommu::{NotifierEvents, Registration};
use serde::Serialize;

/// Events since the file was opened, counted with relaxed atomics.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) misses: AtomicU64,
    pub(super) updates: AtomicU64,
    pub(super) prefills: AtomicU64,
    pub(super) prefetched: AtomicU64,
    pub(super) invalidations_sent: AtomicU64,
    pub(super) invalidations_saved: AtomicU64,
    pub(super) faults: AtomicU64,
}

/// Statistics of the IOTLB of one vhost file.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct IotlbStats {
    /// Misses that the kernel reported.
    pub misses: u64,
    /// Updates sent to the kernel, the following two counters included.
    pub updates: u64,
    /// Updates sent when the guest mapped them.
    pub prefills: u64,
    /// Updates for available buffers, sent with the answer to another miss:
    /// each saves a miss.
    pub prefetched: u64,
    /// INVALIDATE messages sent to the kernel.
    pub invalidations_sent: u64,
    /// Invalidated ranges that needed no message of their own.
    pub invalidations_saved: u64,
    /// Misses that the IOMMU does not translate, and accesses that its
    /// permissions forbid.
    pub faults: u64,
    /// Addresses at which queues wait for a mapping now.
    pub stalled: usize,
    /// Entries that the kernel holds now.
    pub entries: usize,
    /// Events that the notifier chain delivers.
    pub registration: NotifierEvents,
    /// Event sets that it refused, with the reasons.
    pub refused: Vec<String>,
}

impl Counters {
    /// The counters and the present state of the IOTLB.
    pub(super) fn stats(
        &self,
        stalled: usize,
        entries: usize,
        outcome: &Registration,
    ) -> IotlbStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        IotlbStats {
            misses: get(&self.misses),
            updates: get(&self.updates),
            prefills: get(&self.prefills),
            prefetched: get(&self.prefetched),
            invalidations_sent: get(&self.invalidations_sent),
            invalidations_saved: get(&self.invalidations_saved),
            faults: get(&self.faults),
            stalled,
            entries,
            registration: outcome.events,
            refused: outcome.refused.iter().map(ToString::to_string).collect(),
        }
    }
}

pub(super) fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}
