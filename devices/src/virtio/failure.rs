//! A device failure that happens away from the vCPUs.

use std::sync::{Mutex, OnceLock, PoisonError};

use super::DeviceError;

/// Is told that there is a failure to be taken. Called without any lock.
pub type Alarm = Box<dyn Fn() + Send + Sync>;

/// Keeps the first failure until the transport takes it.
#[derive(Default)]
pub struct Failure {
    state: Mutex<State>,
    alarm: OnceLock<Alarm>,
}

#[derive(Default)]
struct State {
    waiting: Option<DeviceError>,
    failed: bool,
    silent: bool,
}

impl Failure {
    /// Notes a failure; all but the first since the last reset are dropped.
    /// Sound the alarm afterwards, when no lock is held.
    pub fn raise(&self, error: DeviceError) {
        let mut state = self.state();
        if !state.failed {
            *state = State {
                waiting: Some(error),
                failed: true,
                silent: true,
            };
        }
    }

    /// Takes the failure, if there is one.
    pub fn take(&self) -> Option<DeviceError> {
        self.state().waiting.take()
    }

    /// The device is reset: the next failure counts again.
    pub fn clear(&self) {
        *self.state() = State::default();
    }

    /// Whom to tell; the first who asks is told.
    pub fn on_failure(&self, alarm: Alarm) {
        let _ = self.alarm.set(alarm);
    }

    /// Tells whoever wants to know of a failure that nobody was told of yet.
    /// The caller holds no lock.
    pub fn sound(&self) {
        if std::mem::take(&mut self.state().silent) {
            self.notify();
        }
    }

    /// Has the transport look at the device. The caller holds no lock.
    pub fn notify(&self) {
        if let Some(alarm) = self.alarm.get() {
            alarm();
        }
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn error(queue: u16) -> DeviceError {
        DeviceError::BadQueue {
            queue,
            reason: "of a test",
        }
    }

    #[test]
    fn first_failure_is_told_once_until_a_reset() {
        let failure = Failure::default();
        let told = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&told);
        failure.on_failure(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        failure.raise(error(1));
        failure.raise(error(2));
        failure.sound();
        failure.sound();
        assert_eq!(told.load(Ordering::Relaxed), 1);
        let taken = failure.take();
        assert!(matches!(
            taken,
            Some(DeviceError::BadQueue { queue: 1, .. })
        ));
        failure.raise(error(3));
        assert!(failure.take().is_none());
        failure.clear();
        failure.raise(error(4));
        failure.sound();
        assert_eq!(told.load(Ordering::Relaxed), 2);
    }
}
