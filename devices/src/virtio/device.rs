//! The interface between a virtio device and its transport (virtio 1.2 §2).

use super::counters::DeviceCounters;
use crate::failure::{DeviceError, FailureCallback, FailureLatch};
use crate::pause::Deferral;
use crate::queue::{QueuePosition, RunningQueue};

/// A virtio device of a transport. The transport negotiates features, stores
/// the rings' addresses, and calls these methods with its own lock held, on the
/// vCPU thread that wrote the register.
pub trait VirtioDevice: Send {
    /// The device ID (virtio 1.2 §5).
    fn device_type(&self) -> u32;

    /// The largest size of each queue, in entries; one element per queue.
    fn queue_sizes(&self) -> &[u16];

    /// Offered features of the device and of its rings (`EVENT_IDX`,
    /// `INDIRECT_DESC`). The transport adds `VERSION_1`, `RING_RESET`, and
    /// `ACCESS_PLATFORM` when an IOMMU is in front of the function.
    fn features(&self) -> u64;

    /// Reads the device configuration at `offset` bytes; bytes beyond it read
    /// as zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let _ = offset;
        data.fill(0);
    }

    /// Writes the device configuration at `offset` bytes; read-only fields are
    /// ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Whether kicks are handled by [`kicked`](Self::kicked) on the vCPU thread
    /// that kicks, instead of by the kick eventfd. Such a device offers no
    /// `EVENT_IDX`: the driver kicks for every batch, so a bounded amount of
    /// work per kick misses no request.
    fn inline(&self) -> bool {
        false
    }

    /// Sets the handle that interrupts the work of an [inline](Self::inline)
    /// device on a queue. After an interruption [`kicked`](Self::kicked) is
    /// called again for every queue.
    fn set_deferral(&mut self, deferral: Deferral) {
        let _ = deferral;
    }

    /// The driver accepted `features` and wrote FEATURES_OK.
    ///
    /// # Errors
    /// The set is not supported: FEATURES_OK reads as clear.
    fn negotiated(&mut self, features: u64) -> Result<(), DeviceError> {
        let _ = features;
        Ok(())
    }

    /// Starts a queue, after `DRIVER_OK`.
    ///
    /// # Errors
    /// The device needs a reset.
    fn start_queue(&mut self, index: u16, queue: RunningQueue) -> Result<(), DeviceError>;

    /// Stops a queue and returns its position; `None` when it was not running.
    /// When this returns the device accesses none of the queue's memory.
    fn stop_queue(&mut self, index: u16) -> Option<QueuePosition>;

    /// The driver kicked a queue of an [inline](Self::inline) device.
    ///
    /// # Errors
    /// The device needs a reset.
    fn kicked(&mut self, index: u16) -> Result<(), DeviceError> {
        let _ = index;
        Ok(())
    }

    /// Returns to the state before negotiation. Every queue has been stopped.
    fn reset(&mut self) {
        if let Some(failure) = self.failure() {
            failure.clear();
        }
    }

    /// Latch with the failures of worker threads and of a kernel back end.
    fn failure(&self) -> Option<&FailureLatch> {
        None
    }

    /// Sets the callback for a failure or a change of the device configuration
    /// on another thread than a vCPU's. The transport calls this once.
    fn set_failure_callback(&mut self, callback: FailureCallback) {
        if let Some(failure) = self.failure() {
            failure.set_callback(callback);
        }
    }

    /// Counters of the device, shared with the caller.
    fn counters(&self) -> DeviceCounters {
        DeviceCounters::None
    }

    /// Removes and returns a failure of a worker thread or a kernel back end,
    /// for which the transport sets DEVICE_NEEDS_RESET.
    fn take_failure(&mut self) -> Option<DeviceError> {
        self.failure()?.take()
    }

    /// Whether the device configuration changed by itself since the last call,
    /// for the transport to notify the driver (virtio 1.2 §2.5).
    fn take_config_change(&mut self) -> bool {
        false
    }
}
