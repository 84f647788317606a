//! Message-signalled interrupts of one requester.
//!
//! An MSI is a memory write of the device, so the IOMMU translates its address
//! like any other. It is translated when the message is set, again when its
//! mapping changes, and again when the interrupt is signalled while its address
//! has no mapping. Until there is one the interrupt is pending: it is never
//! sent to an earlier address of the doorbell.

mod retranslate;

use std::sync::{Arc, Weak};

use iommu::lock::RankedMutex;
use iommu::{
    Access, AddressSpace, Gpa, IommuNotifier, IommuRegion, Iova, IovaRange, Mapping,
    NotifierEvents, NotifierId, NotifierSink, Registration, StreamId, Translating,
};
use log::warn;

use crate::interrupt::{MsiMessage, MsiVector};

pub use retranslate::MsiRetranslator;
use retranslate::Retranslate;

/// A PCI function as a requester: its memory view and its MSI target, created
/// together from one requester ID (invariant 2).
#[derive(Clone)]
pub struct Requester {
    /// Address space of its accesses.
    pub space: AddressSpace,
    /// Routes its interrupts.
    pub msi: Arc<MsiTarget>,
}

impl Requester {
    /// The requester with the address space `space`. `retranslator` watches its
    /// interrupts while their doorbells are not mapped.
    #[must_use]
    pub fn new(space: AddressSpace, retranslator: &Arc<MsiRetranslator>) -> Self {
        let msi = Arc::new_cyclic(|target: &Weak<MsiTarget>| MsiTarget {
            sink: Arc::new(RequesterVectors {
                requester: space.requester(),
                region: space.region().map(Arc::downgrade).unwrap_or_default(),
                routes: RankedMutex::default(),
                number: retranslator.add(target.clone()),
                retranslator: Arc::clone(retranslator),
            }),
            pages: RankedMutex::default(),
            space: space.clone(),
        });
        Self { space, msi }
    }
}

impl Retranslate for MsiTarget {
    fn retranslate(&self, source: usize) {
        self.retry(source);
    }
}

/// A source of interrupts and the message that the guest wrote for it.
struct Route {
    vector: Arc<dyn MsiVector>,
    /// Address and data; `None` while the source is masked.
    wanted: Option<(Iova, u32)>,
    current: Option<MsiMessage>,
    /// The hypervisor refused the message: the source has no route until the
    /// guest writes another message.
    refused: bool,
    /// The retranslator watches the eventfd.
    watched: bool,
    /// The model has recorded the fault of the present message.
    recorded: bool,
}

impl Route {
    /// Whether the source is pending until its doorbell is mapped.
    fn unmapped(&self) -> bool {
        self.wanted.is_some() && self.current.is_none() && !self.refused
    }
}

/// Index of a source, and the untranslated doorbell address of its message.
type Doorbell = (usize, Iova);

/// The routes of a requester. Their lock is taken inside the stream's gate, and
/// nothing is translated under it. `Route::wanted` changes only while the gate
/// is held.
struct RequesterVectors {
    requester: StreamId,
    /// Empty without an IOMMU. Weak, because the region owns its sinks.
    region: Weak<IommuRegion>,
    routes: RankedMutex<Vec<Route>, 8>,
    /// Number of the target in the retranslator.
    number: u32,
    retranslator: Arc<MsiRetranslator>,
}

impl RequesterVectors {
    /// The doorbells of the sources that `choose` selects.
    fn doorbells(&self, choose: impl Fn(usize, &Route) -> bool) -> Vec<Doorbell> {
        let routes = self.routes.lock();
        let chosen = routes.iter().enumerate().filter_map(|(at, route)| {
            let (iova, _) = route.wanted?;
            choose(at, route).then_some((at, iova))
        });
        chosen.collect()
    }

    /// Routes sources to their translated doorbells. An unchanged message costs
    /// no call of the hypervisor. The gate has been held since the translation.
    fn apply(&self, translated: &[(Doorbell, Option<Gpa>)]) {
        let mut routes = self.routes.lock();
        for &((at, iova), gpa) in translated {
            if let Some(route) = routes.get_mut(at)
                && route.wanted.is_some_and(|(wanted, _)| wanted == iova)
            {
                self.send(at, route, gpa);
            }
        }
    }

