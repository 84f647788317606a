//! The entropy device (virtio 1.2 §5.4): bytes of the host's random pool.

use std::io;

use iommu::{DmaSpace, DmaView};
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::{Queue, QueueT as _};
use vm_memory::Bytes as _;

use super::chain::{Chain, RINGS_OUTSIDE};
use super::{DeviceError, Interrupt, QueuePosition, StartedQueue, VirtioDevice};
use crate::pause::Deferral;

/// Largest size of the queue, and of a chain in it (§2.7.5.3.1).
const QUEUE_SIZE: u16 = 64;
const QUEUE_SIZES: [u16; 1] = [QUEUE_SIZE];
/// Most bytes given for one chain: a driver that asks for more comes again.
const MAX_BYTES: usize = 4096;

/// The device. It answers on the vCPU that kicks: the pool never blocks, and
/// what is given for one kick is bounded.
pub struct Rng {
    running: Option<Running>,
    deferral: Deferral,
}

struct Running {
    queue: Queue,
    dma: DmaSpace,
    interrupt: Interrupt,
}

impl Rng {
    /// The device over getrandom(2), which needs no file: a process in a chroot
    /// without `/dev` has it too.
    ///
    /// # Errors
    /// The host does not give random bytes (a system call filter, say).
    pub fn new() -> io::Result<Self> {
        getrandom::fill(&mut [0])?;
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

    fn read_config(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn inline(&self) -> bool {
        true
    }

    fn set_deferral(&mut self, deferral: Deferral) {
        self.deferral = deferral;
    }

    fn negotiated(&mut self, _features: u64) -> Result<(), DeviceError> {
        Ok(())
    }

    fn start_queue(&mut self, index: u16, started: StartedQueue) -> Result<(), DeviceError> {
        self.running = Some(Running {
            dma: started.space.dma(),
            queue: started.queue,
            interrupt: started.interrupt,
        });
        self.kicked(index)
    }

    fn stop_queue(&mut self, _index: u16) -> Option<QueuePosition> {
        self.running.take().map(|running| QueuePosition {
            next_avail: running.queue.next_avail(),
            next_used: running.queue.next_used(),
        })
    }

    fn kicked(&mut self, _index: u16) -> Result<(), DeviceError> {
        match &mut self.running {
            Some(running) => running.fill(&self.deferral),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {}
}

impl Running {
    /// Fills the available buffers, up to a ring of chains. Each chain has a view of its
    /// own, so that an unmap waits for one chain at most.
    fn fill(&mut self, deferral: &Deferral) -> Result<(), DeviceError> {
        let bad = |reason| DeviceError::BadQueue { queue: 0, reason };
        let mut any = false;
        for _ in 0..self.queue.size() {
            if deferral.interrupts() {
                break;
            }
            let view = self.dma.view();
            let chain = Chain::take(&mut self.queue, &view, QUEUE_SIZE).map_err(bad)?;
            let Some(chain) = chain else {
                break;
            };
            let given = give(&view, &chain).map_err(bad)?;
            let used = self.queue.add_used(&view, chain.head, given);
            used.map_err(|_| bad(RINGS_OUTSIDE))?;
            any = true;
        }
        if any {
            self.interrupt.signal_for(&self.queue, &self.dma.view());
        }
        Ok(())
    }
}

/// Fills a chain's buffers from the front. Returns the number of bytes given.
fn give(view: &DmaView<'_>, chain: &Chain) -> Result<u32, &'static str> {
    let room: u64 = chain.room.iter().map(|buffer| u64::from(buffer.len)).sum();
    let mut random = [0; MAX_BYTES];
    let given = usize::try_from(room).unwrap_or(MAX_BYTES).min(MAX_BYTES);
    let (random, _) = random.split_at_mut(given);
    getrandom::fill(random).map_err(|_| "the host gives no random bytes")?;
    let mut rest = &*random;
    for buffer in &chain.room {
        let (now, later) = rest.split_at(rest.len().min(buffer.len as usize));
        view.write_slice(now, buffer.at)
            .map_err(|_| "a buffer is not in memory")?;
        rest = later;
    }
    Ok(u32::try_from(given).unwrap_or(0))
}

#[cfg(test)]
mod tests;
