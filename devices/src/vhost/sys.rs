//! The kernel's vhost devices behind safe calls: what the crate `vhost` lacks
//! of them, and the rest through that crate.
#![allow(unsafe_code)] // The ioctls below; each says why it is sound.

use std::fs::{File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use iommu::GuestRam;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{
    VHOST_BACKEND_F_IOTLB_MSG_V2, VHOST_GET_BACKEND_FEATURES, VHOST_NET_SET_BACKEND,
    VHOST_SET_BACKEND_FEATURES, VHOST_SET_VRING_ADDR, VHOST_VSOCK_SET_GUEST_CID,
    VHOST_VSOCK_SET_RUNNING, vhost_vring_addr, vhost_vring_file,
};
use vhost::{VhostBackend as _, VhostUserMemoryRegionInfo};
use virtio_bindings::virtio_config::VIRTIO_F_ACCESS_PLATFORM;
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _, MemoryRegionAddress};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};

use super::message::{Message, Miss, SIZE};
use super::shadow::DEFAULT_LIMIT;

/// The module parameter that limits the entries of every kernel IOTLB.
const LIMIT_PARAMETER: &str = "/sys/module/vhost/parameters/max_iotlb_entries";

/// Which of the kernel's vhost devices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// `/dev/vhost-net`: one pair of network queues.
    Net,
    /// `/dev/vhost-vsock`: the data queues of a socket device.
    Vsock,
}

impl Kind {
    const fn path(self) -> &'static str {
        match self {
            Self::Net => "/dev/vhost-net",
            Self::Vsock => "/dev/vhost-vsock",
        }
    }

    const fn module(self) -> &'static str {
        match self {
            Self::Net => "vhost_net",
            Self::Vsock => "vhost_vsock",
        }
    }
}

/// Why a vhost device cannot be had. One line for the user.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The module is not loaded, or not there.
    #[error("{path} is missing: load it with `modprobe {module}`", path = .0.path(), module = .0.module())]
    Missing(Kind),
    /// The user may not open it.
    #[error("no permission to open {path}: join its group, or `chmod a+rw {path}`", path = .0.path())]
    Denied(Kind),
    /// Anything else.
    #[error("{path} cannot be used", path = .kind.path())]
    Other {
        /// Which device.
        kind: Kind,
        /// What the system said.
        source: io::Error,
    },
}

/// The three rings of a queue, at addresses as the kernel wants them: I/O
/// virtual behind an IOMMU, else of this process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RingAddresses {
    /// The descriptor table.
    pub desc: u64,
    /// The available ring.
    pub avail: u64,
    /// The used ring.
    pub used: u64,
}

/// An open vhost device, owned by this process.
pub struct VhostKernel {
    kind: Kind,
    file: File,
    ram: Arc<GuestRam>,
    /// The rings that may have a back end, a bit each. The kernel refuses to
    /// take it from one that was never set up.
    backends: AtomicU32,
}

impl VhostKernel {
    /// Opens a device of this kind.
    ///
    /// # Errors
    /// [`OpenError`]
    pub fn open(kind: Kind, ram: Arc<GuestRam>) -> Result<Self, OpenError> {
        let opened = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
            .open(kind.path());
        let file = opened.map_err(|source| match source.raw_os_error() {
            Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => OpenError::Missing(kind),
            Some(libc::EACCES | libc::EPERM) => OpenError::Denied(kind),
            _ => OpenError::Other { kind, source },
        })?;
        let kernel = Self {
            kind,
            file,
            ram,
            backends: AtomicU32::new(0),
        };
        let owned = kernel.set_owner().map_err(from_crate);
        owned.map_err(|source| OpenError::Other { kind, source })?;
        Ok(kernel)
    }

