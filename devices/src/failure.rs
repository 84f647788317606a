//! Failures of a device that set DEVICE_NEEDS_RESET (virtio 1.2 §2.1.1).

use std::io;
use std::sync::OnceLock;

use iommu::lock::LeafMutex;

/// Error after which a device does not work until a reset. The transport logs
/// it once and sets DEVICE_NEEDS_RESET.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver set up an invalid queue, or broke the rules of a ring.
    #[error("the driver's set-up of queue {queue} cannot be used: {reason}")]
    BadQueue {
        /// Index of the queue on the device.
        queue: u16,
        /// The rule that was broken.
        reason: &'static str,
    },
    /// The back end failed.
    #[error("{what}")]
    Backend {
        /// The operation that failed.
        what: &'static str,
        /// Error of the system call.
        #[source]
        source: io::Error,
    },
}

impl DeviceError {
    /// Wraps an `io::Error` of the back end; `what` is the operation that
    /// failed.
    pub fn backend(what: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Backend { what, source }
    }
}

/// Makes the transport check its device. Called without any lock.
pub type FailureCallback = Box<dyn Fn() + Send + Sync>;

/// Keeps the first failure on a worker thread or in a back end until the
/// transport takes it.
#[derive(Default)]
pub struct FailureLatch {
    state: LeafMutex<State>,
    callback: OnceLock<FailureCallback>,
}

#[derive(Default)]
struct State {
    pending: Option<DeviceError>,
    failed: bool,
    unnotified: bool,
}

impl FailureLatch {
    /// Records a failure; all but the first since the last reset are dropped.
    /// The caller calls [`notify`](Self::notify) afterwards, without a lock.
    pub fn record(&self, error: DeviceError) {
        let mut state = self.state.lock();
        if !state.failed {
            *state = State {
                pending: Some(error),
                failed: true,
                unnotified: true,
            };
        }
    }

    /// Removes and returns the recorded failure.
    pub fn take(&self) -> Option<DeviceError> {
        self.state.lock().pending.take()
    }

    /// Clears the failure on a reset: the next one is recorded again.
    pub fn clear(&self) {
        *self.state.lock() = State::default();
    }

    /// Sets the callback. Only the first call has an effect.
    pub fn set_callback(&self, callback: FailureCallback) {
        let _ = self.callback.set(callback);
    }

    /// Calls the callback once for a recorded failure. The caller holds no lock.
    pub fn notify(&self) {
        if std::mem::take(&mut self.state.lock().unnotified) {
            self.request_check();
        }
    }

    /// Calls the callback without a failure, for a change of the device
    /// configuration. The caller holds no lock.
    pub fn request_check(&self) {
        if let Some(callback) = self.callback.get() {
            callback();
        }
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
    fn first_failure_is_notified_once_until_a_reset() {
        let failure = FailureLatch::default();
        let notified = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&notified);
        failure.set_callback(Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        }));
        failure.record(error(1));
        failure.record(error(2));
        failure.notify();
        failure.notify();
        assert_eq!(notified.load(Ordering::Relaxed), 1);
        let taken = failure.take();
        assert!(matches!(
            taken,
            Some(DeviceError::BadQueue { queue: 1, .. })
        ));
        failure.record(error(3));
        assert!(failure.take().is_none());
        failure.clear();
        failure.record(error(4));
        failure.notify();
        assert_eq!(notified.load(Ordering::Relaxed), 2);
    }
}
