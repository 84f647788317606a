//! The kernel's IOTLB of one vhost file, kept in step with the guest's IOMMU.
//!
//! Locks, from the outermost: the reader's (who answers misses), the stream's
//! gate, the table's (shadow and rings). The table's lock is held while a
//! message is sent, so that the shadow's order is the kernel's, and nothing is
//! translated under it.

mod prefetch;

use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use iommu::{
    Access, AddressSpace, GuestRam, Hva, IommuNotifier, IommuRegion, Iova, IovaRange, Mapping,
    NotifierEvents, NotifierId, NotifierSink, Perm, Registration, Translating,
};
use log::{info, warn};
use serde::Serialize;
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _, MemoryRegionAddress};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::prefetch::{Trace, World, pieces};
use super::message::{Message, Miss};
use super::shadow::{DEFAULT_LIMIT, Entry, Shadow, merged};
use crate::failure::{DeviceError, FailureLatch};
use crate::queue::posted::{Buffer, Layout, Memory, RingReadError, Steps, posted};

/// Most translations that one miss brings with it, however large the IOTLB.
const MAX_PREFETCH: usize = 256;
/// Translations that a miss brings with it at least, if there are as many.
const MIN_PREFETCH: usize = 16;
/// Most parts of entries that are sent again after an invalidation took more
/// than it was for.
const MAX_RESTORED: usize = 16;
/// Most places at which queues wait for a mapping.
const MAX_PENDING: usize = 64;
/// Most misses at one place before the kernel is made to forget them: it keeps
/// each of them until it is answered.
const MAX_UNANSWERED: u32 = 256;
/// Misses that are answered in one round: while the gate is held, and until
/// the thread serves the next file.
const MAX_BATCH: usize = 256;
/// Descriptors and entries that are looked at while the gate is held, beyond
/// one for each miss. The guest chooses how many there are.
const MAX_STEPS: usize = 16 << 10;
/// Rounds in which a ring that stops gets its last answers.
const MAX_ROUNDS: usize = 16;
/// Errors without a cause that we see and without progress, until we give up.
const MAX_STRIKES: u32 = 16;

/// The kernel's end.
pub trait Channel: Send + Sync {
    /// Sends a message. What an invalidation is for is out of use when this
    /// returns.
    ///
    /// # Errors
    /// The kernel refused it.
    fn send(&self, message: &Message) -> io::Result<()>;

    /// Takes the next miss, if there is one.
    ///
    /// # Errors
    /// The kernel sent something else.
    fn receive(&self) -> io::Result<Option<Miss>>;

    /// Takes the back end away from every ring: for when an invalidation
    /// cannot be delivered.
    fn halt(&self);
}

/// A queue that runs, as far as its memory is concerned.
#[derive(Clone)]
pub struct Ring {
    /// Its number on the device, for messages.
    pub number: u16,
    /// Where it is.
    pub layout: Layout,
    /// Sets it going again.
    pub kick: Arc<EventFd>,
}

/// What happened, counted with relaxed atomics.
#[derive(Debug, Default)]
struct Counters {
    misses: AtomicU64,
    updates: AtomicU64,
    prefills: AtomicU64,
    prefetched: AtomicU64,
    invalidations_sent: AtomicU64,
    invalidations_saved: AtomicU64,
    faults: AtomicU64,
}

/// How the IOTLB of one vhost file stands.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct IotlbStats {
    /// Misses that the kernel reported.
    pub misses: u64,
    /// Translations sent to it, the following two included.
    pub updates: u64,
    /// Translations sent when they were mapped, before anybody missed them.
    pub prefills: u64,
    /// Translations of posted buffers sent with the answer to another's miss:
    /// so many misses saved.
    pub prefetched: u64,
    /// Invalidations sent.
    pub invalidations_sent: u64,
    /// Invalidated ranges that cost no message.
    pub invalidations_saved: u64,
    /// Misses that the IOMMU does not translate, and accesses that its
    /// permissions forbid.
    pub faults: u64,
    /// Places at which queues wait for a mapping now.
    pub stalled: usize,
    /// Entries that the kernel holds now.
    pub entries: usize,
    /// What the notifier chain delivers.
    pub registration: NotifierEvents,
    /// What it would not, and why.
    pub refused: Vec<String>,
}

