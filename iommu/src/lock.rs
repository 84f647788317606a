//! Mutexes with a rank. A thread takes them by ascending rank, which debug builds assert.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// A mutex with a rank; `docs/architecture.md` lists the ranks.
///
/// The mutex is never poisoned: after a panic the next holder gets the value as
/// it is.
#[derive(Debug)]
pub struct RankedMutex<T, const RANK: u8>(Mutex<T>);

/// Guard of a [`RankedMutex`]; dropping it unlocks.
#[derive(Debug)]
pub struct RankedGuard<'a, T, const RANK: u8> {
    guard: MutexGuard<'a, T>,
    _held: Held,
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
    pub fn lock(&self) -> RankedGuard<'_, T, RANK> {
        let held = Held::new(RANK);
        let guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        RankedGuard { guard, _held: held }
    }
}

impl<T: Default, const RANK: u8> Default for RankedMutex<T, RANK> {
    fn default() -> Self {
        Self::new(T::default())
    }
}

impl<T, const RANK: u8> Deref for RankedGuard<'_, T, RANK> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T, const RANK: u8> DerefMut for RankedGuard<'_, T, RANK> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

#[cfg(debug_assertions)]
use checked::Held;
#[cfg(not(debug_assertions))]
use unchecked::Held;

#[cfg(debug_assertions)]
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

#[cfg(not(debug_assertions))]
mod unchecked {
    #[derive(Debug)]
    pub(super) struct Held;

    impl Held {
        pub(super) const fn new(_rank: u8) -> Self {
            Self
        }
    }
}

#[cfg(all(test, debug_assertions))]
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
