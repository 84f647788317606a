//! The gate of a stream: makes an invalidation wait for accesses under the old
//! translation.
//!
//! A thread that translates and then uses or publishes the result holds the
//! gate shared while the result is in use. An invalidation changes the tables
//! first, then closes the gate (which waits until no thread holds it),
//! notifies, and opens it again. So:
//!
//! * an access that began under the old translation has ended when the
//!   invalidation returns (invariant 3);
//! * a translation is published to a consumer before its invalidation, never
//!   after it (invariant 4).
//!
//! A thread that leaves the gate and enters it again at once could overtake a
//! waiting invalidation without end. So a thread that enters lets a waiting
//! invalidation go first: it waits only for accesses that have already begun.

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

use crate::lock::RankedGuard;

/// The gate. It is not re-entrant: a thread that holds it must not enter again.
#[derive(Debug, Default)]
pub struct Gate {
    lock: RwLock<()>,
    /// Invalidations that wait for `lock`.
    closing: AtomicUsize,
    /// Held by the next invalidation until it has `lock`.
    next: Mutex<()>,
}

/// Rank of both locks.
const RANK: u8 = 6;

/// Shared guard: permits translating and using the result.
pub type Entered<'a> = RankedGuard<RwLockReadGuard<'a, ()>>;
/// Exclusive guard of an invalidation.
pub type Closed<'a> = RankedGuard<RwLockWriteGuard<'a, ()>>;

impl Gate {
    /// Takes the gate shared. A translation of this stream stays valid until
    /// the guard is dropped.
    pub fn enter(&self) -> Entered<'_> {
        if self.closing.load(Ordering::Relaxed) != 0 {
            drop(RankedGuard::new(RANK, || self.next.lock()));
        }
        RankedGuard::new(RANK, || self.lock.read())
    }

    /// Waits until no thread holds the gate, and takes it exclusively.
    /// [`Gate::enter`] waits until the guard is dropped.
    pub fn close(&self) -> Closed<'_> {
        self.closing.fetch_add(1, Ordering::Relaxed);
        RankedGuard::new(RANK, || {
            let _next = self.next.lock();
            let closed = self.lock.write();
            self.closing.fetch_sub(1, Ordering::Relaxed);
            closed
        })
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::AtomicBool;
    use std::thread;

    use super::*;

    #[test]
    fn a_thread_that_reenters_waits_for_the_pending_invalidation() {
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

    /// Whether the page is mapped, whether the kernel IOTLB has it, and whether
    /// the device accesses it.
    #[derive(Default)]
    struct State {
        gate: Gate,
        mapped: AtomicBool,
        published: AtomicBool,
        using: AtomicUsize,
    }

    fn unmap(state: &State) {
        state.mapped.store(false, Ordering::Release);
        let _closed = state.gate.close();
        state.published.store(false, Ordering::Release);
    }

    #[test]
    fn stale_update_never_follows_its_invalidate() {
        loom::model(|| {
            let state = Arc::new(State::default());
            state.mapped.store(true, Ordering::Release);
            let miss = {
                let state = Arc::clone(&state);
                thread::spawn(move || {
                    let _inside = state.gate.enter();
                    if state.mapped.load(Ordering::Acquire) {
                        state.published.store(true, Ordering::Release);
                    }
                })
            };
            unmap(&state);
            miss.join().unwrap();
            assert!(!state.published.load(Ordering::Acquire));
        });
    }

    #[test]
    fn no_access_continues_after_its_unmap_returned() {
        loom::model(|| {
            let state = Arc::new(State::default());
            state.mapped.store(true, Ordering::Release);
            let device = {
                let state = Arc::clone(&state);
                thread::spawn(move || {
                    let _inside = state.gate.enter();
                    if state.mapped.load(Ordering::Acquire) {
                        state.using.fetch_add(1, Ordering::AcqRel);
                        thread::yield_now();
                        state.using.fetch_sub(1, Ordering::AcqRel);
                    }
                })
            };
            unmap(&state);
            assert_eq!(state.using.load(Ordering::Acquire), 0);
            device.join().unwrap();
        });
    }
}
