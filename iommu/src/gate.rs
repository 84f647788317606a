//! The gate of a stream: what makes an invalidation complete.
//!
//! A thread that translates and then uses or publishes the answer holds the gate
//! shared while the answer is in use. An invalidation changes the tables first,
//! then closes the gate (which waits until no thread holds it), notifies, and
//! opens it again. So:
//!
//! * an access that began under the old translation has ended when the
//!   invalidation returns (invariant 3);
//! * an answer is published to a consumer before the invalidation that the
//!   consumer sees, never after it (invariant 4).

#[cfg(loom)]
use loom::sync::{RwLock, RwLockReadGuard, RwLockWriteGuard};
#[cfg(not(loom))]
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// The gate. It is not re-entrant: a thread that holds it must not ask again.
#[derive(Debug, Default)]
pub struct Gate(RwLock<()>);

/// Shared hold, for translating and using the answer.
pub type Entered<'a> = RwLockReadGuard<'a, ()>;
/// Exclusive hold, for an invalidation.
pub type Closed<'a> = RwLockWriteGuard<'a, ()>;

impl Gate {
    /// Enters: from here until the guard is dropped, an answer of the IOMMU
    /// for this stream stays valid.
    pub fn enter(&self) -> Entered<'_> {
        // The lock protects no data, so a poisoned one is still valid.
        #[cfg(not(loom))]
        return self.0.read().unwrap_or_else(PoisonError::into_inner);
        #[cfg(loom)]
        self.0.read().expect("loom does not poison")
    }

    /// Waits until no thread holds the gate, and holds it exclusively.
    pub fn close(&self) -> Closed<'_> {
        #[cfg(not(loom))]
        return self.0.write().unwrap_or_else(PoisonError::into_inner);
        #[cfg(loom)]
        self.0.write().expect("loom does not poison")
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use loom::thread;

    use super::*;

    /// A page that is mapped until it is unmapped, a kernel IOTLB that holds
    /// it or not, and a flag for "the device is using it".
    #[derive(Default)]
    struct World {
        gate: Gate,
        mapped: AtomicBool,
        published: AtomicBool,
        using: AtomicUsize,
    }

    fn unmap(world: &World) {
        world.mapped.store(false, Ordering::Release);
        let _closed = world.gate.close();
        world.published.store(false, Ordering::Release);
    }

    #[test]
    fn stale_update_never_follows_its_invalidate() {
        loom::model(|| {
            let world = Arc::new(World::default());
            world.mapped.store(true, Ordering::Release);
            let miss = {
                let world = Arc::clone(&world);
                thread::spawn(move || {
                    let _inside = world.gate.enter();
                    if world.mapped.load(Ordering::Acquire) {
                        world.published.store(true, Ordering::Release);
                    }
                })
            };
            unmap(&world);
            miss.join().unwrap();
            assert!(!world.published.load(Ordering::Acquire));
        });
    }

    #[test]
    fn no_access_runs_on_after_its_unmap_returned() {
        loom::model(|| {
            let world = Arc::new(World::default());
            world.mapped.store(true, Ordering::Release);
            let device = {
                let world = Arc::clone(&world);
                thread::spawn(move || {
                    let _inside = world.gate.enter();
                    if world.mapped.load(Ordering::Acquire) {
                        world.using.fetch_add(1, Ordering::AcqRel);
                        thread::yield_now();
                        world.using.fetch_sub(1, Ordering::AcqRel);
                    }
                })
            };
            unmap(&world);
            assert_eq!(world.using.load(Ordering::Acquire), 0);
            device.join().unwrap();
        });
    }
}
