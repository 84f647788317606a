//! An IOMMU of 4 KiB pages that delivers a configurable set of events, for tests
//! of other crates and for fuzz targets.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use crate::{
    Access, Fault, FaultReason, Gpa, Iommu, Iova, IovaRange, Mapping, NotifierEvents, Perm,
    Refused, Request, StreamId, StreamSink,
};

/// Bytes of a page.
pub const PAGE: u64 = 4096;

/// The IOMMU, with one table for every stream.
#[derive(Default)]
pub struct Pages(Mutex<PageState>);

/// The table, and the requests so far.
#[derive(Default)]
pub struct PageState {
    /// Target and permission of each page, by I/O virtual address.
    pub pages: BTreeMap<u64, (u64, Perm)>,
    /// All addresses are guest-physical.
    pub bypass: bool,
    /// Events that are delivered.
    pub delivers: NotifierEvents,
    /// Number of translations, and of lookups.
    pub requests: (usize, usize),
    /// Accesses that faulted, lookups left out.
    pub faults: Vec<(Iova, Access)>,
    sink: Option<Weak<dyn StreamSink>>,
}

/// The page that starts at `iova`.
///
/// # Panics
/// Beyond the last page.
#[must_use]
pub fn page(iova: u64) -> IovaRange {
    IovaRange::from_len(Iova(iova), PAGE).unwrap()
}

fn mapping(iova: u64, (gpa, perm): (u64, Perm)) -> Mapping {
    Mapping {
        iova: page(iova),
        gpa: Gpa(gpa),
        perm,
    }
}

impl Pages {
    /// An empty table of an IOMMU that delivers these events.
    #[must_use]
    pub fn new(delivers: NotifierEvents) -> Arc<Self> {
        let pages = Self::default();
        pages.state().delivers = delivers;
        Arc::new(pages)
    }

    /// The state, for changes without a notification.
    ///
    /// # Panics
    /// After a panic of another holder.
    pub fn state(&self) -> MutexGuard<'_, PageState> {
        self.0.lock().unwrap()
    }

    /// The sink of the stream that was connected last.
    ///
    /// # Panics
    /// No stream is connected.
    #[must_use]
    pub fn region(&self) -> Arc<dyn StreamSink> {
        self.state().sink.as_ref().unwrap().upgrade().unwrap()
    }

    /// Maps a page that was not mapped.
    pub fn map(&self, iova: u64, gpa: u64, perm: Perm) {
        self.state().pages.insert(iova, (gpa, perm));
        self.region().map(&mapping(iova, (gpa, perm)));
    }

    /// Unmaps pages and invalidates them together.
    pub fn unmap(&self, iovas: &[u64]) {
        for iova in iovas {
            self.state().pages.remove(iova);
        }
        let ranges: Vec<_> = iovas.iter().map(|&iova| page(iova)).collect();
        self.region().invalidate(&ranges);
    }
}

impl PageState {
    fn find(&self, request: &Request) -> Result<Mapping, Fault> {
        let fault = |reason| Fault::new(request, reason);
        if self.bypass {
            return Ok(Mapping {
                iova: IovaRange::ALL,
                gpa: Gpa(0),
                perm: Perm::READ_WRITE,
            });
        }
        let first = request.iova.0 & !(PAGE - 1);
        let found = self.pages.get(&first);
        let &(gpa, perm) = found.ok_or_else(|| fault(FaultReason::Translation))?;
        if !perm.allows(request.access) {
            return Err(fault(FaultReason::Permission));
        }
        Ok(mapping(first, (gpa, perm)))
    }
}

impl Iommu for Pages {
    fn translate(&self, request: &Request) -> Result<Mapping, Fault> {
        let mut state = self.state();
        state.requests.0 += 1;
        let answer = state.find(request);
        if answer.is_err() {
            state.faults.push((request.iova, request.access));
        }
        answer
    }

    fn lookup(&self, request: &Request) -> Result<Mapping, Fault> {
        let mut state = self.state();
        state.requests.1 += 1;
        state.find(request)
    }

    fn notifier_events_changed(
        &self,
        _stream: StreamId,
        _old: NotifierEvents,
        new: NotifierEvents,
    ) -> Result<(), Refused> {
        if self.state().delivers.contains(new) {
            return Ok(());
        }
        Err(Refused {
            events: new,
            reason: "the test does not deliver it",
        })
    }

    fn replay(
        &self,
        _stream: StreamId,
        _range: IovaRange,
        visit: &mut dyn FnMut(&Mapping) -> std::ops::ControlFlow<()>,
    ) {
        let pages = self.state().pages.clone();
        for (iova, to) in pages {
            if visit(&mapping(iova, to)).is_break() {
                break;
            }
        }
    }

    fn connect(&self, _stream: StreamId, sink: Weak<dyn StreamSink>) {
        self.state().sink = Some(sink);
    }
}
