//! The host kernel's vhost devices behind the guest's IOMMU.
//!
//! [`sys`] has the ioctls, [`shadow`] the entries of the kernel's IOTLB,
//! [`iotlb`] synchronizes them with the IOMMU, [`worker`] is the thread that
//! answers misses, and [`Vhost`] starts and stops rings in the order that the
//! kernel needs.

pub mod iotlb;
pub mod message;
pub mod pairs;
pub mod shadow;
pub mod sys;
pub mod worker;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use iommu::{AddressSpace, GuestRam, Iova};
use vhost::vhost_kern::vhost_binding::{VHOST_F_LOG_ALL, VHOST_NET_F_VIRTIO_NET_HDR};
use virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;
use virtio_queue::QueueT as _;
use vm_memory::{GuestAddress, GuestMemoryBackend as _};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::iotlb::{Channel, IotlbOptions, IotlbStats, Ring, VhostIotlb};
use self::message::{Message, Miss};
use self::pairs::QueuePair;
use self::sys::{Kind, OpenError, RingAddresses, VhostKernel};
use self::worker::{EpollClient, VhostWorker};
use crate::failure::{DeviceError, FailureLatch};
use crate::queue::chain::QueueError;
use crate::queue::posted::Layout;
use crate::queue::{QueuePosition, RunningQueue};

/// Number of rings of a vhost file, of either kind.
pub const RINGS: usize = 2;

// Indices of a file's sources in [`EpollClient::ready`].
const MISSES: u32 = 0;
const WAKE: u32 = 1;
const ERRORS: u32 = 2;

/// Features that vhost uses with another meaning, or for migration.
const NEVER: u64 = 1 << VHOST_F_LOG_ALL | 1 << VHOST_NET_F_VIRTIO_NET_HDR;

/// Resources that all vhost files of a machine share.
#[derive(Clone)]
pub struct VhostContext {
    /// The guest's RAM.
    pub ram: Arc<GuestRam>,
    /// The thread that answers misses.
    pub worker: Arc<VhostWorker>,
    /// Send new mappings at once, if the IOMMU delivers `MAP` events.
    pub prefill: bool,
    /// Send the translations of all available buffers of a queue with a miss.
    pub prefetch: bool,
    /// Number of vCPUs of the machine.
    pub vcpus: u32,
}

impl Channel for VhostKernel {
    fn send(&self, message: &Message) -> io::Result<()> {
        VhostKernel::send(self, message)
    }

    fn receive(&self) -> io::Result<Option<Miss>> {
        VhostKernel::receive(self)
    }

    fn halt(&self) {
        for index in 0..RINGS {
            if let Err(error) = self.detach(index) {
                log::error!("stopping ring {index} of the host's vhost: {error}");
            }
        }
    }
}

/// The part of a file that the worker thread serves.
struct File {
    kernel: Arc<VhostKernel>,
    iotlb: Arc<VhostIotlb>,
    errors: [EventFd; RINGS],
    failure: Arc<FailureLatch>,
    translated: AtomicBool,
}

impl EpollClient for File {
    fn ready(&self, source: u32) -> bool {
        let good = match source {
            MISSES => self.iotlb.service(),
            WAKE => {
                self.iotlb.retry();
                true
            }
            _ => {
                let index = source - ERRORS;
                self.ring_failed(index);
                true
            }
        };
        self.failure.notify();
        good
    }
}

impl File {
    fn ring_failed(&self, index: u32) {
        let error = usize::try_from(index).ok().and_then(|i| self.errors.get(i));
        let Some(error) = error else {
            return;
        };
        let _ = error.read();
        if self.translated.load(Ordering::Acquire) {
            self.iotlb
                .ring_failed(u16::try_from(index).unwrap_or(u16::MAX));
        } else {
            self.failure.record(DeviceError::Backend {
                what: "the host's vhost cannot use what the driver put on a queue",
                source: io::Error::from(io::ErrorKind::InvalidData),
            });
        }
    }
}

/// One open vhost file: a pair of rings.
///
/// Rings start in this order: features, version of the messages, memory table,
/// ring addresses, translations of the rings, eventfds. Then the caller sets
/// the back end. To stop a ring, the caller removes the back end and calls
/// [`ring_stopped`](Self::ring_stopped).
pub struct Vhost {
    file: Arc<File>,
    _worker: Arc<VhostWorker>,
}

