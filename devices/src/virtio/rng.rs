//! The entropy device (virtio 1.2 §5.4): bytes of getrandom(2).

use std::io;

use iommu::DmaView;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::QueueT as _;

use super::device::VirtioDevice;
use crate::failure::DeviceError;
use crate::pause::Deferral;
use crate::queue::chain::{Chain, QueueError, scatter, total};
use crate::queue::{QueuePosition, RunningQueue};
use crate::random;

/// Largest size of the queue, and of a chain in it (§2.7.5.3.1).
const QUEUE_SIZE: u16 = 64;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];
/// Upper bound on bytes per chain; a driver adds further buffers for more.
const MAX_BYTES: usize = 4096;

/// The device. It fills buffers on the vCPU thread that kicks: getrandom(2)
/// does not block, and the number of bytes per kick is bounded.
pub struct Rng {
    running: Option<RunningQueue>,
    deferral: Deferral,
}

impl Rng {
    /// The device over [`random::fill`].
    ///
    /// # Errors
    /// getrandom(2) fails (because of a system call filter, for example).
    pub fn new() -> io::Result<Self> {
        random::fill(&mut [0])?;
        Ok(Self {
            running: None,
            deferral: Deferral::default(),
        })
    }
}

impl VirtioDevice for Rng {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_RNG
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn inline(&self) -> bool {
        true
    }

    fn set_deferral(&mut self, deferral: Deferral) {
        self.deferral = deferral;
    }

    fn start_queue(&mut self, index: u16, started: RunningQueue) -> Result<(), DeviceError> {
        self.running = Some(started);
        self.kicked(index)
    }

    fn stop_queue(&mut self, _index: u16) -> Option<QueuePosition> {
        self.running.take().map(|running| running.position())
    }

    fn kicked(&mut self, index: u16) -> Result<(), DeviceError> {
        match &mut self.running {
            Some(running) => fill(running, &self.deferral).map_err(|error| error.of(index)),
            None => Ok(()),
        }
    }
}

/// Fills the available buffers, at most one ring of chains. Each chain has a
/// view of its own, so that an unmap waits for at most one chain.
fn fill(running: &mut RunningQueue, deferral: &Deferral) -> Result<(), QueueError> {
    let queue = &mut running.queue;
    let mut any = false;
    for _ in 0..queue.size() {
        if deferral.interrupts() {
            break;
        }
        let view = running.dma.view();
        let Some(chain) = Chain::take(queue, &view, QUEUE_SIZE)? else {
            break;
        };
        let len = fill_chain(&view, &chain)?;
        queue.add_used(&view, chain.head, len)?;
        any = true;
    }
    if any {
        running.interrupt.signal_for(queue, &running.dma.view());
    }
    Ok(())
}

/// Fills a chain's buffers from the front. Returns the number of bytes written.
fn fill_chain(view: &DmaView<'_>, chain: &Chain) -> Result<u32, QueueError> {
    let len = usize::try_from(total(&chain.writable)).unwrap_or(MAX_BYTES);
    let mut bytes = [0; MAX_BYTES];
    let (bytes, _) = bytes.split_at_mut(len.min(MAX_BYTES));
    random::fill(bytes).map_err(|_| QueueError("the host gives no random bytes"))?;
    let written = scatter(view, &chain.writable, bytes);
    let written = written.map_err(|_| QueueError("a buffer is not in memory"))?;
    Ok(u32::try_from(written).unwrap_or(0))
}

#[cfg(test)]
mod tests;
