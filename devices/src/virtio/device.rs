//! What a virtio device is to its transport (virtio 1.2 §2).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use iommu::{AddressSpace, DmaView};
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::MsiVector;
use crate::pause::Deferral;

/// The flag of the available ring by which a driver asks for no interrupts.
const NO_INTERRUPT: u16 = 1;

/// How a device interrupts its driver for one queue, or for a change of
/// configuration.
#[derive(Clone)]
pub struct Interrupt(Arc<dyn MsiVector>);

impl Interrupt {
    /// The interrupt behind a source that the transport routes.
    #[must_use]
    pub fn new(vector: Arc<dyn MsiVector>) -> Self {
        Self(vector)
    }

    /// Interrupts. A full counter means that it is signalled already.
    pub fn signal(&self) {
        let _ = self.0.eventfd().write(1);
    }

    /// Interrupts for used entries of `queue`, unless the driver asked for none
    /// (virtio 1.2 §2.7.7). For devices without `EVENT_IDX`.
    pub fn signal_for(&self, queue: &Queue, view: &DmaView<'_>) {
        // The used index must be visible before the flags are looked at.
        fence(Ordering::SeqCst);
        let flags = view.load::<u16>(GuestAddress(queue.avail_ring()), Ordering::SeqCst);
        if flags.is_ok_and(|flags| u16::from_le(flags) & NO_INTERRUPT == 0) {
            self.signal();
        }
    }

    /// What to give a kernel back end as its call eventfd. It stays the same
    /// for the life of the device.
    #[must_use]
    pub fn eventfd(&self) -> &EventFd {
        self.0.eventfd()
    }
}

/// A queue that the driver enabled, handed to its device.
pub struct StartedQueue {
    /// The rings: size and addresses (which are I/O virtual), the position to
    /// go on from, and whether event indices were negotiated.
    pub queue: Queue,
    /// What the device may see of memory. `space.dma()` makes a view for one
    /// user.
    pub space: AddressSpace,
    /// Signalled by the driver's kicks, unless the device is
    /// [inline](VirtioDevice::inline). The same for the life of the device.
    pub kick: Arc<EventFd>,
    /// Interrupts the driver for this queue.
    pub interrupt: Interrupt,
}

/// Where a stopped queue is, for whoever starts it again (virtio 1.2 §2.6.1,
/// snapshots, GET_VRING_BASE).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueuePosition {
    /// The index of the next entry of the available ring.
    pub next_avail: u16,
    /// The index of the next entry of the used ring.
    pub next_used: u16,
}

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

/// The device cannot do what was asked of it. The transport logs it once and
/// shows DEVICE_NEEDS_RESET to the driver (virtio 1.2 §2.1.1).
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The driver set up something that cannot be used.
    #[error("the driver's set-up of queue {queue} cannot be used: {reason}")]
    BadQueue {
        /// Which queue.
        queue: u16,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The back end failed.
    #[error("{what}")]
    Backend {
        /// What was tried.
        what: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
    },
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
    /// `ACCESS_PLATFORM` when an IOMMU stands before the function.
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
    fn start_queue(&mut self, index: u16, queue: StartedQueue) -> Result<(), DeviceError>;

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