/// A miss without an answer.
struct Pending {
    iova: Iova,
    access: Access,
    /// Misses that the kernel keeps for it; none for an access that it refused
    /// by itself.
    unanswered: u32,
    /// Wakes the queue where the kernel does not do so itself.
    kick: Option<Arc<EventFd>>,
}

/// A ring and what its misses tell.
#[derive(Clone)]
struct Running {
    ring: Ring,
    /// Its used index when it last missed something.
    used_at_miss: Option<u16>,
}

struct Table {
    shadow: Shadow,
    rings: BTreeMap<u16, Running>,
    pending: Vec<Pending>,
    outcome: Registration,
    /// RAM, while the file is attached to an address space.
    ram: Option<Arc<GuestRam>>,
    /// Errors without a cause, and the used index at the last one.
    strikes: u32,
}

struct Attached {
    space: AddressSpace,
    region: Arc<IommuRegion>,
    id: NotifierId,
}

/// How a kernel IOTLB is to be used.
#[derive(Clone, Copy, Debug)]
pub struct IotlbOptions {
    /// Entries that the kernel holds; 0 is no limit.
    pub limit: usize,
    /// Send new mappings when they are made, if the IOMMU tells of them.
    pub prefill: bool,
    /// Translate every posted buffer of a queue that misses one.
    pub prefetch: bool,
}

/// How a round of answers ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Round {
    /// No miss is left.
    Over,
    /// There may be more.
    Full,
    /// The kernel sent what no version of its interface sends.
    Broken,
}

/// The IOTLB of one vhost file.
pub struct VhostIotlb {
    name: String,
    channel: Arc<dyn Channel>,
    options: IotlbOptions,
    failure: Arc<FailureLatch>,
    reader: Mutex<Option<Attached>>,
    table: Mutex<Table>,
    counters: Counters,
    wake: EventFd,
}

fn count(counter: &AtomicU64, by: usize) {
    counter.fetch_add(by as u64, Ordering::Relaxed);
}

