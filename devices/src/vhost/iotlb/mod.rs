//! The kernel's IOTLB of one vhost file, synchronized with the guest's IOMMU.
//!
//! Locks, from the outermost: the reader's (held while misses are answered),
//! the stream's gate, the table's (shadow and rings). The table's lock is held
//! while a message is sent, so that the shadow has the kernel's order, and
//! nothing is translated under it.

mod miss;
mod prefetch;
mod sender;
mod stalled;
mod stats;

use std::io;
use std::sync::Arc;

use iommu::lock::RankedMutex;
use iommu::{
    Access, AddressSpace, IommuNotifier, IommuRegion, Iova, IovaRange, Mapping, NotifierEvents,
    NotifierId, NotifierSink, Registration, Translating,
};
use log::{info, warn};
use vmm_sys_util::eventfd::EventFd;

use self::miss::{Recording, StreamTranslator, pieces};
pub use self::sender::{Channel, IotlbOptions, Ring};
use self::sender::{Running, Sender, cannot_send};
pub use self::stats::IotlbStats;
use self::stats::count;
use crate::failure::{DeviceError, FailureLatch};
use crate::queue::chain::QueueError;
use crate::queue::posted::{Buffer, Layout, Memory, RingReadError, Steps, posted};
use crate::vhost::message::Miss;

/// Upper bound on misses per round: while the gate is held, and until the
/// thread serves the next file.
const MAX_BATCH: usize = 256;
/// Upper bound on descriptors and entries that are read while the gate is held,
/// beyond one for each miss. The guest chooses their number.
const MAX_STEPS: usize = 16 << 10;
/// Upper bound on rounds that answer the misses of a ring that stops.
const MAX_ROUNDS: usize = 16;
/// Upper bound on errors of a ring without a known cause and without an answer
/// in between, after which the device fails.
const MAX_UNEXPLAINED_ERRORS: u32 = 16;

struct Attached {
    space: AddressSpace,
    region: Arc<IommuRegion>,
    id: NotifierId,
}

/// Result of a round of answers.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Round {
    /// No miss is left.
    Over,
    /// There may be more.
    Full,
    /// The kernel sent an unknown message.
    Broken,
}

/// The IOTLB of one vhost file.
pub struct VhostIotlb {
    sender: Sender,
    reader: RankedMutex<Option<Attached>, 3>,
}

