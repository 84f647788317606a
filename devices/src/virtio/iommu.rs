//! The virtio-iommu's queues and registers (virtio 1.2 §5.13) around the model
//! of [`iommu::virtio`].
//!
//! Requests are executed on the vCPU thread that kicks: Linux sends most of
//! them with interrupts off and polls the used ring, so it would spin during a
//! switch to another thread.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use iommu::DmaView;
use iommu::lock::RankedMutex;
use iommu::virtio::{FaultReport, FaultSink, VirtioIommu, spec};
use virtio_bindings::virtio_ids::VIRTIO_ID_IOMMU;
use virtio_bindings::virtio_ring::VIRTIO_RING_F_INDIRECT_DESC;
use virtio_queue::QueueT as _;

use super::device::VirtioDevice;
use crate::bus::read_image;
use crate::failure::DeviceError;
use crate::pause::Deferral;
use crate::queue::chain::{Chain, QueueError, gather, scatter, total};
use crate::queue::{QueuePosition, RunningQueue};

const REQUEST_QUEUE: u16 = 0;
const EVENT_QUEUE: u16 = 1;
/// Largest sizes of the two queues, and of the chains in them (§2.7.5.3.1).
const REQUEST_SIZE: u16 = 256;
const EVENT_SIZE: u16 = 64;
const QUEUE_SIZES: [u16; 2] = [REQUEST_SIZE, EVENT_SIZE];
/// Upper bounds on bytes of a request and of its reply that are copied.
const MAX_REQUEST: usize = 128;
const MAX_REPLY: usize = spec::PROBE_SIZE as usize + spec::request::TAIL_SIZE;

/// The event queue. It has its own lock, because threads that report faults
/// must not wait for the transport: a request may wait for those threads.
#[derive(Default)]
pub struct EventQueue {
    running: RankedMutex<Option<RunningQueue>, 10>,
    dropped: AtomicU64,
    reported: AtomicU64,
}

impl EventQueue {
    /// Number of written reports, and of reports that were dropped without a
    /// buffer.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        let reported = self.reported.load(Ordering::Relaxed);
        (reported, self.dropped.load(Ordering::Relaxed))
    }
}

impl FaultSink for EventQueue {
    fn report(&self, report: &FaultReport) {
        let mut running = self.running.lock();
        let written = running
            .as_mut()
            .is_some_and(|running| push_report(running, report));
        let counter = if written {
            &self.reported
        } else {
            &self.dropped
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// Writes a report to the next buffer (§5.13.6.9); `false` when there is none
/// of sufficient size.
fn push_report(running: &mut RunningQueue, report: &FaultReport) -> bool {
    let view = running.dma.view();
    let Ok(Some(chain)) = Chain::take(&mut running.queue, &view, EVENT_SIZE) else {
        return false;
    };
    let bytes = report.to_bytes();
    let fits = total(&chain.writable) >= bytes.len() as u64;
    let written = fits && scatter(&view, &chain.writable, &bytes).is_ok();
    let len = if written { bytes.len() } else { 0 };
    let len = u32::try_from(len).unwrap_or(0);
    if running.queue.add_used(&view, chain.head, len).is_err() {
        return false;
    }
    running.interrupt.signal_for(&running.queue, &view);
    written
}

/// The virtio device of the model.
pub struct VirtioIommuDevice {
    model: Arc<VirtioIommu>,
    events: Arc<EventQueue>,
    requests: Option<RunningQueue>,
    deferral: Deferral,
}

impl VirtioIommuDevice {
    /// The device around `model`, which reports faults to `events`.
    #[must_use]
    pub fn new(model: Arc<VirtioIommu>, events: Arc<EventQueue>) -> Self {
        Self {
            model,
            events,
            requests: None,
            deferral: Deferral::default(),
        }
    }
}

impl VirtioDevice for VirtioIommuDevice {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_IOMMU
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        self.model.features().bits() | 1 << VIRTIO_RING_F_INDIRECT_DESC
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_image(&self.model.config_space(), offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (true, [value, ..]) = (offset == spec::CONFIG_BYPASS as u64, data) {
            self.model.set_bypass(*value);
        }
    }

    fn inline(&self) -> bool {
        true
    }

    fn set_deferral(&mut self, deferral: Deferral) {
        self.deferral = deferral;
    }

    fn negotiated(&mut self, features: u64) -> Result<(), DeviceError> {
        self.model
            .negotiated(spec::Features::from_bits_truncate(features));
        Ok(())
    }

    fn start_queue(&mut self, index: u16, queue: RunningQueue) -> Result<(), DeviceError> {
        let running = Some(queue);
        match index {
            REQUEST_QUEUE => self.requests = running,
            _ => *self.events.running.lock() = running,
        }
        // A driver may add requests before DRIVER_OK.
        if index == REQUEST_QUEUE {
            self.kicked(index)?;
        }
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<QueuePosition> {
        let stopped = match index {
            REQUEST_QUEUE => self.requests.take(),
            EVENT_QUEUE => self.events.running.lock().take(),
            _ => None,
        };
        stopped.map(|running| running.position())
    }

    fn kicked(&mut self, index: u16) -> Result<(), DeviceError> {
        match &mut self.requests {
            Some(running) if index == REQUEST_QUEUE => {
                let served = serve(&self.model, running, &self.deferral);
                served.map_err(|error| error.of(index))
            }
            _ => Ok(()),
        }
    }

    fn reset(&mut self) {
        self.model.reset();
    }
}

/// Executes the available requests: at most one ring of them, then one flush
/// for the mappings that they removed, and only then updates the used ring. So
/// a driver that adds requests without end on another CPU does not occupy this
/// vCPU, and a pause waits for one request.
fn serve(
    model: &VirtioIommu,
    running: &mut RunningQueue,
    deferral: &Deferral,
) -> Result<(), QueueError> {
    let view = running.dma.view();
    let queue = &mut running.queue;
    let mut done = Vec::new();
    let mut outcome = Ok(());
    while outcome.is_ok() && done.len() < usize::from(queue.size()) && !deferral.interrupts() {
        let chain = match Chain::take(queue, &view, REQUEST_SIZE) {
            Ok(Some(chain)) => chain,
            Ok(None) => break,
            Err(error) => {
                outcome = Err(error);
                break;
            }
        };
        match answer(model, &view, &chain) {
            Some(len) => done.push((chain.head, len)),
            None => outcome = Err(OUTSIDE),
        }
    }
    if view.take_fault().is_some() {
        outcome = Err(OUTSIDE);
    }
    model.flush();
    let any = !done.is_empty();
    for (head, len) in done {
        queue.add_used(&view, head, len)?;
    }
    if any {
        running.interrupt.signal_for(queue, &view);
    }
    outcome
}

const OUTSIDE: QueueError = QueueError("a request is not in memory");

/// Executes one request: copies it in, and the written part of the reply out.
/// Returns its used length, 0 for a request that is returned unwritten
/// (§5.13.6.2); `None` when the request is not in memory.
fn answer(model: &VirtioIommu, view: &DmaView<'_>, chain: &Chain) -> Option<u32> {
    let mut request = [0; MAX_REQUEST];
    let mut reply = [0; MAX_REPLY];
    let read = gather(view, &chain.readable, &mut request).ok()?;
    let writable = usize::try_from(total(&chain.writable)).ok()?;
    let written = model.handle(
        request.get(..read)?,
        reply.get_mut(..writable.min(MAX_REPLY))?,
    );
    scatter(view, &chain.writable, reply.get(..written)?).ok()?;
    u32::try_from(written).ok()
}

#[cfg(test)]
mod tests;
