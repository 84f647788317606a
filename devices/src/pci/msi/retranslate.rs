//! The thread that translates MSIs again.
//!
//! An IOMMU without `MAP` events (IHI 0070 needs no TLBI for a new mapping)
//! cannot report that a doorbell was mapped. While it is not mapped, the
//! eventfd of the interrupt has no route and no reader: this thread waits on
//! it, and on a signal the target translates again. The thread waits for gates,
//! which a slow disk may hold, so no vCPU and no event loop waits for it.

use std::io;
use std::sync::{Arc, Weak};

use iommu::lock::LeafMutex;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;

use crate::poll::{Poll, PollThread, owner_and_source, token};
use crate::thread::ThreadKind;

/// A target with interrupts whose doorbells may not be mapped.
pub(super) trait Retranslate: Send + Sync {
    /// Translates the doorbell of a signalled source again.
    fn retranslate(&self, source: usize);
}

/// Watches the interrupts whose doorbells are not mapped.
pub struct MsiRetranslator {
    poll: Arc<Poll>,
    targets: LeafMutex<Vec<Weak<dyn Retranslate>>>,
}

impl MsiRetranslator {
    /// A retranslator without a thread.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            poll: Arc::new(Poll::new()?),
            targets: LeafMutex::default(),
        }))
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// No thread is left.
    pub fn start(self: &Arc<Self>) -> io::Result<PollThread> {
        let retranslator = Arc::clone(self);
        let work = move |poll: &Poll| {
            if let Err(error) = poll.run(|token| retranslator.signalled(token)) {
                log::error!("waiting for interrupts without a mapping: {error}");
            }
        };
        PollThread::spawn(ThreadKind::Msi, "msi", &self.poll, work)
    }

    /// Adds a target. Returns its number.
    pub(super) fn add(&self, target: Weak<dyn Retranslate>) -> u32 {
        let mut targets = self.targets.lock();
        targets.push(target);
        u32::try_from(targets.len() - 1).unwrap_or(u32::MAX)
    }

    /// Watches the eventfd of source `source` of target `target`. A pending
    /// signal is an event too.
    ///
    /// Edge-triggered: the counter is the pending bit and is not read, and each
    /// signal is one event.
    pub(super) fn watch(&self, target: u32, source: usize, event: &EventFd) -> io::Result<()> {
        let source = u32::try_from(source).unwrap_or(u32::MAX);
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        self.poll.add(event, events, token(target, source))
    }

    /// Ends [`watch`](Self::watch) of an eventfd.
    pub(super) fn unwatch(&self, event: &EventFd) -> io::Result<()> {
        self.poll.remove(event)
    }

    fn signalled(&self, token: u64) {
        let (number, source) = owner_and_source(token);
        let target = self
            .targets
            .lock()
            .get(number as usize)
            .and_then(Weak::upgrade);
        if let Some(target) = target {
            target.retranslate(source as usize);
        }
    }
}
