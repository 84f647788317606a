//! A queue that the driver enabled, and its interrupt.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use iommu::{AddressSpace, DmaSpace, DmaView};
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::MsiVector;

/// The flag of the available ring by which a driver asks for no interrupts.
const NO_INTERRUPT: u16 = 1;

/// Interrupts the driver for one queue, or for a change of configuration.
#[derive(Clone)]
pub struct Interrupt(Arc<dyn MsiVector>);

impl Interrupt {
    /// The interrupt of a source that the transport routes.
    #[must_use]
    pub fn new(vector: Arc<dyn MsiVector>) -> Self {
        Self(vector)
    }

    /// Interrupts the driver. A full counter means that it is signalled
    /// already.
    pub fn signal(&self) {
        let _ = self.0.eventfd().write(1);
    }

    /// Interrupts for used entries of `queue`, unless the driver asked for none
    /// (virtio 1.2 §2.7.7). For devices without `EVENT_IDX`.
    pub fn signal_for(&self, queue: &Queue, view: &DmaView<'_>) {
        // The used index must be visible before the flags are read.
        fence(Ordering::SeqCst);
        let flags = view.load::<u16>(GuestAddress(queue.avail_ring()), Ordering::SeqCst);
        if flags.is_ok_and(|flags| u16::from_le(flags) & NO_INTERRUPT == 0) {
            self.signal();
        }
    }

    /// The call eventfd of a kernel back end. It is the same for the life of
    /// the device.
    #[must_use]
    pub fn eventfd(&self) -> &EventFd {
        self.0.eventfd()
    }
}

/// A queue that the driver enabled, with its resources for the device.
pub struct RunningQueue {
    /// The rings: size, I/O virtual addresses, position to continue from, and
    /// whether event indices were negotiated.
    pub queue: Queue,
    /// The device's view of guest memory, with a cache for this queue alone.
    pub dma: DmaSpace,
    /// Signalled by the driver's kicks, unless the device is inline. It is the
    /// same for the life of the device.
    pub kick: Arc<EventFd>,
    /// Interrupts the driver for this queue.
    pub interrupt: Interrupt,
}

impl RunningQueue {
    /// The address space of the device.
    #[must_use]
    pub fn space(&self) -> &AddressSpace {
        self.dma.space()
    }

    /// The position to continue the queue from.
    #[must_use]
    pub fn position(&self) -> QueuePosition {
        QueuePosition {
            next_avail: self.queue.next_avail(),
            next_used: self.queue.next_used(),
        }
    }

    /// Sets the position that a kernel back end reports when it stops.
    pub fn set_position(&mut self, position: QueuePosition) {
        self.queue.set_next_avail(position.next_avail);
        self.queue.set_next_used(position.next_used);
    }
}

/// The position of a stopped queue (virtio 1.2 §2.6.1, `GET_VRING_BASE`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueuePosition {
    /// The index of the next entry of the available ring.
    pub next_avail: u16,
    /// The index of the next entry of the used ring.
    pub next_used: u16,
}
