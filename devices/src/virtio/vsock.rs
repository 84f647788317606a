//! The socket device (virtio 1.2 §5.10): vhost-vsock transfers streams between
//! the guest and the host's `AF_VSOCK`.

use std::io;
use std::sync::Arc;

use virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use super::counters::DeviceCounters;
use super::device::VirtioDevice;
use crate::bus::read_image;
use crate::failure::{DeviceError, FailureLatch};
use crate::queue::{QueuePosition, RunningQueue};
use crate::vhost::sys::{Kind, OpenError};
use crate::vhost::{RINGS, Vhost, VhostContext};

/// `VIRTIO_VSOCK_F_SEQPACKET` (§5.10.3), which `virtio-bindings` does not
/// define.
const F_SEQPACKET: u64 = 1 << 1;
/// Largest sizes of the receive, transmit and event queue.
const QUEUE_SIZES: [u16; 3] = [256, 256, 64];

/// Error of creating the device. The text is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    /// The host's vhost-vsock is not available.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Another device of the host has the context identifier.
    #[error("context identifier {0} is in use by another machine: choose another")]
    InUse(u32),
    /// The kernel refused the context identifier.
    #[error("context identifier {cid} cannot be used")]
    Refused {
        /// Context identifier.
        cid: u32,
        /// Error of the ioctl.
        source: io::Error,
    },
}

/// The device. The kernel starts and stops both of its data queues together.
/// The event queue is in this process and has no events.
pub struct Vsock {
    cid: u32,
    features: u64,
    vhost: Vhost,
    rings: [Option<RunningQueue>; RINGS],
    events: Option<RunningQueue>,
    running: bool,
    failure: Arc<FailureLatch>,
}

impl Vsock {
    /// The device whose guest has the context identifier `cid`.
    ///
    /// # Errors
    /// [`VsockError`]
    pub fn new(cid: u32, context: &VhostContext) -> Result<Self, VsockError> {
        let failure = Arc::new(FailureLatch::default());
        let vhost = Vhost::open(Kind::Vsock, "vsock", context, None, &failure)?;
        vhost
            .kernel()
            .set_cid(u64::from(cid))
            .map_err(|source| match source.raw_os_error() {
                Some(libc::EADDRINUSE) => VsockError::InUse(cid),
                _ => VsockError::Refused { cid, source },
            })?;
        let kind = Kind::Vsock;
        let served = vhost
            .features()
            .map_err(|source| OpenError::Other { kind, source })?;
        let offered = F_SEQPACKET | 1 << VIRTIO_RING_F_EVENT_IDX | 1 << VIRTIO_RING_F_INDIRECT_DESC;
        Ok(Self {
            cid,
            features: served & offered,
            vhost,
            rings: [None, None],
            events: None,
            running: false,
            failure,
        })
    }

    /// Starts the data queues when the driver has enabled both.
    fn start(&mut self) -> Result<(), DeviceError> {
        if self.running || self.rings.iter().any(Option::is_none) {
            return Ok(());
        }
        self.running = true;
        for (index, ring) in (0_u16..).zip(&self.rings) {
            if let Some(started) = ring {
                self.vhost.set_up_ring(usize::from(index), index, started)?;
            }
        }
        let started = self.vhost.kernel().set_running(true);
        started.map_err(DeviceError::backend("starting the host's vhost-vsock"))?;
        // The kernel ignores kicks from before it ran.
        for ring in self.rings.iter().flatten() {
            let _ = ring.kick.write(1);
        }
        Ok(())
    }

    /// Stops both data queues and records their positions.
    fn halt(&mut self) {
        if !std::mem::take(&mut self.running) {
            return;
        }
        if let Err(error) = self.vhost.kernel().set_running(false) {
            log::error!("stopping the host's vhost-vsock: {error}");
        }
        for (index, ring) in self.rings.iter_mut().enumerate() {
            let position = self.vhost.ring_stopped(index);
            if let Some(ring) = ring {
                ring.set_position(position);
            }
        }
    }
}

impl VirtioDevice for Vsock {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_VSOCK
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_image(&u64::from(self.cid).to_le_bytes(), offset, data);
    }

    fn negotiated(&mut self, features: u64) -> Result<(), DeviceError> {
        self.vhost.negotiated(features)
    }

    fn start_queue(&mut self, index: u16, started: RunningQueue) -> Result<(), DeviceError> {
        match self.rings.get_mut(usize::from(index)) {
            Some(ring) => {
                *ring = Some(started);
                self.start()
            }
            None => {
                self.events = Some(started);
                Ok(())
            }
        }
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueuePosition> {
        let stopped = match self.rings.get(usize::from(index)) {
            Some(_) => {
                self.halt();
                self.rings.get_mut(usize::from(index))?.take()?
            }
            None => self.events.take()?,
        };
        Some(stopped.position())
    }

    fn reset(&mut self) {
        self.halt();
        self.rings = [None, None];
        self.events = None;
        self.vhost.reset();
        self.failure.clear();
    }

    fn counters(&self) -> DeviceCounters {
        DeviceCounters::Vhost {
            iotlbs: vec![self.vhost.monitor()],
            net: None,
        }
    }

    fn failure(&self) -> Option<&FailureLatch> {
        Some(&self.failure)
    }
}