impl VhostIotlb {
    /// The IOTLB of the vhost file `channel`; `name` is for the log.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new(
        name: &str,
        channel: Arc<dyn Channel>,
        options: IotlbOptions,
        failure: Arc<FailureLatch>,
    ) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            sender: Sender::new(name, channel, options, failure)?,
            reader: RankedMutex::default(),
        }))
    }

    /// Signalled when [`retry`](Self::retry) has to be called.
    #[must_use]
    pub fn wake(&self) -> &EventFd {
        &self.sender.wake
    }

    /// Statistics since the file was opened.
    #[must_use]
    pub fn stats(&self) -> IotlbStats {
        let table = self.sender.table.lock();
        let (stalled, entries) = (table.stalled.len(), table.shadow.len());
        let counters = &self.sender.counters;
        counters.stats(stalled, entries, &table.outcome)
    }

    /// Registers with the region of `space`. The kernel's IOTLB must be new and
    /// empty. Does nothing if it is registered already.
    ///
    /// # Errors
    /// The IOMMU does not deliver invalidations, without which no translation
    /// may be cached.
    pub fn attach(
        self: &Arc<Self>,
        space: &AddressSpace,
        region: &Arc<IommuRegion>,
    ) -> Result<(), DeviceError> {
        let mut reader = self.reader.lock();
        if reader.is_some() {
            return Ok(());
        }
        {
            let mut table = self.sender.table.lock();
            table.shadow.clear();
            table.ram = Some(Arc::clone(space.ram()));
        }
        let id = region.register(IommuNotifier {
            acceptable: vec![
                NotifierEvents::DEVIOTLB_UNMAP,
                NotifierEvents::MAP | NotifierEvents::UNMAP,
                NotifierEvents::UNMAP,
            ],
            range: IovaRange::ALL,
            sink: Arc::clone(self) as Arc<dyn NotifierSink>,
        });
        *reader = Some(Attached {
            space: space.clone(),
            region: Arc::clone(region),
            id,
        });
        drop(reader);
        if self.sender.table.lock().outcome.events.is_empty() {
            self.detach();
            return Err(no_invalidations());
        }
        Ok(())
    }

    /// Unregisters from the region and empties the kernel's IOTLB. No ring
    /// runs.
    pub fn detach(&self) {
        let mut reader = self.reader.lock();
        if let Some(attached) = reader.take() {
            attached.region.unregister(attached.id);
        }
        // Misses of stopped rings are dropped.
        while let Ok(Some(_)) = self.sender.channel.receive() {}
        let mut table = self.sender.table.lock();
        self.sender.clear_stalled(&mut table);
        table.rings.clear();
        let _ = self.sender.invalidate(&mut table, &[IovaRange::ALL]);
        table.ram = None;
    }

    /// Prepares the start of a ring: sends the translations of its three parts,
    /// and keeps them in the kernel's IOTLB until it stops.
    ///
    /// # Errors
    /// The IOMMU does not translate one of them.
    pub fn start_ring(&self, index: u16, ring: Ring) -> Result<(), DeviceError> {
        let bad = |reason| QueueError(reason).of(ring.number);
        let parts = ring.layout.parts();
        let parts = parts.ok_or_else(|| bad("a ring runs beyond the address space"))?;
        let reader = self.reader.lock();
        let Some(attached) = &*reader else {
            return Ok(());
        };
        let inside = attached.region.enter();
        let translator = self.translator(attached, &inside);
        let (mut found, steps) = (Vec::new(), Steps::new(MAX_STEPS));
        for part in parts {
            let whole =
                self.sender
                    .missing_of(&translator, part, &mut found, (Recording::On, &steps));
            if !whole {
                count(&self.sender.counters.faults, 1);
                return Err(bad("the IOMMU does not translate its rings"));
            }
        }
        let mut table = self.sender.table.lock();
        let used_at_miss = None;
        table.rings.insert(index, Running { ring, used_at_miss });
        for entry in found {
            self.sender
                .push(&mut table, entry, None)
                .map_err(cannot_send)?;
        }
        Ok(())
    }

    /// Removes a stopped ring. Answers its misses first, so that none is
    /// translated after the driver continued.
    pub fn stop_ring(&self, index: u16) {
        // The other ring of the file may miss without end.
        for _ in 0..MAX_ROUNDS {
            if self.round() != Round::Full {
                break;
            }
        }
        let mut table = self.sender.table.lock();
        table.rings.remove(&index);
        if table.rings.is_empty() {
            self.sender.clear_stalled(&mut table);
        }
    }

    /// Answers the pending misses, up to `MAX_BATCH`: the file stays readable
    /// when there are more. `false` when the kernel sends an unknown message.
    pub fn service(&self) -> bool {
        self.round() != Round::Broken
    }

    fn round(&self) -> Round {
        let reader = self.reader.lock();
        // A queue may report a miss several times before its answer. The
        // gate is held until all of them are read: otherwise they would be
        // faults when the driver unmaps the page after the first answer.
        let inside = (reader.as_ref()).map(|attached| (attached, attached.region.enter()));
        let translator =
            (inside.as_ref()).map(|(attached, inside)| self.translator(attached, inside));
        let steps = Steps::new(MAX_STEPS);
        for _ in 0..MAX_BATCH {
            match (self.sender.channel.receive(), &translator) {
                (Ok(Some(miss)), Some(translator)) => self.answer(translator, miss, &steps),
                (Ok(Some(_)), None) => {}
                (Ok(None), _) => return Round::Over,
                (Err(source), _) => {
                    self.sender.fail(DeviceError::Backend {
                        what: "reading a miss of the host's vhost",
                        source,
                    });
                    return Round::Broken;
                }
            }
        }
        Round::Full
    }

    /// Sends the entries of rings that the kernel dropped, and translates the
    /// addresses of stalled queues again, after a change of translations.
    pub fn retry(&self) {
        let _ = self.sender.wake.read();
        let reader = self.reader.lock();
        let Some(attached) = &*reader else {
            return;
        };
        let inside = attached.region.enter();
        let translator = self.translator(attached, &inside);
        let (rings, waiting) = {
            let table = self.sender.table.lock();
            let rings: Vec<_> = table.layouts().copied().collect();
            (rings, table.stalled.waits().collect::<Vec<_>>())
        };
        let (mut found, steps) = (Vec::new(), Steps::new(MAX_STEPS));
        for part in rings.iter().filter_map(Layout::parts).flatten() {
            self.sender
                .missing_of(&translator, part, &mut found, (Recording::Off, &steps));
        }
        let mut answers = Vec::new();
        for (iova, access) in waiting {
            let answer = translator.resolve_quietly(iova, access);
            answers.extend(answer.map(|entry| (entry, iova)));
        }
        let mut table = self.sender.table.lock();
        let rings = found.into_iter().map(|entry| (entry, None));
        let answers = answers.into_iter().map(|(entry, iova)| (entry, Some(iova)));
        for (entry, wake) in rings.chain(answers) {
            if let Err(source) = self.sender.push(&mut table, entry, wake) {
                self.sender.fail(cannot_send(source));
                return;
            }
        }
    }

    /// Handles an error that the kernel reports on a ring. The cause may also
    /// be an entry that forbids the access, or may have resolved itself.
    pub fn ring_failed(&self, index: u16) {
        let reader = self.reader.lock();
        let Some(attached) = &*reader else {
            return;
        };
        let ring = (self.sender.table.lock().rings.get(&index)).map(|running| running.ring.clone());
        let Some(ring) = ring else {
            return;
        };
        let inside = attached.region.enter();
        let translator = self.translator(attached, &inside);
        let memory = Memory::new(&inside, translator.ram);
        let steps = Steps::new(MAX_STEPS);
        let buffers = match posted(&memory, &ring.layout, &steps) {
            Ok(buffers) => buffers,
            // The rings are not mapped: the kernel will miss them.
            Err(RingReadError::Fault(_)) => Vec::new(),
            Err(RingReadError::Malformed(reason)) => {
                self.sender.fail(QueueError(reason).of(ring.number));
                return;
            }
        };
        match self.forbidden(&buffers, &steps) {
            Some((iova, access)) => match translator.resolve(iova, access) {
                Some(better) => {
                    let mut table = self.sender.table.lock();
                    if let Err(source) = self.sender.push(&mut table, better, None) {
                        self.sender.fail(cannot_send(source));
                    }
                    let _ = ring.kick.write(1);
                }
                None => {
                    count(&self.sender.counters.faults, 1);
                    self.sender.park(iova, access, Some(ring.kick));
                }
            },
            None => self.count_unexplained_error(&ring),
        }
    }

    /// The first byte of the buffers whose entry in the kernel forbids the
    /// access, within the steps left.
    fn forbidden(&self, buffers: &[Buffer], steps: &Steps) -> Option<(Iova, Access)> {
        let table = self.sender.table.lock();
        buffers.iter().find_map(|buffer| {
            let held = table.shadow.overlapping(buffer.iova);
            let mut held = held.take_while(|_| steps.spend());
            let entry = held.find(|entry| !entry.perm.allows(buffer.access))?;
            let first = entry.iova.first().max(buffer.iova.first());
            Some((first, buffer.access))
        })
    }

    fn count_unexplained_error(&self, ring: &Ring) {
        let mut table = self.sender.table.lock();
        table.unexplained_errors += 1;
        if table.unexplained_errors > MAX_UNEXPLAINED_ERRORS {
            self.sender.fail(DeviceError::Backend {
                what: "the host's vhost cannot go on with a queue",
                source: io::Error::from(io::ErrorKind::InvalidData),
            });
        } else {
            let _ = ring.kick.write(1);
        }
    }

    fn answer(&self, translator: &StreamTranslator<'_>, miss: Miss, steps: &Steps) {
        self.sender.count_miss();
        // An entry of the kernel is valid until its invalidation, even if the
        // tables have changed and the invalidation waits for the gate.
        let held = self.sender.table.lock().shadow.holder(miss.iova);
        let held = held.filter(|held| held.perm.allows(miss.access));
        let Some(entry) = held.or_else(|| translator.resolve(miss.iova, miss.access)) else {
            count(&self.sender.counters.faults, 1);
            self.sender.park(miss.iova, miss.access, None);
            return;
        };
        let sent = if self.sender.options.prefetch && held.is_none() {
            self.sender.prefetch(translator, miss.iova, entry, steps)
        } else {
            Ok(())
        };
        // The missed entry is sent last, because it wakes the queue.
        let mut table = self.sender.table.lock();
        table.unexplained_errors = 0;
        let sent = sent.and_then(|()| self.sender.push(&mut table, entry, Some(miss.iova)));
        if let Err(source) = sent {
            self.sender.fail(cannot_send(source));
        }
    }

    fn translator<'a>(
        &self,
        attached: &'a Attached,
        inside: &'a Translating<'a>,
    ) -> StreamTranslator<'a> {
        let events = self.sender.table.lock().outcome.events;
        StreamTranslator {
            inside,
            ram: attached.space.ram(),
            ats: events.contains(NotifierEvents::DEVIOTLB_UNMAP),
        }
    }
}

