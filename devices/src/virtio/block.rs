//! The block device (virtio 1.2 §5.2) over a raw image.
//!
//! Each disk has a thread: a read from a slow disk sleeps in the kernel with
//! the stream's gate held, so it must not be the thread of the control plane.

mod image;
mod request;

use std::io;
use std::ops::DerefMut;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use iommu::lock::RankedMutex;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_MQ,
    VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_WRITE_ZEROES,
};
use virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::QueueT as _;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::EventFd;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromZeros, IntoBytes};

use self::image::SECTOR;
pub use self::image::{Image, ImageError};
pub use self::request::{Disk, Served};
use self::request::{MAX_CLEAR_SECTORS, QUEUE_SIZE, SEG_MAX, SIZE_MAX};
use super::counters::{BlockCounters, DeviceCounters};
use super::device::VirtioDevice;
use crate::bus::read_image;
use crate::failure::{DeviceError, FailureLatch};
use crate::poll::{Poll, PollThread};
use crate::queue::chain::QueueError;
use crate::queue::{QueuePosition, RunningQueue};
use crate::thread::ThreadKind;

struct Running {
    queue: RunningQueue,
    /// The queue is not served until the driver resets the device.
    failed: bool,
}

/// State that the worker shares with the device.
struct Shared {
    queues: Vec<RankedMutex<Option<Running>, 2>>,
    /// By queue: set to make the worker leave it, between two requests or
    /// between two MiB of one.
    leave: Vec<AtomicBool>,
    /// The token of a queue is its index.
    poll: Arc<Poll>,
    failure: FailureLatch,
}

impl Shared {
    fn queue(&self, index: usize) -> Option<impl DerefMut<Target = Option<Running>>> {
        self.queues.get(index).map(RankedMutex::lock)
    }
}

/// User's configuration of a disk.
#[derive(Clone, Debug)]
pub struct BlockConfig {
    /// Name of the disk, for the log and the guest.
    pub id: String,
    /// Number of request queues, at least one.
    pub queues: u16,
    /// Whether flushing is offered. If not, completed writes may be lost when
    /// the host crashes.
    pub flush: bool,
}

/// The device, with its worker thread.
pub struct Block {
    shared: Arc<Shared>,
    counters: Arc<BlockCounters>,
    _worker: PollThread,
    sizes: Vec<u16>,
    features: u64,
    config: [u8; 60],
    kicks: Vec<Option<Arc<EventFd>>>,
}

impl Block {
    /// Creates the device over `image` and starts its thread.
    ///
    /// # Errors
    /// No file descriptor or thread is left.
    pub fn new(config: &BlockConfig, image: Image) -> io::Result<Self> {
        let count = usize::from(config.queues.max(1));
        let shared = Arc::new(Shared {
            queues: (0..count).map(|_| RankedMutex::default()).collect(),
            leave: (0..count).map(|_| AtomicBool::new(false)).collect(),
            poll: Arc::new(Poll::new()?),
            failure: FailureLatch::default(),
        });
        let features = offered(config, &image);
        let space = config_space(image.sectors(), config.queues.max(1));
        let disk = Disk::new(&config.id, image);
        let counters = Arc::clone(disk.counters());
        let worker = {
            let (shared, poll) = (Arc::clone(&shared), Arc::clone(&shared.poll));
            let work = move |poll: &Poll| work(&shared, poll, disk);
            PollThread::spawn(ThreadKind::Disk, format!("disk-{}", config.id), &poll, work)?
        };
        Ok(Self {
            sizes: vec![QUEUE_SIZE; count],
            kicks: vec![None; count],
            _worker: worker,
            shared,
            counters,
            features,
            config: space,
        })
    }
}

fn offered(config: &BlockConfig, image: &Image) -> u64 {
    let mut features = 1 << VIRTIO_BLK_F_SIZE_MAX
        | 1 << VIRTIO_BLK_F_SEG_MAX
        | 1 << VIRTIO_BLK_F_BLK_SIZE
        | 1 << VIRTIO_BLK_F_MQ
        | 1 << VIRTIO_RING_F_EVENT_IDX
        | 1 << VIRTIO_RING_F_INDIRECT_DESC;
    if config.flush {
        features |= 1 << VIRTIO_BLK_F_FLUSH;
    }
    features |= if image.read_only() {
        1 << VIRTIO_BLK_F_RO
    } else {
        1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    };
    features
}

