//! Set-up of queues by the driver (virtio 1.2 §4.1.5.1.3).

use std::sync::Arc;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT as _};
use vmm_sys_util::eventfd::EventFd;

use crate::failure::DeviceError;
use crate::pci::halves;
use crate::queue::chain::QueueError;
use crate::queue::{Interrupt, QueuePosition};

/// `VIRTIO_MSI_NO_VECTOR` (§4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;

/// The registers of a queue, its kick eventfd and its interrupt.
pub(super) struct QueueSetup {
    /// The largest size that the device offers, in entries.
    max: u16,
    pub(super) size: u16,
    pub(super) vector: u16,
    pub(super) enabled: bool,
    pub(super) running: bool,
    /// The position to continue from when the queue starts.
    pub(super) position: QueuePosition,
    /// Addresses of the descriptor table, the driver area and the device area.
    pub(super) rings: [u64; 3],
    pub(super) kick: Arc<EventFd>,
    pub(super) interrupt: Interrupt,
}

impl QueueSetup {
    pub(super) fn new(max: u16, kick: EventFd, interrupt: Interrupt) -> Self {
        Self {
            max,
            size: max,
            vector: NO_VECTOR,
            enabled: false,
            running: false,
            position: QueuePosition::default(),
            rings: [0; 3],
            kick: Arc::new(kick),
            interrupt,
        }
    }

    pub(super) fn clear(&mut self) {
        self.size = self.max;
        self.vector = NO_VECTOR;
        self.position = QueuePosition::default();
        (self.enabled, self.running) = (false, false);
        self.rings = [0; 3];
    }

    /// Sets the bits in `mask` of a ring's address.
    pub(super) fn set_ring(&mut self, ring: usize, value: u64, mask: u64) {
        if let Some(address) = self.rings.get_mut(ring) {
            *address = *address & !mask | value & mask;
        }
    }

    /// Checks the registers and creates the queue.
    pub(super) fn build(&self, index: u16, features: u64) -> Result<Queue, DeviceError> {
        let bad = |reason| QueueError(reason).of(index);
        let mut queue = Queue::new(self.max).map_err(|_| bad("its largest size is no size"))?;
        if queue.try_set_size(self.size).is_err() {
            return Err(bad("its size is no power of two up to the largest"));
        }
        let [descriptors, driver, device] = self.rings;
        let aligned =
            descriptors.is_multiple_of(16) && driver.is_multiple_of(2) && device.is_multiple_of(4);
        if !aligned {
            return Err(bad("a ring is not aligned"));
        }
        let halves = |address| {
            let (low, high) = halves(address);
            (Some(low), Some(high))
        };
        let (low, high) = halves(descriptors);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(driver);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(device);
        queue.set_used_ring_address(low, high);
        queue.set_next_avail(self.position.next_avail);
        queue.set_next_used(self.position.next_used);
        queue.set_event_idx(features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1);
        queue.set_ready(true);
        Ok(queue)
    }
}
