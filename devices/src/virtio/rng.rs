//! The entropy device (virtio 1.2 §5.4): bytes of the host's random pool.

use std::fs::File;
use std::io;

use iommu::DmaSpace;
use virtio_bindings::virtio_ids::VIRTIO_ID_RNG;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::{Queue, QueueT as _};
use vm_memory::Bytes as _;

use super::chain::{Chain, RINGS_OUTSIDE};
use super::{DeviceError, Interrupt, QueuePosition, StartedQueue, VirtioDevice};

const QUEUE_SIZES: [u16; 1] = [64];
/// Bytes given for one buffer, at most: a driver that asks for more comes again.
const MAX_BYTES: usize = 4096;

/// The device. It answers on the vCPU that kicks: the pool never blocks, and
/// what is given for one kick is bounded.
pub struct Rng {
    source: File,
    running: Option<Running>,
}

struct Running {
    queue: Queue,
    dma: DmaSpace,
    interrupt: Interrupt,
}

impl Rng {
    /// The device over the host's `/dev/urandom`.
    ///
    /// # Errors
    /// The source cannot be opened.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            source: File::open("/dev/urandom")?,
            running: None,
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
            Some(running) => running.fill(&mut self.source),
            None => Ok(()),
        }
    }

    fn reset(&mut self) {}
}

impl Running {
    /// Fills what is posted, up to a ring of buffers.
    fn fill(&mut self, source: &mut File) -> Result<(), DeviceError> {
        let bad = |reason| DeviceError::BadQueue { queue: 0, reason };
        let view = self.dma.view();
        let mut any = false;
        for _ in 0..self.queue.size() {
            let Some(chain) = Chain::take(&mut self.queue, &view).map_err(bad)? else {
                break;
            };
            let mut given = 0;
            for buffer in &chain.room {
                let len = (buffer.len as usize).min(MAX_BYTES - given);
                let filled = view.read_exact_volatile_from(buffer.at, source, len);
                filled.map_err(|_| bad("a buffer is not in memory"))?;
                given += len;
            }
            let given = u32::try_from(given).unwrap_or(0);
            let used = self.queue.add_used(&view, chain.head, given);
            used.map_err(|_| bad(RINGS_OUTSIDE))?;
            any = true;
        }
        if any {
            self.interrupt.signal_for(&self.queue, &view);
        }
        Ok(())
    }
}
