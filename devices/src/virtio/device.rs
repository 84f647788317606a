//! The interface between a virtio device and its transport (virtio 1.2 §2).

use super::counters::DeviceCounters;
use crate::failure::{DeviceError, FailureCallback};
use crate::pause::Deferral;
use crate::queue::{QueuePosition, RunningQueue};

/// Reads a part of registers that are laid out as `image`: what lies beyond them
/// reads as zeros.
pub(super) fn read_image(image: &[u8], offset: u64, data: &mut [u8]) {
    let start = usize::try_from(offset).unwrap_or(usize::MAX);
    let bytes = image.get(start..).unwrap_or_default().iter();
    let bytes = bytes.chain(std::iter::repeat(&0));
    data.iter_mut()
        .zip(bytes)
        .for_each(|(to, &from)| *to = from);
}

/// A virtio device behind a transport. The transport negotiates features,
/// keeps the rings' addresses, and calls these with its own lock held, on the
/// vCPU that wrote the register.
pub trait VirtioDevice: Send {
    /// The device ID (virtio 1.2 §5).
    fn device_type(&self) -> u32;

    /// The largest size of each queue; their number is the number of queues.
    fn queue_sizes(&self) -> &[u16];

    /// The features it offers: its own and the ring's (`EVENT_IDX`,
    /// `INDIRECT_DESC`). The transport adds `VERSION_1`, `RING_RESET`, and
    /// `ACCESS_PLATFORM` when an IOMMU is in front of the function.
    fn features(&self) -> u64;

    /// Reads the device configuration at `offset`. What lies beyond it reads
    /// as zeros.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device configuration at `offset`. What cannot be written is
    /// ignored.
    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let _ = (offset, data);
    }

    /// Whether kicks are to be handled at once, by [`kicked`](Self::kicked) on
    /// the vCPU that kicks, rather than by the kick eventfd. Such a device
    /// offers no `EVENT_IDX`: every batch that the driver posts has its kick,
    /// so a bounded amount of work a kick misses nothing.
    fn inline(&self) -> bool {
        false
    }

    /// Gives an [inline](Self::inline) device what interrupts its work on a
    /// queue. After an interruption [`kicked`](Self::kicked) is called for
    /// every queue again.
    fn set_deferral(&mut self, deferral: Deferral) {
        let _ = deferral;
    }

    /// The driver wrote FEATURES_OK and keeps `features`.
    ///
    /// # Errors
    /// The set cannot be served: FEATURES_OK will read as clear.
    fn negotiated(&mut self, features: u64) -> Result<(), DeviceError>;

    /// A queue runs from now on. `DRIVER_OK` has been written.
    ///
    /// # Errors
    /// The device needs a reset.
    fn start_queue(&mut self, index: u16, queue: RunningQueue) -> Result<(), DeviceError>;

    /// Stops a queue and tells where it is. When this returns the device
    /// touches none of its memory any more. `None` when it was not running.
    fn stop_queue(&mut self, index: u16) -> Option<QueuePosition>;

    /// The driver kicked a queue of an [inline](Self::inline) device.
    ///
    /// # Errors
    /// The device needs a reset.
    fn kicked(&mut self, index: u16) -> Result<(), DeviceError> {
        let _ = index;
        Ok(())
    }

    /// Back to the state before negotiation; every queue has been stopped.
    fn reset(&mut self);

    /// Sets the callback for a failure or a change of the device configuration
    /// that happens away from the vCPUs. The transport calls this once.
    fn set_failure_callback(&mut self, callback: FailureCallback) {
        let _ = callback;
    }

    /// Counters of the device and its back end.
    fn counters(&self) -> DeviceCounters {
        DeviceCounters::None
    }

    /// Takes a failure that happened away from the vCPUs (a worker, a kernel
    /// back end), for the transport to show.
    fn take_failure(&mut self) -> Option<DeviceError> {
        None
    }

    /// Whether the device configuration changed by itself since the last call,
    /// for the transport to notify the driver (virtio 1.2 §2.5).
    fn take_config_change(&mut self) -> bool {
        false
    }
}