/// `struct virtio_blk_config` (§5.2.4).
#[derive(IntoBytes, FromZeros)]
#[repr(C)]
struct Config {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    geometry: [u8; 4],
    blk_size: U32,
    topology: [u8; 8],
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

fn config_space(sectors: u64, queues: u16) -> [u8; 60] {
    zerocopy::transmute!(Config {
        capacity: sectors.into(),
        size_max: SIZE_MAX.into(),
        seg_max: u32::from(SEG_MAX).into(),
        blk_size: u32::try_from(SECTOR).unwrap_or(512).into(),
        num_queues: queues.into(),
        max_discard_sectors: MAX_CLEAR_SECTORS.into(),
        max_discard_seg: 1.into(),
        discard_sector_alignment: 8.into(),
        max_write_zeroes_sectors: MAX_CLEAR_SECTORS.into(),
        max_write_zeroes_seg: 1.into(),
        write_zeroes_may_unmap: 1,
        ..Config::new_zeroed()
    })
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_BLOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_image(&self.config, offset, data);
    }

    fn start_queue(&mut self, index: u16, started: RunningQueue) -> Result<(), DeviceError> {
        let at = usize::from(index);
        let (Some(mut queue), Some(kick)) = (self.shared.queue(at), self.kicks.get_mut(at)) else {
            return Ok(());
        };
        let new = Arc::clone(&started.kick);
        *queue = Some(Running {
            queue: started,
            failed: false,
        });
        let watched = (self.shared.poll).add(&*new, EventSet::IN, index.into());
        watched.map_err(DeviceError::backend("watching a queue"))?;
        // A driver may add requests before DRIVER_OK.
        let _ = new.write(1);
        *kick = Some(new);
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueuePosition> {
        let at = usize::from(index);
        if let Some(kick) = self.kicks.get_mut(at).and_then(Option::take) {
            let _ = self.shared.poll.remove(&*kick);
        }
        let leave = self.shared.leave.get(at)?;
        leave.store(true, Ordering::Release);
        let stopped = self.shared.queue(at)?.take();
        leave.store(false, Ordering::Release);
        stopped.map(|running| running.queue.position())
    }

    fn counters(&self) -> DeviceCounters {
        DeviceCounters::Block(Arc::clone(&self.counters))
    }

    fn failure(&self) -> Option<&FailureLatch> {
        Some(&self.shared.failure)
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        for leave in &self.shared.leave {
            leave.store(true, Ordering::Release);
        }
    }
}

/// Body of the worker thread: serves kicked queues until it is stopped.
fn work(shared: &Shared, poll: &Poll, mut disk: Disk) {
    let ended = poll.run(|token| {
        kicked(
            shared,
            usize::try_from(token).unwrap_or(usize::MAX),
            &mut disk,
        );
        shared.failure.notify();
    });
    if let Err(error) = ended.map_err(DeviceError::backend("waiting for kicks")) {
        shared.failure.record(error);
        shared.failure.notify();
    }
}

/// Serves a kicked queue while it is started.
fn kicked(shared: &Shared, index: usize, disk: &mut Disk) {
    let (Some(mut queue), Some(leave)) = (shared.queue(index), shared.leave.get(index)) else {
        return;
    };
    // The queue may have been stopped since the kick.
    let Some(running) = queue.as_mut() else {
        return;
    };
    let _ = running.queue.kick.read();
    if running.failed {
        return;
    }
    if let Err(error) = serve(&mut running.queue, disk, leave) {
        running.failed = true;
        let queue = u16::try_from(index).unwrap_or(u16::MAX);
        shared.failure.record(error.of(queue));
    }
}

/// Serves the available requests, at most one ring of them, so that the disk's
/// other queues have their turn.
fn serve(
    running: &mut RunningQueue,
    disk: &mut Disk,
    leave: &AtomicBool,
) -> Result<(), QueueError> {
    let RunningQueue {
        queue,
        dma,
        kick,
        interrupt,
    } = running;
    queue.disable_notification(&dma.view())?;
    for _ in 0..queue.size() {
        if leave.load(Ordering::Acquire) {
            break;
        }
        match disk.serve(queue, dma, leave)? {
            Served::Done { interrupt: true } => interrupt.signal(),
            Served::Done { interrupt: false } => {}
            Served::Nothing => break,
        }
    }
    if queue.enable_notification(&dma.view())? {
        let _ = kick.write(1);
    }
    Ok(())
}

#[cfg(test)]
mod tests;
