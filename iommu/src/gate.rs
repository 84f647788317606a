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
//!
//! A thread that leaves the gate and enters it again at once would be faster than
//! an invalidation that has to be woken first, again and again. So threads that
//! enter let an invalidation that waits go first: it waits for the accesses that
//! have begun, and for no others.

use std::sync::{LockResult, PoisonError};
#[cfg(not(loom))]
use std::sync::{
    Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicUsize, Ordering},
};

#[cfg(loom)]
use loom::sync::{
    Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard,
    atomic::{AtomicUsize, Ordering},
};

/// The gate. It is not re-entrant: a thread that holds it must not ask again.
#[derive(Debug, Default)]
pub struct Gate {
    lock: RwLock<()>,
    /// Invalidations that wait for `lock`.
    closing: AtomicUsize,
    /// Held by the invalidation that is next, until it has `lock`.
    next: Mutex<()>,
}

/// Shared hold, for translating and using the answer.
pub type Entered<'a> = RwLockReadGuard<'a, ()>;
/// Exclusive hold, for an invalidation.
pub type Closed<'a> = RwLockWriteGuard<'a, ()>;

impl Gate {
    /// Enters: from here until the guard is dropped, an answer of the IOMMU
    /// for this stream stays valid.
    pub fn enter(&self) -> Entered<'_> {
        if self.closing.load(Ordering::Relaxed) != 0 {
            drop(valid(self.next.lock()));
        }
        valid(self.lock.read())
    }

    /// Waits until no thread holds the gate, and holds it exclusively. Threads
    /// that come to [`Gate::enter`] meanwhile wait until it is open again.
    pub fn close(&self) -> Closed<'_> {
        self.closing.fetch_add(1, Ordering::Relaxed);
        let next = valid(self.next.lock());
        let closed = valid(self.lock.write());
        self.closing.fetch_sub(1, Ordering::Relaxed);
        drop(next);
        closed
    }
}

/// The guard of a lock that protects no data: that of a poisoned one is as valid.
fn valid<G>(guard: LockResult<G>) -> G {
    guard.unwrap_or_else(PoisonError::into_inner)
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    #[test]
    fn a_thread_that_enters_again_waits_for_the_invalidation_that_waits_for_it() {
        let gate = Gate::default();
        let closed = AtomicBool::new(false);
        thread::scope(|scope| {
            let entered = gate.enter();
            scope.spawn(|| {
                let _closed = gate.close();
                closed.store(true, Ordering::SeqCst);
            });
            // Until the invalidation is next.
            while gate.next.try_lock().is_ok() {
                thread::yield_now();
            }
            drop(entered);
            let _entered = gate.enter();
            assert!(closed.load(Ordering::SeqCst));
        });
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use loom::sync::Arc;
    use loom::sync::atomic::AtomicBool;
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
