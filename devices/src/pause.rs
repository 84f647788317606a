//! Interruption of a device's work when the machine is paused or stopped.
//!
//! A driver chooses how much work one register write starts: a ring of
//! requests, a queue of commands. Between two of them the device checks by its
//! [`Deferral`] whether a pause or a stop is requested. If so, it defers the
//! rest, and a vCPU thread continues it when the machine resumes, before it
//! enters the guest ([`PauseRequest::resume_deferred`]).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use iommu::lock::LeafMutex;

/// A device that may have deferred work.
pub trait Resumable: Send + Sync {
    /// Continues the deferred work. Called on a vCPU thread without a lock; may
    /// defer the rest again.
    fn resume(&self);
}

/// State of a pause that vCPU threads and devices share.
#[derive(Default)]
pub struct PauseRequest {
    requested: AtomicBool,
    /// Whether a device has deferred work. Set after the device's own flag.
    deferred: AtomicBool,
    devices: LeafMutex<Vec<Arc<Entry>>>,
}

#[derive(Default)]
struct Entry {
    deferred: AtomicBool,
    device: OnceLock<Weak<dyn Resumable>>,
}

impl PauseRequest {
    /// Makes devices defer their work between two requests, until
    /// [`clear`](Self::clear).
    pub fn set(&self) {
        self.requested.store(true, Ordering::SeqCst);
    }

    /// Ends the request. The caller wakes the vCPU threads afterwards, and each
    /// calls [`resume_deferred`](Self::resume_deferred).
    pub fn clear(&self) {
        self.requested.store(false, Ordering::SeqCst);
    }

    /// Creates the handle of one device.
    pub fn deferral(self: &Arc<Self>) -> Deferral {
        let entry = Arc::<Entry>::default();
        self.devices.lock().push(Arc::clone(&entry));
        Deferral {
            request: Arc::clone(self),
            entry,
        }
    }

    /// Continues the deferred work of devices, unless a pause is requested.
    /// Each vCPU thread calls it after every exit and after it was parked, so
    /// work that one thread deferred is never lost.
    pub fn resume_deferred(&self) {
        if !self.deferred.load(Ordering::SeqCst) || self.requested.load(Ordering::SeqCst) {
            return;
        }
        self.deferred.store(false, Ordering::SeqCst);
        let entries = self.devices.lock().clone();
        for entry in entries {
            if entry.deferred.swap(false, Ordering::SeqCst)
                && let Some(device) = entry.device.get().and_then(Weak::upgrade)
            {
                device.resume();
            }
        }
    }
}

/// One device's handle of a [`PauseRequest`]. The default never interrupts.
#[derive(Clone, Default)]
pub struct Deferral {
    request: Arc<PauseRequest>,
    entry: Arc<Entry>,
}

impl Deferral {
    /// Sets the device to resume. Only the first call has an effect.
    pub fn resumes(&self, device: Weak<dyn Resumable>) {
        let _ = self.entry.device.set(device);
    }

    /// Whether to defer the rest of the work. If so, the device is resumed
    /// later. Called on a vCPU thread.
    #[must_use]
    pub fn interrupts(&self) -> bool {
        if !self.request.requested.load(Ordering::SeqCst) {
            return false;
        }
        self.entry.deferred.store(true, Ordering::SeqCst);
        self.request.deferred.store(true, Ordering::SeqCst);
        true
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;

    use super::*;

    /// Counts down its work, one unit per step.
    struct Worker {
        left: AtomicU32,
        deferral: Deferral,
    }

    impl Worker {
        fn new(pause: &Arc<PauseRequest>, left: u32) -> Arc<Self> {
            let worker = Arc::new(Self {
                left: left.into(),
                deferral: pause.deferral(),
            });
            let weak: Weak<Self> = Arc::downgrade(&worker);
            worker.deferral.resumes(weak);
            worker
        }

        fn left(&self) -> u32 {
            self.left.load(Ordering::SeqCst)
        }
    }

    impl Resumable for Worker {
        fn resume(&self) {
            while self.left() > 0 && !self.deferral.interrupts() {
                self.left.fetch_sub(1, Ordering::SeqCst);
            }
        }
    }

    #[test]
    fn work_deferred_at_a_pause_is_done_after_it_and_once() {
        let pause = Arc::<PauseRequest>::default();
        let (worker, other) = (Worker::new(&pause, 3), Worker::new(&pause, 5));
        pause.set();
        worker.resume();
        assert_eq!(worker.left(), 3);
        pause.resume_deferred();
        assert_eq!(worker.left(), 3, "it worked while paused");
        pause.clear();
        pause.resume_deferred();
        assert_eq!((worker.left(), other.left()), (0, 5));
        worker.left.store(1, Ordering::SeqCst);
        pause.resume_deferred();
        assert_eq!(
            worker.left(),
            1,
            "it was resumed though it deferred nothing"
        );
    }

    #[test]
    fn work_that_is_interrupted_again_is_resumed_again() {
        let pause = Arc::<PauseRequest>::default();
        let worker = Worker::new(&pause, 2);
        for _ in 0..3 {
            pause.set();
            worker.resume();
            assert_eq!(worker.left(), 2);
        }
        pause.clear();
        pause.resume_deferred();
        assert_eq!(worker.left(), 0);
    }
}
