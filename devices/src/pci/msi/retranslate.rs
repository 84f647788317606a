//! The thread that translates MSIs again.
//!
//! An IOMMU without `MAP` events (IHI 0070 needs no TLBI for a new mapping)
//! cannot report that a doorbell was mapped. While it is not mapped, the
//! eventfd of the interrupt has no route and no reader: this thread waits on
//! it, and on a signal the target translates again. The thread waits for gates,
//! which a slow disk may hold, so no vCPU and no event loop waits for it.

use std::io;
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use iommu::lock::LeafMutex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::thread::{ThreadKind, spawn};

/// Token of the eventfd that ends the thread. Other tokens have the number of a
/// target in the high half and that of its source in the low half.
const EXIT: u64 = u64::MAX;
const TARGET_SHIFT: u32 = 32;
/// Upper bound on signals per wait.
const EVENTS: usize = 32;

/// A target with interrupts whose doorbells may not be mapped.
pub(super) trait Retranslate: Send + Sync {
    /// Translates the doorbell of a signalled source again.
    fn retranslate(&self, source: usize);
}

/// Watches the interrupts whose doorbells are not mapped.
pub struct MsiRetranslator {
    epoll: Epoll,
    exit: EventFd,
    targets: LeafMutex<Vec<Weak<dyn Retranslate>>>,
}

impl MsiRetranslator {
    /// A retranslator without a thread.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new() -> io::Result<Arc<Self>> {
        let epoll = Epoll::new()?;
        let exit = EventFd::new(EFD_CLOEXEC)?;
        let event = EpollEvent::new(EventSet::IN, EXIT);
        epoll.ctl(ControlOperation::Add, exit.as_raw_fd(), event)?;
        Ok(Arc::new(Self {
            epoll,
            exit,
            targets: LeafMutex::default(),
        }))
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// No thread is left.
    pub fn start(self: &Arc<Self>) -> io::Result<MsiThread> {
        let retranslator = Arc::clone(self);
        let thread = spawn(ThreadKind::Msi, "msi", move || retranslator.run())?;
        Ok(MsiThread {
            retranslator: Arc::clone(self),
            thread: Some(thread),
        })
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
        let token = u64::from(target) << TARGET_SHIFT | u64::from(source);
        let events = EventSet::IN | EventSet::EDGE_TRIGGERED;
        let interest = EpollEvent::new(events, token);
        self.epoll
            .ctl(ControlOperation::Add, event.as_raw_fd(), interest)
    }

    /// Ends [`watch`](Self::watch) of an eventfd.
    pub(super) fn unwatch(&self, event: &EventFd) -> io::Result<()> {
        let none = EpollEvent::default();
        self.epoll
            .ctl(ControlOperation::Delete, event.as_raw_fd(), none)
    }

    fn run(&self) {
        let mut events = [EpollEvent::default(); EVENTS];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::error!("waiting for interrupts without a mapping: {error}");
                    return;
                }
            };
            for event in events.iter().take(count) {
                match event.data() {
                    EXIT => return,
                    token => self.signalled(token),
                }
            }
        }
    }

    fn signalled(&self, token: u64) {
        let number = usize::try_from(token >> TARGET_SHIFT).unwrap_or(usize::MAX);
        let source = usize::try_from(token & u64::from(u32::MAX)).unwrap_or(usize::MAX);
        let target = self.targets.lock().get(number).and_then(Weak::upgrade);
        if let Some(target) = target {
            target.retranslate(source);
        }
    }
}

/// The thread of an [`MsiRetranslator`]; dropping this ends it.
pub struct MsiThread {
    retranslator: Arc<MsiRetranslator>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for MsiThread {
    fn drop(&mut self) {
        let _ = self.retranslator.exit.write(1);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
