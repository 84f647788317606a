//! Locks with a rank. A thread takes them by ascending rank, which debug builds assert.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// Rank of a lock inside which no other is taken.
pub const LEAF: u8 = 63;

/// A mutex of rank [`LEAF`].
pub type LeafMutex<T> = RankedMutex<T, LEAF>;

/// A mutex with a rank; `docs/architecture.md` lists the ranks.
///
/// The mutex is never poisoned: after a panic the next holder gets the value as
/// it is.
#[derive(Debug, Default)]
pub struct RankedMutex<T, const RANK: u8>(Mutex<T>);

/// A reader-writer lock with a rank, never poisoned. A thread takes it once, for
/// reading too.
#[derive(Debug, Default)]
pub struct RankedRwLock<T, const RANK: u8>(RwLock<T>);

/// Guard of a ranked lock around the guard `G`; dropping it unlocks.
#[derive(Debug)]
pub struct RankedGuard<G> {
    guard: G,
    _held: Held,
}

impl<G> RankedGuard<G> {
    pub(crate) fn new(rank: u8, lock: impl FnOnce() -> Result<G, PoisonError<G>>) -> Self {
        let held = Held::new(rank);
        let guard = lock().unwrap_or_else(PoisonError::into_inner);
        Self { guard, _held: held }
    }
}

impl<T, const RANK: u8> RankedMutex<T, RANK> {
    /// An unlocked mutex.
    pub const fn new(value: T) -> Self {
        Self(Mutex::new(value))
    }

    /// Waits for the lock.
    ///
    /// # Panics
    /// In a debug build, if the thread holds a lock of this or a higher rank.
    pub fn lock(&self) -> RankedGuard<MutexGuard<'_, T>> {
        RankedGuard::new(RANK, || self.0.lock())
    }
}

impl<T, const RANK: u8> RankedRwLock<T, RANK> {
    /// An unlocked lock.
    pub const fn new(value: T) -> Self {
        Self(RwLock::new(value))
    }

    /// Waits for the lock, for reading.
    ///
    /// # Panics
    /// In a debug build, if the thread holds a lock of this or a higher rank.
    pub fn read(&self) -> RankedGuard<RwLockReadGuard<'_, T>> {
        RankedGuard::new(RANK, || self.0.read())
    }

    /// Waits for the lock, for changes.
    ///
    /// # Panics
    /// In a debug build, if the thread holds a lock of this or a higher rank.
    pub fn write(&self) -> RankedGuard<RwLockWriteGuard<'_, T>> {
        RankedGuard::new(RANK, || self.0.write())
    }
}

impl<G: Deref> Deref for RankedGuard<G> {
    type Target = G::Target;

    fn deref(&self) -> &G::Target {
        &self.guard
    }
}

impl<G: DerefMut> DerefMut for RankedGuard<G> {
    fn deref_mut(&mut self) -> &mut G::Target {
        &mut self.guard
    }
}

#[cfg(all(debug_assertions, not(loom)))]
use checked::Held;
#[cfg(any(loom, not(debug_assertions)))]
use unchecked::Held;

#[cfg(all(debug_assertions, not(loom)))]
mod checked {
    use std::cell::Cell;

    thread_local! {
        /// Bit `n` is set while the thread holds a lock of rank `n`.
        static RANKS: Cell<u64> = const { Cell::new(0) };
    }

    /// Marks a rank as held by this thread until it is dropped.
    #[derive(Debug)]
    pub(super) struct Held(u64);

    impl Held {
        pub(super) fn new(rank: u8) -> Self {
            let bit = 1 << rank;
            let held = RANKS.get();
            assert!(
                held < bit,
                "a lock of rank {rank} is taken inside one of rank {}",
                held.checked_ilog2().unwrap_or_default()
            );
            RANKS.set(held | bit);
            Self(bit)
        }
    }

    impl Drop for Held {
        fn drop(&mut self) {
            RANKS.set(RANKS.get() & !self.0);
        }
    }
}

// The threads of loom share the thread-local storage of one.
#[cfg(any(loom, not(debug_assertions)))]
mod unchecked {
    #[derive(Debug)]
    pub(super) struct Held;

    impl Held {
        pub(super) const fn new(_rank: u8) -> Self {
            Self
        }
    }
}

#[cfg(all(test, debug_assertions, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn locks_are_taken_by_ascending_rank_and_released_in_any_order() {
        let (first, second) = (RankedMutex::<_, 1>::new(1), RankedMutex::<_, 2>::new(2));
        for _ in 0..2 {
            let outer = first.lock();
            let inner = second.lock();
            drop(outer);
            assert_eq!(*inner, 2);
        }
        *second.lock() += 1;
        assert_eq!(*second.lock(), 3);
    }

    #[test]
    #[should_panic(expected = "a lock of rank 1 is taken inside one of rank 2")]
    fn a_lock_of_an_earlier_rank_is_not_taken_inside() {
        let (first, second) = (RankedMutex::<_, 1>::new(1), RankedMutex::<_, 2>::new(2));
        let _inner = second.lock();
        let _outer = first.lock();
    }

    #[test]
    #[should_panic(expected = "a lock of rank 1 is taken inside one of rank 1")]
    fn two_locks_of_one_rank_are_not_held_together() {
        let (one, other) = (RankedMutex::<_, 1>::new(1), RankedMutex::<_, 1>::new(2));
        let _outer = one.lock();
        let _inner = other.lock();
    }
}
