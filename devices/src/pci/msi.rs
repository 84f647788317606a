//! Message-signalled interrupts of one requester.
//!
//! An MSI is a memory write of the device, so the IOMMU translates its address
//! like any other. The translation is made when the message is set, and again
//! whenever its mapping changes: while there is none, the interrupt is held
//! back and not sent to where the page used to be.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::{io, thread};

use iommu::{
    Access, AddressSpace, Gpa, IommuNotifier, Iova, IovaRange, Mapping, NotifierEvents, NotifierId,
    NotifierSink, Registration, StreamId,
};
use log::warn;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::interrupt::{MsiMessage, MsiVector};

/// What a PCI function is to the rest of the machine: its memory view and its
/// MSI target, made together from one requester ID (invariant 2).
#[derive(Clone)]
pub struct Requester {
    /// The memory view.
    pub space: AddressSpace,
    /// Where its interrupts go.
    pub msi: Arc<MsiTarget>,
}

impl Requester {
    /// The requester whose view of memory `space` is. `stale` learns of
    /// interrupts that have to be translated again.
    #[must_use]
    pub fn new(space: AddressSpace, stale: &Arc<StaleMsis>) -> Self {
        let msi = Arc::new(MsiTarget {
            sink: Arc::new(Routes {
                requester: space.requester(),
                routes: Mutex::default(),
                stale: Arc::clone(stale),
            }),
            pages: Mutex::default(),
            space: space.clone(),
        });
        stale.add(&msi);
        Self { space, msi }
    }
}

/// A source of interrupts and the message that the guest wants for it.
struct Route {
    vector: Arc<dyn MsiVector>,
    wanted: Option<(Iova, u32)>,
    current: Option<MsiMessage>,
}

/// The routes of a requester. Its lock is taken inside the stream's gate.
struct Routes {
    requester: StreamId,
    routes: Mutex<Vec<Route>>,
    stale: Arc<StaleMsis>,
}

impl Routes {
    fn lock(&self) -> MutexGuard<'_, Vec<Route>> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn send(&self, route: &mut Route, doorbell: Option<Gpa>) {
        let message = route.wanted.zip(doorbell);
        let message = message.map(|((_, data), address)| MsiMessage {
            address,
            data,
            requester: self.requester,
        });
        if route.current == message {
            return;
        }
        route.current = message;
        if let Err(error) = route.vector.route(message) {
            warn!("{}: routing an interrupt: {error}", self.requester);
        }
    }
}

impl NotifierSink for Routes {
    fn map(&self, mapping: &Mapping) {
        if !mapping.perm.allows(Access::Write) {
            return;
        }
        for route in self.lock().iter_mut() {
            let doorbell = route.wanted.and_then(|(iova, _)| mapping.gpa_of(iova));
            if doorbell.is_some() {
                self.send(route, doorbell);
            }
        }
    }

    fn unmap(&self, ranges: &[IovaRange]) {
        let mut any = false;
        for route in self.lock().iter_mut() {
            let Some((iova, _)) = route.wanted else {
                continue;
            };
            if ranges.iter().any(|range| range.contains(iova)) {
                self.send(route, None);
                any = true;
            }
        }
        if any {
            self.stale.wake();
        }
    }

    fn registered(&self, _outcome: &Registration) {}
}

/// The MSI target of one requester. Its methods enter the stream's gate.
pub struct MsiTarget {
    space: AddressSpace,
    sink: Arc<Routes>,
    /// The pages of the doorbells in use, and who listens to each. Taken
    /// outside of the gate.
    pages: Mutex<Vec<(Iova, NotifierId)>>,
}

impl MsiTarget {
    /// Adds a source, sent nowhere. Returns its number, from 0 on.
    pub fn add(&self, vector: Arc<dyn MsiVector>) -> usize {
        let mut routes = self.sink.lock();
        routes.push(Route {
            vector,
            wanted: None,
            current: None,
        });
        routes.len() - 1
    }

    /// Sends source `number` to the message that the guest wrote, or nowhere.
    pub fn set(&self, number: usize, wanted: Option<(Iova, u32)>) {
        if let Some((doorbell, _)) = wanted {
            self.listen(doorbell);
        }
        self.update(|at, route| {
            let mine = at == number;
            if mine {
                route.wanted = wanted;
            }
            mine
        });
        self.stop_listening();
    }

    /// Drops what source `number` has signalled and nobody is told of yet.
    pub fn forget(&self, number: usize) {
        if let Some(route) = self.sink.lock().get(number)
            && route.current.is_none()
        {
            let _ = route.vector.eventfd().read();
        }
    }