    /// The features of the kernel's device, `ACCESS_PLATFORM` among them if it
    /// has an IOTLB.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn features(&self) -> io::Result<u64> {
        self.get_features().map_err(from_crate)
    }

    /// Sets features and memory. With `ACCESS_PLATFORM` the device gets a new,
    /// empty IOTLB. No ring has a back end.
    ///
    /// # Errors
    /// Of the ioctls.
    pub fn set_up(&self, features: u64) -> io::Result<()> {
        self.set_features(features).map_err(from_crate)?;
        if features >> VIRTIO_F_ACCESS_PLATFORM & 1 == 1 {
            self.use_messages_of_version_2()?;
        }
        let regions: Vec<_> = self
            .ram
            .iter()
            .map(|region| {
                let host = region.get_host_address(MemoryRegionAddress(0));
                Ok(VhostUserMemoryRegionInfo {
                    guest_phys_addr: region.start_addr().0,
                    memory_size: region.len(),
                    userspace_addr: host.map_err(io::Error::other)?.addr() as u64,
                    ..VhostUserMemoryRegionInfo::default()
                })
            })
            .collect::<io::Result<_>>()?;
        self.set_mem_table(&regions).map_err(from_crate)?;
        Ok(())
    }

    fn use_messages_of_version_2(&self) -> io::Result<()> {
        let bit = 1_u64 << VHOST_BACKEND_F_IOTLB_MSG_V2;
        let mut offered = 0_u64;
        // SAFETY: the kernel writes the u64 that the reference is to.
        let result =
            unsafe { ioctl_with_mut_ref(self, VHOST_GET_BACKEND_FEATURES(), &mut offered) };
        check(result)?;
        if offered & bit == 0 {
            return Err(io::Error::from(io::ErrorKind::Unsupported));
        }
        // SAFETY: the kernel reads the u64 that the reference is to.
        check(unsafe { ioctl_with_ref(self, VHOST_SET_BACKEND_FEATURES(), &bit) })
    }

    /// Says where a ring is, how large, and from which available entry to go
    /// on. It has no back end.
    ///
    /// # Errors
    /// Of the ioctls.
    pub fn set_ring(
        &self,
        index: usize,
        size: u16,
        at: RingAddresses,
        next_avail: u16,
    ) -> io::Result<()> {
        self.set_vring_num(index, size).map_err(from_crate)?;
        let addresses = vhost_vring_addr {
            index: ring_number(index),
            flags: 0,
            desc_user_addr: at.desc,
            used_user_addr: at.used,
            avail_user_addr: at.avail,
            log_guest_addr: 0,
        };
        // SAFETY: the kernel reads the structure that the reference is to. It
        // treats what is in it as addresses of user space and checks them.
        check(unsafe { ioctl_with_ref(self, VHOST_SET_VRING_ADDR(), &addresses) })?;
        self.set_vring_base(index, next_avail).map_err(from_crate)
    }

    /// Connects a ring's eventfds: kicks in, interrupts and errors out.
    ///
    /// # Errors
    /// Of the ioctls.
    pub fn set_eventfds(
        &self,
        index: usize,
        kick: &EventFd,
        call: &EventFd,
        error: &EventFd,
    ) -> io::Result<()> {
        self.set_vring_err(index, error).map_err(from_crate)?;
        self.set_vring_call(index, call).map_err(from_crate)?;
        self.set_vring_kick(index, kick).map_err(from_crate)
    }

    /// The next available entry of a ring that has stopped.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn ring_base(&self, index: usize) -> io::Result<u16> {
        let base = self.get_vring_base(index).map_err(from_crate)?;
        Ok(u16::try_from(base & 0xffff).unwrap_or(0))
    }

    /// Gives a network ring its tap, or takes it away: then the kernel touches
    /// none of the queue's memory any more when this returns.
    ///
    /// # Errors
    /// Of the ioctl; `EFAULT` when the used ring is not to be had.
    pub fn set_tap(&self, index: usize, tap: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let backend = vhost_vring_file {
            index: ring_number(index),
            fd: tap.map_or(-1, |tap| tap.as_raw_fd()),
        };
        self.changed(ring_bit(index), tap.is_some(), || {
            // SAFETY: the kernel reads the structure that the reference is to,
            // and takes its own reference on the file, which is open while
            // borrowed.
            check(unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &backend) })
        })
    }

    /// Takes a ring's back end away, if it has one, and with it that of the
    /// other ring of a socket device.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn detach(&self, index: usize) -> io::Result<()> {
        if self.backends.load(Ordering::Acquire) & ring_bit(index) == 0 {
            return Ok(());
        }
        match self.kind {
            Kind::Net => self.set_tap(index, None),
            Kind::Vsock => self.set_running(false),
        }
    }

    /// Follows a change of back ends: a bit is set before the kernel may have
    /// the back end, and cleared after it has not.
    fn changed(
        &self,
        rings: u32,
        attached: bool,
        change: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<()> {
        if attached {
            self.backends.fetch_or(rings, Ordering::AcqRel);
        }
        change()?;
        if !attached {
            self.backends.fetch_and(!rings, Ordering::AcqRel);
        }
        Ok(())
    }

    /// Gives a socket device its context identifier.
    ///
    /// # Errors
    /// Of the ioctl; `EADDRINUSE` when another device has it.
    pub fn set_cid(&self, cid: u64) -> io::Result<()> {
        // SAFETY: the kernel reads the u64 that the reference is to.
        check(unsafe { ioctl_with_ref(self, VHOST_VSOCK_SET_GUEST_CID(), &cid) })
    }

    /// Starts or stops both rings of a socket device: stopped, the kernel
    /// touches none of their memory any more when this returns.
    ///
    /// # Errors
    /// Of the ioctl; `EFAULT` when a used ring is not to be had.
    pub fn set_running(&self, running: bool) -> io::Result<()> {
        let value = libc::c_int::from(running);
        self.changed(u32::MAX, running, || {
            // SAFETY: the kernel reads the int that the reference is to.
            check(unsafe { ioctl_with_ref(self, VHOST_VSOCK_SET_RUNNING(), &value) })
        })
    }

    /// Sends a message to the IOTLB. When an invalidation has returned, the
    /// kernel uses nothing of the range any more.
    ///
    /// # Errors
    /// The kernel has no IOTLB or no memory, or the message has no form.
    pub fn send(&self, message: &Message) -> io::Result<()> {
        let bytes = message
            .to_bytes()
            .ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
        match (&self.file).write(&bytes)? {
            SIZE => Ok(()),
            _ => Err(io::Error::from(io::ErrorKind::WriteZero)),
        }
    }

    /// Takes the next miss, or `None` when there is none now.
    ///
    /// # Errors
    /// The kernel sent something else.
    pub fn receive(&self) -> io::Result<Option<Miss>> {
        let mut bytes = [0; SIZE];
        match (&self.file).read(&mut bytes) {
            Ok(count) => {
                let miss = Miss::parse(bytes.get(..count).unwrap_or_default());
                miss.map(Some).map_err(io::Error::other)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl AsRawFd for VhostKernel {
    fn as_raw_fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }
}

impl AsFd for VhostKernel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl VhostKernBackend for VhostKernel {
    type AS = Arc<GuestRam>;

    fn mem(&self) -> &Self::AS {
        &self.ram
    }
}

/// How many entries a kernel IOTLB holds on this host; 0 is no limit.
#[must_use]
pub fn iotlb_limit() -> usize {
    let parameter = std::fs::read_to_string(LIMIT_PARAMETER).ok();
    let value = parameter.and_then(|text| text.trim().parse().ok());
    value.unwrap_or(DEFAULT_LIMIT)
}

fn ring_number(index: usize) -> u32 {
    u32::try_from(index).unwrap_or(u32::MAX)
}

fn ring_bit(index: usize) -> u32 {
    u32::try_from(index)
        .ok()
        .and_then(|shift| 1_u32.checked_shl(shift))
        .unwrap_or(0)
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn from_crate(error: vhost::Error) -> io::Error {
    match error {
        vhost::Error::IoctlError(source) | vhost::Error::IOError(source) => source,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn missing_device_names_the_module_to_load() {
        for (kind, path, module) in [
            (Kind::Net, "/dev/vhost-net", "vhost_net"),
            (Kind::Vsock, "/dev/vhost-vsock", "vhost_vsock"),
        ] {
            let text = OpenError::Missing(kind).to_string();
            assert!(text.contains(path) && text.contains(&format!("modprobe {module}")));
            assert!(OpenError::Denied(kind).to_string().contains(path));
        }
    }

    #[test]
    fn errors_of_the_crate_keep_what_the_system_said() {
        let inner = io::Error::from_raw_os_error(libc::EFAULT);
        let error = from_crate(vhost::Error::IoctlError(inner));
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
}