    fn send(&self, at: usize, route: &mut Route, doorbell: Option<Gpa>) {
        let message = route.wanted.zip(doorbell);
        let message = message.map(|((_, data), address)| MsiMessage {
            address,
            data,
            requester: self.requester,
        });
        if route.current != message {
            route.current = message;
            if let Err(error) = route.vector.route(message) {
                warn!("{}: routing an interrupt: {error}", self.requester);
                route.current = None;
                route.refused = true;
            }
        }
        if route.current.is_some() {
            route.recorded = false;
        }
        self.watch(at, route);
    }

    /// Marks the fault of a source as recorded. Returns whether it was not.
    fn first_fault_of(&self, at: usize) -> bool {
        let mut routes = self.routes.lock();
        let route = routes.get_mut(at);
        route.is_some_and(|route| !std::mem::replace(&mut route.recorded, true))
    }

    /// Makes the retranslator watch a source exactly while its doorbell is not
    /// mapped.
    fn watch(&self, at: usize, route: &mut Route) {
        let unmapped = route.unmapped();
        if unmapped == route.watched {
            return;
        }
        let event = route.vector.eventfd();
        let done = if unmapped {
            self.retranslator.watch(self.number, at, event)
        } else {
            self.retranslator.unwatch(event)
        };
        match done {
            Ok(()) => route.watched = unmapped,
            Err(error) => warn!("{}: watching an interrupt: {error}", self.requester),
        }
    }
}

impl NotifierSink for RequesterVectors {
    fn map(&self, mapping: &Mapping) {
        if !mapping.perm.allows(Access::Write) {
            return;
        }
        let doorbells = self.doorbells(|_, _| true).into_iter();
        let translated = doorbells.filter_map(|doorbell| {
            let gpa = mapping.gpa_of(doorbell.1)?;
            Some((doorbell, Some(gpa)))
        });
        self.apply(&translated.collect::<Vec<_>>());
    }

    /// Routes the doorbells in the ranges again. Most invalidations (a guest
    /// that flushes everything) change no doorbell: the message with the
    /// hypervisor then stays. A changed one is replaced before the invalidation
    /// is complete.
    fn unmap(&self, ranges: &[IovaRange]) {
        let gone = |iova| ranges.iter().any(|range| range.contains(iova));
        let doorbells = self.doorbells(|_, route| route.wanted.is_some_and(|(iova, _)| gone(iova)));
        let region = self.region.upgrade();
        let translated = translate_all(doorbells, |iova| {
            let mapping = region.as_ref()?.lookup(iova, Access::Write).ok()?;
            mapping.gpa_of(iova)
        });
        self.apply(&translated);
    }

    fn registered(&self, _outcome: &Registration) {}
}

/// Translates each doorbell; consecutive equal addresses only once.
fn translate_all(
    doorbells: Vec<Doorbell>,
    translate: impl Fn(Iova) -> Option<Gpa>,
) -> Vec<(Doorbell, Option<Gpa>)> {
    let mut last: Option<(Iova, Option<Gpa>)> = None;
    let translated = doorbells.into_iter().map(|doorbell| {
        let (_, iova) = doorbell;
        let known = last.filter(|(known, _)| *known == iova);
        let (_, gpa) = known.unwrap_or_else(|| (iova, translate(iova)));
        last = Some((iova, gpa));
        (doorbell, gpa)
    });
    translated.collect()
}

/// The MSI target of one requester. Its methods enter the stream's gate.
pub struct MsiTarget {
    space: AddressSpace,
    sink: Arc<RequesterVectors>,
    /// The pages of the doorbells in use, each with its notifier. Locked
    /// outside of the gate.
    pages: RankedMutex<Vec<(Iova, NotifierId)>, 5>,
}

impl MsiTarget {
    /// Adds a source without a message. Returns its number, from 0 on.
    pub fn add(&self, vector: Arc<dyn MsiVector>) -> usize {
        let mut routes = self.sink.routes.lock();
        routes.push(Route {
            vector,
            wanted: None,
            current: None,
            refused: false,
            watched: false,
            recorded: false,
        });
        routes.len() - 1
    }