    /// Translates again what is held back for want of a translation.
    fn retry(&self) {
        let held_back = |route: &Route| route.wanted.is_some() && route.current.is_none();
        let any = self.sink.lock().iter().any(held_back);
        // The gate is for those who need it.
        if any {
            self.update(|_, route| held_back(route));
        }
    }

    /// Whether source `number` has signalled something that is held back.
    #[must_use]
    pub fn pending(&self, number: usize) -> bool {
        let routes = self.sink.lock();
        routes
            .get(number)
            .is_some_and(|route| route.vector.pending())
    }

    /// Routes anew the sources that `choose` picks.
    fn update(&self, mut choose: impl FnMut(usize, &mut Route) -> bool) {
        let inside = self.space.region().map(|region| region.enter());
        for (at, route) in self.sink.lock().iter_mut().enumerate() {
            if !choose(at, route) {
                continue;
            }
            let doorbell = route.wanted.and_then(|(iova, _)| match &inside {
                None => Some(Gpa(iova.0)),
                Some(inside) => {
                    let mapping = inside.lookup(iova, Access::Write).ok()?;
                    mapping.gpa_of(iova)
                }
            });
            self.sink.send(route, doorbell);
        }
    }

    /// Registers for changes of the doorbell's page, if nobody did.
    fn listen(&self, doorbell: Iova) {
        let Some(region) = self.space.region() else {
            return;
        };
        let page = page_of(doorbell);
        let mut pages = self.pages();
        if pages.iter().all(|(known, _)| *known != page.first()) {
            let id = region.register(IommuNotifier {
                wanted: vec![
                    NotifierEvents::MAP | NotifierEvents::UNMAP,
                    NotifierEvents::UNMAP,
                ],
                range: page,
                sink: Arc::clone(&self.sink) as Arc<dyn NotifierSink>,
            });
            pages.push((page.first(), id));
        }
    }

    /// Gives up the pages that no source is sent to any more: there are never
    /// more listeners than sources.
    fn stop_listening(&self) {
        let Some(region) = self.space.region() else {
            return;
        };
        let used: Vec<Iova> = {
            let routes = self.sink.lock();
            let wanted = routes.iter().filter_map(|route| route.wanted);
            wanted.map(|(iova, _)| page_of(iova).first()).collect()
        };
        self.pages().retain(|(page, id)| {
            let keep = used.contains(page);
            if !keep {
                region.unregister(*id);
            }
            keep
        });
    }

    fn pages(&self) -> MutexGuard<'_, Vec<(Iova, NotifierId)>> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn page_of(doorbell: Iova) -> IovaRange {
    IovaRange::block(doorbell, 12)
}

/// Who has interrupts that lost their translation. An IOMMU that does not
/// announce mappings cannot say when there is a new one, so a thread looks,
/// after each invalidation that took one away. It waits for gates, which a
/// slow disk may hold: nobody else can wait for it.
pub struct StaleMsis {
    wake: EventFd,
    ends: AtomicBool,
    targets: Mutex<Vec<Weak<MsiTarget>>>,
}

impl StaleMsis {
    /// Nobody yet.
    ///
    /// # Errors
    /// No eventfd is left.
    pub fn new() -> io::Result<Arc<Self>> {
        Ok(Arc::new(Self {
            wake: EventFd::new(EFD_CLOEXEC)?,
            ends: AtomicBool::new(false),
            targets: Mutex::default(),
        }))
    }

    /// Starts the thread.
    ///
    /// # Errors
    /// No thread is left.
    pub fn start(self: &Arc<Self>) -> io::Result<MsiThread> {
        let stale = Arc::clone(self);
        let thread = thread::Builder::new().name("msi".to_owned());
        let thread = thread.spawn(move || {
            while stale.wake.read().is_ok() && !stale.ends.load(Ordering::Acquire) {
                stale.retry();
            }
        })?;
        Ok(MsiThread {
            stale: Arc::clone(self),
            thread: Some(thread),
        })
    }

    fn retry(&self) {
        let targets = self.lock().clone();
        for target in targets.iter().filter_map(Weak::upgrade) {
            target.retry();
        }
    }

    fn wake(&self) {
        let _ = self.wake.write(1);
    }

    fn add(&self, target: &Arc<MsiTarget>) {
        self.lock().push(Arc::downgrade(target));
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Weak<MsiTarget>>> {
        self.targets.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The thread of [`StaleMsis`]; dropping this ends it.
pub struct MsiThread {
    stale: Arc<StaleMsis>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for MsiThread {
    fn drop(&mut self) {
        self.stale.ends.store(true, Ordering::Release);
        self.stale.wake();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests;
