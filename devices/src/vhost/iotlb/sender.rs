//! Messages to the kernel's IOTLB, and the table of its entries.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

use iommu::lock::RankedMutex;
use iommu::{Access, GuestRam, Hva, Iova, IovaRange, NotifierEvents, Perm, Registration};
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _, MemoryRegionAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::stalled::{Pending, Stalled};
use super::stats::{Counters, count};
use crate::failure::{DeviceError, FailureLatch};
use crate::queue::posted::Layout;
use crate::vhost::message::{Message, Miss};
use crate::vhost::pairs::QueuePair;
use crate::vhost::shadow::{DEFAULT_LIMIT, Entry, Shadow, merged};

/// Upper bound on parts of entries that are sent again after an invalidation
/// removed more than its ranges.
const MAX_RESTORED: usize = 16;

/// Messages of a vhost file.
pub trait Channel: Send + Sync {
    /// Sends a message. When an invalidation has returned, the kernel uses no
    /// entry that overlaps it.
    ///
    /// # Errors
    /// The kernel refused the message.
    fn send(&self, message: &Message) -> io::Result<()>;

    /// Reads the next miss; `None` when there is none.
    ///
    /// # Errors
    /// The kernel sent an unknown message.
    fn receive(&self) -> io::Result<Option<Miss>>;

    /// Removes the back end of every ring, after an invalidation failed.
    fn halt(&self);
}

/// A ring that the kernel serves.
#[derive(Clone)]
pub struct Ring {
    /// Index of the queue on the device, for error texts.
    pub number: u16,
    /// Size and addresses of the ring.
    pub layout: Layout,
    /// Makes the kernel read the ring again.
    pub kick: Arc<EventFd>,
}

/// A ring and its used index at the last miss.
#[derive(Clone)]
pub(super) struct Running {
    pub(super) ring: Ring,
    /// Used index at the ring's last miss; `None` without a miss.
    pub(super) used_at_miss: Option<u16>,
}

/// The entries that the kernel holds, and the rings that use them.
pub(super) struct Table {
    pub(super) shadow: Shadow,
    pub(super) rings: BTreeMap<u16, Running>,
    pub(super) stalled: Stalled,
    pub(super) outcome: Registration,
    /// RAM, while the file is attached to an address space.
    pub(super) ram: Option<Arc<GuestRam>>,
    /// Number of errors without a known cause since the last answer.
    pub(super) unexplained_errors: u32,
}

/// Options of a kernel IOTLB.
#[derive(Clone, Debug)]
pub struct IotlbOptions {
    /// Upper bound on entries in the kernel; 0 is no limit.
    pub limit: usize,
    /// Send new mappings at once, if the IOMMU delivers `MAP` events.
    pub prefill: bool,
    /// Send the translations of all available buffers of a queue with a miss.
    pub prefetch: bool,
    /// Place among the queue pairs of a device with several.
    pub pair: Option<QueuePair>,
}

/// Sends every message, and updates the table to match the kernel's list.
pub(super) struct Sender {
    pub(super) name: String,
    pub(super) channel: Arc<dyn Channel>,
    pub(super) options: IotlbOptions,
    pub(super) counters: Counters,
    pub(super) wake: EventFd,
    failure: Arc<FailureLatch>,
    pub(super) table: RankedMutex<Table, 8>,
}

impl Sender {
    pub(super) fn new(
        name: &str,
        channel: Arc<dyn Channel>,
        options: IotlbOptions,
        failure: Arc<FailureLatch>,
    ) -> io::Result<Self> {
        let shadow = Shadow::new(options.limit);
        Ok(Self {
            name: name.to_owned(),
            channel,
            options,
            counters: Counters::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            failure,
            table: RankedMutex::new(Table {
                shadow,
                rings: BTreeMap::new(),
                stalled: Stalled::default(),
                outcome: Registration {
                    events: NotifierEvents::empty(),
                    refused: Vec::new(),
                },
                ram: None,
                unexplained_errors: 0,
            }),
        })
    }

    /// Sends a translation unless the kernel has it. With `wake` it is the
    /// answer to a miss of that byte and is always sent, because the kernel
    /// continues only then. Returns whether a message was sent.
    pub(super) fn push(
        &self,
        table: &mut Table,
        entry: Entry,
        wake: Option<Iova>,
    ) -> io::Result<bool> {
        let at = wake.unwrap_or(entry.iova.first());
        if let Some(held) = table.shadow.holder(at)
            && held.agrees_with(&entry)
        {
            if wake.is_some() {
                // A second copy; the kernel drops the first one in its order.
                self.update(table, held)?;
                return Ok(true);
            }
            if held.iova.covers(entry.iova) {
                return Ok(false);
            }
        }
        if table.shadow.overlaps(entry.iova) {
            self.invalidate(table, &[entry.iova])?;
        }
        self.update(table, entry)?;
        Ok(true)
    }