    /// Routes source `number` to the untranslated message that the guest wrote;
    /// `None` removes its route.
    pub fn set(&self, number: usize, wanted: Option<(Iova, u32)>) {
        if let Some((doorbell, _)) = wanted {
            self.register_page(doorbell);
        }
        {
            let inside = self.space.region().map(|region| region.enter());
            if let Some(route) = self.sink.routes.lock().get_mut(number) {
                route.wanted = wanted;
                (route.refused, route.recorded) = (false, false);
                if wanted.is_none() {
                    self.sink.send(number, route, None);
                }
            }
            self.route(inside.as_ref(), |at, _| at == number, None);
        }
        self.unregister_unused();
    }

    /// Drops a pending signal of source `number`.
    pub fn clear_pending(&self, number: usize) {
        if let Some(route) = self.sink.routes.lock().get(number)
            && route.current.is_none()
        {
            let _ = route.vector.eventfd().read();
        }
    }

    /// Translates the unmapped doorbells again, because source `signalled` was
    /// signalled. If its doorbell is still not mapped, the write of the MSI is
    /// a fault, which the model records once per message that the guest set up.
    fn retry(&self, signalled: usize) {
        let unmapped = |_, route: &Route| route.unmapped();
        // The gate may be held for long: it is entered only if needed.
        if self.sink.doorbells(unmapped).is_empty() {
            return;
        }
        let inside = self.space.region().map(|region| region.enter());
        self.route(inside.as_ref(), unmapped, Some(signalled));
    }

    /// Whether source `number` has a pending signal.
    #[must_use]
    pub fn pending(&self, number: usize) -> bool {
        let routes = self.sink.routes.lock();
        routes
            .get(number)
            .is_some_and(|route| route.vector.pending())
    }

    /// Translates and routes the sources that `choose` selects. A fault of
    /// `signalled` is recorded, once per message.
    fn route(
        &self,
        inside: Option<&Translating<'_>>,
        choose: impl Fn(usize, &Route) -> bool,
        signalled: Option<usize>,
    ) {
        let doorbells = self.sink.doorbells(choose);
        let mut translated = translate_all(doorbells, |iova| match inside {
            None => Some(Gpa(iova.0)),
            Some(inside) => inside.lookup(iova, Access::Write).ok()?.gpa_of(iova),
        });
        let faulted =
            (translated.iter_mut()).find(|((at, _), gpa)| Some(*at) == signalled && gpa.is_none());
        if let (Some(((at, iova), gpa)), Some(inside)) = (faulted, inside)
            && self.sink.first_fault_of(*at)
        {
            let mapping = inside.translate(*iova, Access::Write).ok();
            *gpa = mapping.and_then(|mapping| mapping.gpa_of(*iova));
        }
        self.sink.apply(&translated);
    }

    /// Registers a notifier for the doorbell's page, if it has none.
    fn register_page(&self, doorbell: Iova) {
        let Some(region) = self.space.region() else {
            return;
        };
        let page = page_of(doorbell);
        let mut pages = self.pages.lock();
        if pages.iter().all(|(known, _)| *known != page.first()) {
            let id = region.register(IommuNotifier {
                acceptable: vec![
                    NotifierEvents::MAP | NotifierEvents::UNMAP,
                    NotifierEvents::UNMAP,
                ],
                range: page,
                sink: Arc::clone(&self.sink) as Arc<dyn NotifierSink>,
            });
            pages.push((page.first(), id));
        }
    }

    /// Unregisters the notifiers of pages without a source, so that there are
    /// never more notifiers than sources.
    fn unregister_unused(&self) {
        let Some(region) = self.space.region() else {
            return;
        };
        let used: Vec<Iova> = {
            let routes = self.sink.routes.lock();
            let wanted = routes.iter().filter_map(|route| route.wanted);
            wanted.map(|(iova, _)| page_of(iova).first()).collect()
        };
        self.pages.lock().retain(|(page, id)| {
            let keep = used.contains(page);
            if !keep {
                region.unregister(*id);
            }
            keep
        });
    }
}

fn page_of(doorbell: Iova) -> IovaRange {
    IovaRange::block(doorbell, 12)
}

#[cfg(test)]
mod tests;
