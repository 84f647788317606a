//! Selects the queue pair whose kernel IOTLB receives a new mapping.
//!
//! A device with several queue pairs has a vhost file for each, and each file an
//! IOTLB of its own. A driver maps a buffer on the vCPU that uses it next, and
//! Linux assigns vCPUs to pairs in order (`virtnet_set_affinity`). So a small
//! mapping is sent to the pair of the vCPU that made it. Another pair that uses
//! it misses once. When that happens often, mappings go to all pairs for a while.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use iommu::IovaRange;

use crate::thread;

/// Bytes of the smallest mapping that goes to all pairs: more than a packet.
const LARGE: u64 = 1 << 20;
/// Number of selections after which their misses are judged.
const WINDOW: u32 = 256;
/// A selection is wrong too often when this many misses, or more, follow
/// [`WINDOW`] selections.
const MAX_MISSES: u32 = WINDOW / 8;
/// Number of mappings that go to all pairs after selections that were wrong too
/// often.
const ALL: u32 = 32 * WINDOW;

/// The queue pairs of one device.
///
/// Selection has no lock: its counters are relaxed atomics, and a lost count
/// delays a decision.
#[derive(Debug)]
pub struct QueuePairs {
    /// Number of vCPUs of the machine.
    vcpus: u32,
    /// Number of pairs that the driver uses, the first ones.
    active: AtomicU32,
    /// Selections in this window.
    selections: AtomicU32,
    /// Misses in this window.
    misses: AtomicU32,
    /// Mappings that still go to all pairs.
    all: AtomicU32,
}

impl QueuePairs {
    /// Pairs of a device in a machine of this many vCPUs. One pair is active.
    #[must_use]
    pub fn new(vcpus: u32) -> Arc<Self> {
        Arc::new(Self {
            vcpus,
            active: AtomicU32::new(1),
            selections: AtomicU32::new(0),
            misses: AtomicU32::new(0),
            all: AtomicU32::new(0),
        })
    }

    /// Sets the number of pairs that the driver uses. Earlier misses say nothing
    /// of the selections that follow.
    pub fn set_active(&self, pairs: u32) {
        self.selections.store(0, Ordering::Relaxed);
        self.misses.store(0, Ordering::Relaxed);
        self.active.store(pairs, Ordering::Relaxed);
    }

    /// Whether a mapping that this thread makes is for `pair`. Called once for
    /// each mapping and pair.
    fn select(&self, pair: u32, mapping: IovaRange) -> bool {
        let active = self.active.load(Ordering::Relaxed);
        let large = mapping.extent() >= LARGE - 1;
        let vcpu = match thread::vcpu() {
            // With fewer vCPUs than pairs, a vCPU uses several.
            Some(vcpu) if active > 1 && active <= self.vcpus && !large => vcpu,
            _ => return true,
        };
        let all = self.all.load(Ordering::Relaxed);
        if all > 0 {
            if pair == 0 {
                // A subtraction could pass 0 when two vCPUs see the last one.
                self.all.store(all - 1, Ordering::Relaxed);
                self.misses.store(0, Ordering::Relaxed);
            }
            return true;
        }
        let selected = pair_of(vcpu, self.vcpus, active) == pair;
        if selected && self.selections.fetch_add(1, Ordering::Relaxed) + 1 >= WINDOW {
            self.selections.store(0, Ordering::Relaxed);
            if self.misses.swap(0, Ordering::Relaxed) >= MAX_MISSES {
                self.all.store(ALL, Ordering::Relaxed);
            }
        }
        selected
    }

    fn count_miss(&self) {
        self.misses.fetch_add(1, Ordering::Relaxed);
    }
}

/// The pair that Linux assigns to a vCPU. Contiguous groups of vCPUs share a
/// pair, and the first groups have one more when the division has a remainder.
/// `active` is between 1 and `vcpus`.
fn pair_of(vcpu: u32, vcpus: u32, active: u32) -> u32 {
    let (size, larger) = (vcpus / active, vcpus % active);
    let in_larger = larger * (size + 1);
    if vcpu < in_larger {
        vcpu / (size + 1)
    } else {
        larger + (vcpu - in_larger) / size
    }
}

/// One pair of a device with [`QueuePairs`].
#[derive(Clone, Debug)]
pub struct QueuePair {
    /// All pairs of the device.
    pub pairs: Arc<QueuePairs>,
    /// Index of this pair.
    pub index: u32,
}

impl QueuePair {
    /// Whether a mapping that this thread makes is sent to this pair.
    pub(super) fn select(&self, mapping: IovaRange) -> bool {
        self.pairs.select(self.index, mapping)
    }

    /// Counts a miss of this pair.
    pub(super) fn count_miss(&self) {
        self.pairs.count_miss();
    }
}

#[cfg(test)]
mod tests;