fn no_invalidations() -> DeviceError {
    DeviceError::Backend {
        what: "the IOMMU delivers no invalidations to the host's vhost",
        source: io::Error::from(io::ErrorKind::Unsupported),
    }
}

impl NotifierSink for VhostIotlb {
    // A replay may omit the mapping that a stalled queue waits for: `unmap` and
    // `registered` wake the worker, which translates it again.
    fn wants_more(&self) -> bool {
        self.sender.prefills(&self.sender.table.lock())
    }

    fn map(&self, mapping: &Mapping) {
        let selected = self.sender.selects(mapping.iova);
        let mut table = self.sender.table.lock();
        let Some(ram) = table.ram.clone() else {
            return;
        };
        for entry in pieces(&ram, mapping) {
            let wake = table.stalled.first_in(&entry);
            let room = selected && self.sender.prefills(&table);
            if wake.is_none() && (!room || table.stalled.waits_in(&entry)) {
                continue;
            }
            match self.sender.push(&mut table, entry, wake) {
                Ok(sent) => count(&self.sender.counters.prefills, usize::from(sent)),
                Err(source) => {
                    self.sender.fail(cannot_send(source));
                    return;
                }
            }
        }
    }

    fn unmap(&self, ranges: &[IovaRange]) {
        let mut table = self.sender.table.lock();
        // An error has already halted the device.
        let _ = self.sender.invalidate(&mut table, ranges);
        let lost = table.layouts().filter_map(Layout::parts);
        let lost = lost.flatten().any(|part| {
            let gone = ranges.iter().any(|range| range.overlaps(part.iova));
            gone && table.shadow.holder(part.iova.first()).is_none()
        });
        if lost || !table.stalled.is_empty() {
            let _ = self.sender.wake.write(1);
        }
    }

    fn registered(&self, outcome: &Registration) {
        let mut table = self.sender.table.lock();
        let refused: Vec<_> = outcome.refused.iter().map(ToString::to_string).collect();
        let because = if refused.is_empty() {
            String::new()
        } else {
            format!(" ({})", refused.join("; "))
        };
        if outcome.events.is_empty() {
            warn!(
                "{}: the IOMMU notifies of nothing{because}",
                self.sender.name
            );
            let error = io::Error::from(io::ErrorKind::Unsupported);
            self.sender.halt_device(&error);
        } else if table.outcome != *outcome {
            let name = &self.sender.name;
            info!("{name}: the IOMMU notifies of {}{because}", outcome.events);
        }
        table.outcome = outcome.clone();
        let _ = self.sender.wake.write(1);
    }
}

#[cfg(test)]
mod tests;