impl Vhost {
    /// Opens a file; `name` is for the log, and `failure` records later errors.
    /// `pair` is its place among the queue pairs of the device, if that has
    /// several.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn open(
        kind: Kind,
        name: &str,
        context: &VhostContext,
        pair: Option<QueuePair>,
        failure: &Arc<FailureLatch>,
    ) -> Result<Self, OpenError> {
        let kernel = Arc::new(VhostKernel::open(kind, Arc::clone(&context.ram))?);
        let other = |source| OpenError::Other { kind, source };
        let options = IotlbOptions {
            limit: sys::iotlb_limit(),
            prefill: context.prefill,
            prefetch: context.prefetch,
            pair,
        };
        let channel = Arc::clone(&kernel) as Arc<dyn Channel>;
        let iotlb = VhostIotlb::new(name, channel, options, Arc::clone(failure));
        let error = || EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(other);
        let file = Arc::new(File {
            kernel,
            iotlb: iotlb.map_err(other)?,
            errors: [error()?, error()?],
            failure: Arc::clone(failure),
            translated: AtomicBool::new(false),
        });
        let [first, second] = &file.errors;
        let served = Arc::downgrade(&file);
        let sources: [&dyn std::os::fd::AsRawFd; 4] =
            [&*file.kernel, file.iotlb.wake(), first, second];
        context.worker.serve(served, &sources).map_err(other)?;
        Ok(Self {
            file,
            _worker: Arc::clone(&context.worker),
        })
    }

    /// The kernel's device, for its other ioctls.
    #[must_use]
    pub fn kernel(&self) -> &VhostKernel {
        &self.file.kernel
    }

    /// A handle for the IOTLB's statistics, which outlives this.
    #[must_use]
    pub fn monitor(&self) -> IotlbMonitor {
        IotlbMonitor(Arc::clone(&self.file.iotlb))
    }

    /// The kernel's features that may be offered to a driver.
    ///
    /// # Errors
    /// Error of the ioctl.
    pub fn features(&self) -> io::Result<u64> {
        Ok(self.file.kernel.features()? & !NEVER)
    }

    /// Sets up the kernel's device for the negotiated `features`. No ring runs.
    ///
    /// # Errors
    /// The kernel refused an ioctl.
    pub fn negotiated(&self, features: u64) -> Result<(), DeviceError> {
        let translated = features >> VIRTIO_F_ACCESS_PLATFORM & 1 == 1;
        let kernel = &self.file.kernel;
        let served = kernel.features().and_then(|known| {
            if translated && known >> VIRTIO_F_ACCESS_PLATFORM & 1 == 0 {
                return Err(io::Error::from(io::ErrorKind::Unsupported));
            }
            kernel.set_up(features & known & !NEVER)
        });
        served.map_err(DeviceError::backend("setting up the host's vhost"))?;
        self.file.translated.store(translated, Ordering::Release);
        Ok(())
    }

    /// Sets up ring `index` of this file for queue `number` of the device,
    /// except for its back end.
    ///
    /// # Errors
    /// The rings are not in memory, or the kernel refused an ioctl.
    pub fn set_up_ring(
        &self,
        index: usize,
        number: u16,
        started: &RunningQueue,
    ) -> Result<(), DeviceError> {
        let queue = &started.queue;
        let layout = Layout {
            size: queue.size(),
            desc: Iova(queue.desc_table()),
            avail: Iova(queue.avail_ring()),
            used: Iova(queue.used_ring()),
        };
        let file = &self.file;
        let translated = file.translated.load(Ordering::Acquire);
        let addresses = match (started.space().region(), translated) {
            (Some(_), true) => RingAddresses {
                desc: layout.desc.0,
                avail: layout.avail.0,
                used: layout.used.0,
            },
            (None, false) => identity_addresses(started.space(), &layout, number)?,
            _ => {
                let error = QueueError("the driver and the machine disagree on the IOMMU");
                return Err(error.of(number));
            }
        };
        file.kernel
            .set_ring(index, layout.size, addresses, queue.next_avail())
            .map_err(DeviceError::backend("telling the host's vhost of a queue"))?;
        if let Some(region) = started.space().region() {
            file.iotlb.attach(started.space(), region)?;
            let ring = Ring {
                number,
                layout,
                kick: Arc::clone(&started.kick),
            };
            file.iotlb.start_ring(ring_number(index), ring)?;
        }
        let error = file.errors.get(index);
        let error = error.ok_or(io::Error::from(io::ErrorKind::InvalidInput));
        error
            .and_then(|error| {
                let call = started.interrupt.eventfd();
                file.kernel.set_eventfds(index, &started.kick, call, error)
            })
            .map_err(DeviceError::backend(
                "connecting a queue to the host's vhost",
            ))
    }

    /// Ends a ring whose back end was removed. Returns its position.
    pub fn ring_stopped(&self, index: usize) -> QueuePosition {
        let file = &self.file;
        file.iotlb.stop_ring(ring_number(index));
        let next = file.kernel.ring_base(index).unwrap_or_else(|error| {
            log::error!("reading the position of a queue from the host's vhost: {error}");
            0
        });
        // vhost uses buffers in order, and has used all that it took.
        QueuePosition {
            next_avail: next,
            next_used: next,
        }
    }

    /// Returns to the state before negotiation: the kernel has no translation.
    /// No ring runs.
    pub fn reset(&self) {
        self.file.iotlb.detach();
    }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        self.file.kernel.halt();
        // The region and the IOTLB refer to each other.
        self.file.iotlb.detach();
    }
}

/// Handle for the statistics of a kernel IOTLB.
#[derive(Clone)]
pub struct IotlbMonitor(Arc<VhostIotlb>);

impl IotlbMonitor {
    /// Statistics since the file was opened.
    #[must_use]
    pub fn stats(&self) -> IotlbStats {
        self.0.stats()
    }
}

fn ring_number(index: usize) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}

/// Addresses of the rings in this process, for a device that is behind no
/// IOMMU.
fn identity_addresses(
    space: &AddressSpace,
    layout: &Layout,
    number: u16,
) -> Result<RingAddresses, DeviceError> {
    let bad = || QueueError::RINGS_OUTSIDE.of(number);
    let [used, desc, avail] = layout.parts().ok_or_else(bad)?.map(|part| {
        let gpa = GuestAddress(part.iova.first().0);
        let len = usize::try_from(part.iova.size()?).ok()?;
        let slice = space.ram().get_slice(gpa, len).ok()?;
        Some(slice.ptr_guard().as_ptr().addr() as u64)
    });
    Ok(RingAddresses {
        desc: desc.ok_or_else(bad)?,
        avail: avail.ok_or_else(bad)?,
        used: used.ok_or_else(bad)?,
    })
}