    /// Sends an update. If the kernel would drop an entry of a ring for it,
    /// that entry is sent again first.
    fn update(&self, table: &mut Table, entry: Entry) -> io::Result<()> {
        for _ in 0..8 * table.rings.len() {
            match table.shadow.next_victim() {
                Some(victim) if victim != entry && table.is_ring(&victim) => {
                    self.send_update(table, victim)?;
                }
                _ => break,
            }
        }
        self.send_update(table, entry)?;
        // The kernel wakes every queue with a miss in the entry.
        table.stalled.wake(&entry);
        Ok(())
    }

    fn send_update(&self, table: &mut Table, entry: Entry) -> io::Result<()> {
        self.channel.send(&Message::Update(entry))?;
        table.shadow.add(entry);
        count(&self.counters.updates, 1);
        Ok(())
    }

    /// Invalidates the ranges, and sends parts of removed entries outside of
    /// the ranges again. The caller holds the gate, so these are still mapped.
    pub(super) fn invalidate(&self, table: &mut Table, ranges: &[IovaRange]) -> io::Result<()> {
        let messages = table.shadow.invalidations(ranges);
        let saved = ranges.len().saturating_sub(messages.len());
        count(&self.counters.invalidations_saved, saved);
        let mut lost = Vec::new();
        for range in messages {
            if let Err(error) = self.channel.send(&Message::Invalidate(range)) {
                self.halt_device(&error);
                return Err(error);
            }
            count(&self.counters.invalidations_sent, 1);
            lost.extend(table.shadow.remove(range));
        }
        if lost.is_empty() {
            return Ok(());
        }
        let gone = merged(ranges);
        let parts = || lost.iter().flat_map(|entry| entry.without(&gone));
        let rings = parts().filter(|entry| table.is_ring(entry));
        let others = parts().filter(|entry| !table.is_ring(entry));
        let rest: Vec<_> = rings.chain(others).take(MAX_RESTORED).collect();
        for entry in rest {
            self.update(table, entry)?;
        }
        Ok(())
    }

    pub(super) fn fail(&self, error: DeviceError) {
        self.failure.record(error);
        let _ = self.wake.write(1);
    }

    /// Halts the device, because the kernel may still use invalid entries.
    pub(super) fn halt_device(&self, error: &io::Error) {
        self.channel.halt();
        self.fail(DeviceError::Backend {
            what: "the host's vhost does not take an invalidation",
            source: io::Error::new(error.kind(), error.to_string()),
        });
    }

    /// Parks a queue at an address that is not mapped.
    pub(super) fn park(&self, iova: Iova, access: Access, kick: Option<Arc<EventFd>>) {
        let mut table = self.table.lock();
        if let Some(pending) = table.stalled.park(iova, access, kick) {
            self.clear(&mut table, &pending);
        }
    }

    pub(super) fn clear_stalled(&self, table: &mut Table) {
        for pending in table.stalled.take() {
            self.clear(table, &pending);
        }
    }

    /// Makes the kernel drop the pending misses of an address, by an entry
    /// without permissions that is invalidated at once. A queue that still
    /// accesses the address misses it again.
    fn clear(&self, table: &mut Table, pending: &Pending) {
        let Some(ram) = table.ram.clone().filter(|_| pending.unanswered > 0) else {
            return;
        };
        let Ok(byte) = IovaRange::new(pending.iova, pending.iova) else {
            return;
        };
        let whole = ram.iter().next().and_then(|block| {
            let host = block.get_host_address(MemoryRegionAddress(0)).ok()?;
            Some(Hva(host.addr() as u64))
        });
        let nothing = whole.map(|hva| Entry {
            iova: byte,
            hva,
            perm: Perm::empty(),
        });
        if let Some(nothing) = nothing
            && self.push(table, nothing, None).is_ok()
        {
            let _ = self.invalidate(table, &[byte]);
        }
    }

    /// Whether new mappings are sent at once.
    pub(super) fn prefills(&self, table: &Table) -> bool {
        self.options.prefill && table.shadow.len() < self.prefill_limit()
    }

    /// Whether this IOTLB receives a mapping that the calling thread makes.
    pub(super) fn selects(&self, mapping: IovaRange) -> bool {
        let pair = self.options.pair.as_ref();
        pair.is_none_or(|pair| pair.select(mapping))
    }

    pub(super) fn count_miss(&self) {
        count(&self.counters.misses, 1);
        if let Some(pair) = &self.options.pair {
            pair.count_miss();
        }
    }

    /// Upper bound on entries for prefilling; the rest is for answers. Beyond
    /// it the kernel would drop the buffers that it uses next.
    fn prefill_limit(&self) -> usize {
        let limit = self.limit();
        limit - limit / 8
    }

    pub(super) fn limit(&self) -> usize {
        match self.options.limit {
            0 => DEFAULT_LIMIT,
            limit => limit,
        }
    }
}

impl Table {
    /// Addresses of the rings.
    pub(super) fn layouts(&self) -> impl Iterator<Item = &Layout> {
        self.rings.values().map(|running| &running.ring.layout)
    }

    fn is_ring(&self, entry: &Entry) -> bool {
        let parts = self.layouts().filter_map(Layout::parts);
        parts.flatten().any(|part| part.iova.overlaps(entry.iova))
    }
}

pub(super) fn cannot_send(source: io::Error) -> DeviceError {
    DeviceError::Backend {
        what: "sending a translation to the host's vhost",
        source,
    }
}
