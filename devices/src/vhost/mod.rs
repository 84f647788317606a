//! The host kernel's vhost devices behind the guest's IOMMU.
//!
//! [`sys`] talks to the kernel, [`shadow`] knows what its IOTLB holds,
//! [`iotlb`] keeps that in step with the IOMMU, [`worker`] answers its misses,
//! and [`Vhost`] starts and stops rings in the order that the kernel wants.

pub mod iotlb;
pub mod message;
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
use self::sys::{Kind, OpenError, RingAddresses, VhostKernel};
use self::worker::{EpollClient, VhostWorker};
use crate::failure::{DeviceError, FailureLatch};
use crate::queue::posted::Layout;
use crate::queue::{QueuePosition, RunningQueue};

/// Rings of a vhost file: both kinds have a pair.
pub const RINGS: usize = 2;

// Sources of a file, as its thread numbers them.
const MISSES: u32 = 0;
const WAKE: u32 = 1;
const ERRORS: u32 = 2;

/// Features that vhost gives another meaning, or that are for migration.
const NEVER: u64 = 1 << VHOST_F_LOG_ALL | 1 << VHOST_NET_F_VIRTIO_NET_HDR;

/// What is given to every vhost file of a machine.
#[derive(Clone)]
pub struct VhostContext {
    /// The guest's RAM.
    pub ram: Arc<GuestRam>,
    /// Answers misses.
    pub worker: Arc<VhostWorker>,
    /// Send new mappings when they are made, if the IOMMU tells of them.
    pub prefill: bool,
    /// Translate every posted buffer of a queue that misses one.
    pub prefetch: bool,
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

/// What the thread sees of a file.
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
                self.iotlb.revive();
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
/// ring addresses, translations of the rings, eventfds, and then the back end,
/// which is the caller's. They stop in the other: the caller takes the back
/// end away, then [`ring_stopped`](Self::ring_stopped).
pub struct Vhost {
    file: Arc<File>,
    _worker: Arc<VhostWorker>,
}

impl Vhost {
    /// Opens a file; `name` is for the log, and `failure` gets what goes wrong
    /// later.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn open(
        kind: Kind,
        name: &str,
        context: &VhostContext,
        failure: &Arc<FailureLatch>,
    ) -> Result<Self, OpenError> {
        let kernel = Arc::new(VhostKernel::open(kind, Arc::clone(&context.ram))?);
        let other = |source| OpenError::Other { kind, source };
        let options = IotlbOptions {
            limit: sys::iotlb_limit(),
            prefill: context.prefill,
            prefetch: context.prefetch,
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

    /// The kernel's end.
    #[must_use]
    pub fn kernel(&self) -> &VhostKernel {
        &self.file.kernel
    }

    /// Shows how the IOTLB stands, also after this is gone into a transport.
    #[must_use]
    pub fn monitor(&self) -> IotlbMonitor {
        IotlbMonitor(Arc::clone(&self.file.iotlb))
    }

    /// The features that the kernel serves, of those that a driver can see.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn features(&self) -> io::Result<u64> {
        Ok(self.file.kernel.features()? & !NEVER)
    }

    /// The driver negotiated `features`: sets up what the kernel knows of
    /// them. No ring runs.
    ///
    /// # Errors
    /// The kernel refused.
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

    /// Sets up ring `index` of this file for a queue, which is number `number`
    /// of the device, up to its back end.
    ///
    /// # Errors
    /// Its rings are not in memory, or the kernel refused.
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
                return Err(DeviceError::BadQueue {
                    queue: number,
                    reason: "the driver and the machine disagree on the IOMMU",
                });
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

    /// A ring's back end has been taken away: where it is.
    pub fn ring_stopped(&self, index: usize) -> QueuePosition {
        let file = &self.file;
        file.iotlb.stop_ring(ring_number(index));
        let next = file.kernel.ring_base(index).unwrap_or_else(|error| {
            log::error!("reading the position of a queue from the host's vhost: {error}");
            0
        });
        // vhost uses buffers in order, and has finished all that it took.
        QueuePosition {
            next_avail: next,
            next_used: next,
        }
    }

    /// Back to before negotiation: no ring runs, and the kernel holds no
    /// translation.
    pub fn reset(&self) {
        self.file.iotlb.detach();
    }
}

impl Drop for Vhost {
    fn drop(&mut self) {
        self.file.kernel.halt();
        // The region knows the IOTLB, which knows the region.
        self.file.iotlb.detach();
    }
}

/// Shows how a kernel IOTLB stands.
#[derive(Clone)]
pub struct IotlbMonitor(Arc<VhostIotlb>);

impl IotlbMonitor {
    /// How it stands now.
    #[must_use]
    pub fn stats(&self) -> IotlbStats {
        self.0.stats()
    }
}

fn ring_number(index: usize) -> u16 {
    u16::try_from(index).unwrap_or(u16::MAX)
}

/// The rings in this process's memory, for a device that no IOMMU stands
/// before.
fn identity_addresses(
    space: &AddressSpace,
    layout: &Layout,
    number: u16,
) -> Result<RingAddresses, DeviceError> {
    let bad = || DeviceError::BadQueue {
        queue: number,
        reason: "its rings are not in memory",
    };
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