impl VhostIotlb {
    /// The IOTLB behind `channel`; `name` is for the log.
    ///
    /// # Errors
    /// No eventfd is left.
    pub fn new(
        name: &str,
        channel: Arc<dyn Channel>,
        options: IotlbOptions,
        failure: Arc<FailureLatch>,
    ) -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            name: name.to_owned(),
            channel,
            options,
            failure,
            reader: Mutex::default(),
            table: Mutex::new(Table {
                shadow: Shadow::new(options.limit),
                rings: BTreeMap::new(),
                pending: Vec::new(),
                outcome: Registration {
                    events: NotifierEvents::NONE,
                    refused: Vec::new(),
                },
                ram: None,
                strikes: 0,
            }),
            counters: Counters::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        }))
    }

    /// Signalled when [`revive`](Self::revive) has something to do.
    #[must_use]
    pub fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// How it stands.
    #[must_use]
    pub fn stats(&self) -> IotlbStats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let table = self.table();
        IotlbStats {
            misses: get(&self.counters.misses),
            updates: get(&self.counters.updates),
            prefills: get(&self.counters.prefills),
            prefetched: get(&self.counters.prefetched),
            invalidations_sent: get(&self.counters.invalidations_sent),
            invalidations_saved: get(&self.counters.invalidations_saved),
            faults: get(&self.counters.faults),
            stalled: table.pending.len(),
            entries: table.shadow.len(),
            registration: table.outcome.events,
            refused: (table.outcome.refused.iter().map(ToString::to_string)).collect(),
        }
    }

    /// Listens to the region of `space` from now on. The kernel's IOTLB is
    /// new and empty. Does nothing if it listens already.
    ///
    /// # Errors
    /// The IOMMU does not tell of invalidations: without them nothing may be
    /// kept.
    pub fn attach(
        self: &Arc<Self>,
        space: &AddressSpace,
        region: &Arc<IommuRegion>,
    ) -> Result<(), DeviceError> {
        let mut reader = self.reader();
        if reader.is_some() {
            return Ok(());
        }
        {
            let mut table = self.table();
            table.shadow.clear();
            table.ram = Some(Arc::clone(space.ram()));
        }
        let id = region.register(IommuNotifier {
            wanted: vec![
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
        if self.table().outcome.events.is_empty() {
            self.detach();
            return Err(no_invalidations());
        }
        Ok(())
    }

    /// Forgets the address space: no ring runs any more. Afterwards the kernel
    /// holds nothing.
    pub fn detach(&self) {
        let mut reader = self.reader();
        if let Some(attached) = reader.take() {
            attached.region.unregister(attached.id);
        }
        // Misses of rings that have stopped mean nothing any more.
        while let Ok(Some(_)) = self.channel.receive() {}
        let mut table = self.table();
        self.forget_all(&mut table);
        table.rings.clear();
        let _ = self.invalidate(&mut table, &[IovaRange::ALL]);
        table.ram = None;
    }

    /// A ring is about to run: sends the translation of its three parts, and
    /// keeps them in from now on.
    ///
    /// # Errors
    /// The IOMMU does not translate one of them.
    pub fn start_ring(&self, index: u16, ring: Ring) -> Result<(), DeviceError> {
        let bad = |reason| DeviceError::BadQueue {
            queue: ring.number,
            reason,
        };
        let parts = ring.layout.parts();
        let parts = parts.ok_or_else(|| bad("a ring runs beyond the address space"))?;
        let reader = self.reader();
        let Some(attached) = &*reader else {
            return Ok(());
        };
        let inside = attached.region.enter();
        let world = self.world(attached, &inside);
        let (mut found, steps) = (Vec::new(), Steps::new(MAX_STEPS));
        for part in parts {
            let whole = self.missing_of(&world, part, &mut found, (Trace::Left, &steps));
            if !whole {
                count(&self.counters.faults, 1);
                return Err(bad("the IOMMU does not translate its rings"));
            }
        }
        let mut table = self.table();
        let used_at_miss = None;
        table.rings.insert(index, Running { ring, used_at_miss });
        for entry in found {
            self.push(&mut table, entry, None).map_err(cannot_send)?;
        }
        Ok(())
    }

    /// A ring has stopped. Answers what it missed until then, so that none of
    /// it is looked at after the driver went on.
    pub fn stop_ring(&self, index: u16) {
        // The other ring of the file may go on missing.
        for _ in 0..MAX_ROUNDS {
            if self.round() != Round::Full {
                break;
            }
        }
        let mut table = self.table();
        table.rings.remove(&index);
        if table.rings.is_empty() {
            self.forget_all(&mut table);
        }
    }

    /// Answers the misses that are there, up to [`MAX_BATCH`]: more stay with
    /// the kernel, whose file is still readable. `false` when the kernel sends
    /// what we do not understand.
    pub fn service(&self) -> bool {
        self.round() != Round::Broken
    }

    fn round(&self) -> Round {
        let reader = self.reader();
        // A queue may report a miss several times, and all of them are
        // there before its answer is out. The gate is held until they are
        // read, or they would be faults when the driver, served by the
        // first answer, unmaps the place.
        let inside = (reader.as_ref()).map(|attached| (attached, attached.region.enter()));
        let world = (inside.as_ref()).map(|(attached, inside)| self.world(attached, inside));
        let steps = Steps::new(MAX_STEPS);
        for _ in 0..MAX_BATCH {
            match (self.channel.receive(), &world) {
                (Ok(Some(miss)), Some(world)) => self.answer(world, miss, &steps),
                (Ok(Some(_)), None) => {}
                (Ok(None), _) => return Round::Over,
                (Err(source), _) => {
                    self.fail(DeviceError::Backend {
                        what: "reading a miss of the host's vhost",
                        source,
                    });
                    return Round::Broken;
                }
            }
        }
        Round::Full
    }

    /// Something changed: sends rings that were lost, and tries again what
    /// could not be translated.
    pub fn revive(&self) {
        let _ = self.wake.read();
        let reader = self.reader();
        let Some(attached) = &*reader else {
            return;
        };
        let inside = attached.region.enter();
        let world = self.world(attached, &inside);
        let (rings, waiting) = {
            let table = self.table();
            let rings: Vec<_> = table.layouts().copied().collect();
            let waiting = table.pending.iter().map(|p| (p.iova, p.access));
            (rings, waiting.collect::<Vec<_>>())
        };
        let (mut found, steps) = (Vec::new(), Steps::new(MAX_STEPS));
        for part in rings.iter().filter_map(Layout::parts).flatten() {
            self.missing_of(&world, part, &mut found, (Trace::None, &steps));
        }
        let mut answers = Vec::new();
        for (iova, access) in waiting {
            let answer = world.resolve_quietly(iova, access);
            answers.extend(answer.map(|entry| (entry, iova)));
        }
        let mut table = self.table();
        let rings = found.into_iter().map(|entry| (entry, None));
        let answers = answers.into_iter().map(|(entry, iova)| (entry, Some(iova)));
        for (entry, wake) in rings.chain(answers) {
            if let Err(source) = self.push(&mut table, entry, wake) {
                self.fail(cannot_send(source));
                return;
            }
        }
    }

    /// The kernel says that it met an error on a ring. It says so also when
    /// it holds a translation that forbids the access, and for what resolves
    /// itself.
    pub fn ring_failed(&self, index: u16) {
        let reader = self.reader();
        let Some(attached) = &*reader else {
            return;
        };
        let ring = (self.table().rings.get(&index)).map(|running| running.ring.clone());
        let Some(ring) = ring else {
            return;
        };
        let inside = attached.region.enter();
        let world = self.world(attached, &inside);
        let memory = Memory::new(&inside, world.ram);
        let steps = Steps::new(MAX_STEPS);
        let buffers = match posted(&memory, &ring.layout, &steps) {
            Ok(buffers) => buffers,
            // The rings are gone: the kernel will miss them.
            Err(RingReadError::Fault(_)) => Vec::new(),
            Err(RingReadError::Malformed(reason)) => {
                let queue = ring.number;
                self.fail(DeviceError::BadQueue { queue, reason });
                return;
            }
        };
        match self.forbidden(&buffers, &steps) {
            Some((iova, access)) => match world.resolve(iova, access) {
                Some(better) => {
                    let mut table = self.table();
                    if let Err(source) = self.push(&mut table, better, None) {
                        self.fail(cannot_send(source));
                    }
                    let _ = ring.kick.write(1);
                }
                None => {
                    count(&self.counters.faults, 1);
                    self.keep(iova, access, Some(ring.kick));
                }
            },
            None => self.strike(&ring),
        }
    }

    /// The first byte of the buffers that the kernel holds and may not access,
    /// as far as the steps go.
    fn forbidden(&self, buffers: &[Buffer], steps: &Steps) -> Option<(Iova, Access)> {
        let table = self.table();
        buffers.iter().find_map(|buffer| {
            let held = table.shadow.overlapping(buffer.iova);
            let mut held = held.take_while(|_| steps.spend());
            let entry = held.find(|entry| !entry.perm.allows(buffer.access))?;
            let first = entry.iova.first().max(buffer.iova.first());
            Some((first, buffer.access))
        })
    }

    fn strike(&self, ring: &Ring) {
        let mut table = self.table();
        table.strikes += 1;
        if table.strikes > MAX_STRIKES {
            self.fail(DeviceError::Backend {
                what: "the host's vhost cannot go on with a queue",
                source: io::Error::from(io::ErrorKind::InvalidData),
            });
        } else {
            let _ = ring.kick.write(1);
        }
    }

    fn answer(&self, world: &World<'_>, miss: Miss, steps: &Steps) {
        count(&self.counters.misses, 1);
        // What the kernel holds is good until it is told otherwise, even if
        // the tables have changed and somebody waits at the gate to tell.
        let held = self.table().shadow.holder(miss.iova);
        let held = held.filter(|held| held.perm.allows(miss.access));
        let Some(entry) = held.or_else(|| world.resolve(miss.iova, miss.access)) else {
            count(&self.counters.faults, 1);
            self.keep(miss.iova, miss.access, None);
            return;
        };
        let sent = if self.options.prefetch && held.is_none() {
            self.prefetch(world, miss.iova, entry, steps)
        } else {
            Ok(())
        };
        // The one that was missed goes last: it wakes the queue.
        let mut table = self.table();
        table.strikes = 0;
        let sent = sent.and_then(|()| self.push(&mut table, entry, Some(miss.iova)));
        if let Err(source) = sent {
            self.fail(cannot_send(source));
        }
    }

    /// Sends a translation unless the kernel has it. With `wake` it is the
    /// answer to a miss of that byte and sent in any case: the kernel goes on
    /// only then. Returns whether a message was sent.
    fn push(&self, table: &mut Table, entry: Entry, wake: Option<Iova>) -> io::Result<bool> {
        let at = wake.unwrap_or(entry.iova.first());
        if let Some(held) = table.shadow.holder(at)
            && held.agrees_with(&entry)
        {
            if wake.is_some() {
                // A second copy; the first one goes when its turn comes.
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

    /// Sends an update. Entries of rings whose turn to be dropped has come are
    /// sent again before, so that they stay.
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
        // The kernel wakes every queue that misses a byte of it.
        table.pending.retain(|pending| {
            let over = entry.iova.contains(pending.iova);
            if let (true, Some(kick)) = (over, &pending.kick) {
                let _ = kick.write(1);
            }
            !over
        });
        Ok(())
    }

    fn send_update(&self, table: &mut Table, entry: Entry) -> io::Result<()> {
        self.channel.send(&Message::Update(entry))?;
        table.shadow.add(entry);
        count(&self.counters.updates, 1);
        Ok(())
    }

    /// Takes the ranges away from the kernel and gives back what it dropped
    /// besides. The caller has seen to it that the rest is still translated:
    /// it holds the gate.
    fn invalidate(&self, table: &mut Table, ranges: &[IovaRange]) -> io::Result<()> {
        let messages = table.shadow.invalidations(ranges);
        let saved = ranges.len().saturating_sub(messages.len());
        count(&self.counters.invalidations_saved, saved);
        let mut lost = Vec::new();
        for range in messages {
            if let Err(error) = self.channel.send(&Message::Invalidate(range)) {
                self.lose_control(&error);
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

    fn fail(&self, error: DeviceError) {
        self.failure.record(error);
        let _ = self.wake.write(1);
    }

    /// The kernel may go on using what it must not: takes the device away
    /// from it.
    fn lose_control(&self, error: &io::Error) {
        self.channel.halt();
        self.fail(DeviceError::Backend {
            what: "the host's vhost does not take an invalidation",
            source: io::Error::new(error.kind(), error.to_string()),
        });
    }

    /// Keeps a place that a queue waits for.
    fn keep(&self, iova: Iova, access: Access, kick: Option<Arc<EventFd>>) {
        let mut table = self.table();
        let missed = u32::from(kick.is_none());
        let known = (table.pending.iter_mut())
            .find(|known| known.iova == iova && known.kick.is_some() == kick.is_some());
        match known {
            Some(known) => {
                known.access = access;
                known.unanswered += missed;
            }
            None => table.pending.push(Pending {
                iova,
                access,
                unanswered: missed,
                kick,
            }),
        }
        let worst = (table.pending.iter()).position(|known| known.unanswered > MAX_UNANSWERED);
        let worst = worst.or((table.pending.len() > MAX_PENDING).then_some(0));
        if let Some(index) = worst {
            let pending = table.pending.remove(index);
            self.forget(&mut table, &pending);
        }
    }

    fn forget_all(&self, table: &mut Table) {
        for pending in std::mem::take(&mut table.pending) {
            self.forget(table, &pending);
        }
    }

    /// Makes the kernel drop the misses that it keeps for a place, by an
    /// answer that permits nothing and is gone at once. A queue that still
    /// wants to go there misses it again.
    fn forget(&self, table: &mut Table, pending: &Pending) {
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
            perm: Perm::NONE,
        });
        if let Some(nothing) = nothing
            && self.push(table, nothing, None).is_ok()
        {
            let _ = self.invalidate(table, &[byte]);
        }
    }

    fn world<'a>(&self, attached: &'a Attached, inside: &'a Translating<'a>) -> World<'a> {
        let events = self.table().outcome.events;
        World {
            inside,
            ram: attached.space.ram(),
            ats: events.contains(NotifierEvents::DEVIOTLB_UNMAP),
        }
    }

    /// Whether a mapping is sent when it is made.
    fn prefills(&self, table: &Table) -> bool {
        self.options.prefill && table.shadow.len() < self.prefill_limit()
    }

    /// Entries up to which mappings are sent when they are made: what is left
    /// is for answers. Beyond it the kernel would drop what was posted first
    /// and is used next.
    fn prefill_limit(&self) -> usize {
        let limit = self.limit();
        limit - limit / 8
    }

    fn limit(&self) -> usize {
        match self.options.limit {
            0 => DEFAULT_LIMIT,
            limit => limit,
        }
    }

    fn reader(&self) -> MutexGuard<'_, Option<Attached>> {
        self.reader.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    /// Where the rings are.
    fn layouts(&self) -> impl Iterator<Item = &Layout> {
        self.rings.values().map(|running| &running.ring.layout)
    }

    fn is_ring(&self, entry: &Entry) -> bool {
        let parts = self.layouts().filter_map(Layout::parts);
        parts.flatten().any(|part| part.iova.overlaps(entry.iova))
    }

    /// Whether a queue waits in an entry: the kernel would wake it, whatever it
    /// may do there.
    fn waits_in(&self, entry: &Entry) -> bool {
        let mut places = self.pending.iter().map(|pending| pending.iova);
        places.any(|iova| entry.iova.contains(iova))
    }

    /// The first place in an entry at which a queue waits and may now go on.
    fn waiting_for(&self, entry: &Entry) -> Option<Iova> {
        let waits = |p: &&Pending| entry.iova.contains(p.iova) && entry.perm.allows(p.access);
        self.pending.iter().find(waits).map(|pending| pending.iova)
    }
}

fn cannot_send(source: io::Error) -> DeviceError {
    DeviceError::Backend {
        what: "sending a translation to the host's vhost",
        source,
    }
}

fn no_invalidations() -> DeviceError {
    DeviceError::Backend {
        what: "the IOMMU delivers no invalidations to the host's vhost",
        source: io::Error::from(io::ErrorKind::Unsupported),
    }
}

impl NotifierSink for VhostIotlb {
    // A queue that waits for a mapping is tried again without being shown it:
    // `unmap` and `registered` wake the worker.
    fn wants_more(&self) -> bool {
        self.prefills(&self.table())
    }

    fn map(&self, mapping: &Mapping) {
        let mut table = self.table();
        let Some(ram) = table.ram.clone() else {
            return;
        };
        for entry in pieces(&ram, mapping) {
            let wake = table.waiting_for(&entry);
            let room = self.prefills(&table);
            if wake.is_none() && (!room || table.waits_in(&entry)) {
                continue;
            }
            match self.push(&mut table, entry, wake) {
                Ok(sent) => count(&self.counters.prefills, usize::from(sent)),
                Err(source) => {
                    self.fail(cannot_send(source));
                    return;
                }
            }
        }
    }

    fn unmap(&self, ranges: &[IovaRange]) {
        let mut table = self.table();
        // An error has already halted the device.
        let _ = self.invalidate(&mut table, ranges);
        let lost = table.layouts().filter_map(Layout::parts);
        let lost = lost.flatten().any(|part| {
            let gone = ranges.iter().any(|range| range.overlaps(part.iova));
            gone && table.shadow.holder(part.iova.first()).is_none()
        });
        if lost || !table.pending.is_empty() {
            let _ = self.wake.write(1);
        }
    }

    fn registered(&self, outcome: &Registration) {
        let mut table = self.table();
        let refused: Vec<_> = outcome.refused.iter().map(ToString::to_string).collect();
        let because = if refused.is_empty() {
            String::new()
        } else {
            format!(" ({})", refused.join("; "))
        };
        if outcome.events.is_empty() {
            warn!("{}: the IOMMU notifies of nothing{because}", self.name);
            let error = io::Error::from(io::ErrorKind::Unsupported);
            self.lose_control(&error);
        } else if table.outcome != *outcome {
            let name = &self.name;
            info!("{name}: the IOMMU notifies of {}{because}", outcome.events);
        }
        table.outcome = outcome.clone();
        let _ = self.wake.write(1);
    }
}

#[cfg(test)]
mod tests;
