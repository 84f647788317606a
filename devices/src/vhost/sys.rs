//! Safe calls of the kernel's vhost devices: through the crate `vhost`, and
//! ioctls that it does not have.
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

/// Kind of a vhost device of the kernel.
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

/// Error of opening a vhost device. The text is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The device node is missing: the module is not loaded or does not exist.
    #[error("{path} is missing: load it with `modprobe {module}`", path = .0.path(), module = .0.module())]
    Missing(Kind),
    /// The user may not open the device.
    #[error("no permission to open {path}: join its group, or `chmod a+rw {path}`", path = .0.path())]
    Denied(Kind),
    /// Another error.
    #[error("{path} cannot be used", path = .kind.path())]
    Other {
        /// Kind of the device.
        kind: Kind,
        /// Error of open(2) or of the ioctls.
        source: io::Error,
    },
}

/// Addresses of the three rings of a queue: I/O virtual behind an IOMMU,
/// otherwise virtual in this process.
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
    /// Rings that may have a back end, one bit each. The kernel refuses to
    /// remove the back end of a ring that was never set up.
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

    /// The features of the kernel's device, including `ACCESS_PLATFORM` if it
    /// has an IOTLB.
    ///
    /// # Errors
    /// Error of the ioctl.
    pub fn features(&self) -> io::Result<u64> {
        self.get_features().map_err(from_crate)
    }

    /// Sets features and memory. With `ACCESS_PLATFORM` the device gets a new,
    /// empty IOTLB. No ring has a back end.
    ///
    /// # Errors
    /// Error of an ioctl.
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

    /// Sets size and addresses of a ring, and the available entry to continue
    /// from. The ring has no back end.
    ///
    /// # Errors
    /// Error of an ioctl.
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

    /// Sets a ring's eventfds for kicks, interrupts and errors.
    ///
    /// # Errors
    /// Error of an ioctl.
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

    /// The next available entry of a stopped ring.
    ///
    /// # Errors
    /// Error of the ioctl.
    pub fn ring_base(&self, index: usize) -> io::Result<u16> {
        let base = self.get_vring_base(index).map_err(from_crate)?;
        Ok(u16::try_from(base & 0xffff).unwrap_or(0))
    }

    /// Sets or removes the tap of a network ring. When a removal returns, the
    /// kernel accesses none of the queue's memory.
    ///
    /// # Errors
    /// Error of the ioctl; `EFAULT` when the used ring is not available.
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

    /// Removes a ring's back end, if it has one. On a socket device this
    /// removes the back end of the other ring too.
    ///
    /// # Errors
    /// Error of the ioctl.
    pub fn detach(&self, index: usize) -> io::Result<()> {
        if self.backends.load(Ordering::Acquire) & ring_bit(index) == 0 {
            return Ok(());
        }
        match self.kind {
            Kind::Net => self.set_tap(index, None),
            Kind::Vsock => self.set_running(false),
        }
    }

    /// Changes back ends: a bit is set before the kernel may have the back end,
    /// and cleared after the kernel has removed it.
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

    /// Sets the context identifier of a socket device.
    ///
    /// # Errors
    /// Error of the ioctl; `EADDRINUSE` when another device has it.
    pub fn set_cid(&self, cid: u64) -> io::Result<()> {
        // SAFETY: the kernel reads the u64 that the reference is to.
        check(unsafe { ioctl_with_ref(self, VHOST_VSOCK_SET_GUEST_CID(), &cid) })
    }

    /// Starts or stops both rings of a socket device. When a stop returns, the
    /// kernel accesses none of their memory.
    ///
    /// # Errors
    /// Error of the ioctl; `EFAULT` when a used ring is not available.
    pub fn set_running(&self, running: bool) -> io::Result<()> {
        let value = libc::c_int::from(running);
        self.changed(u32::MAX, running, || {
            // SAFETY: the kernel reads the int that the reference is to.
            check(unsafe { ioctl_with_ref(self, VHOST_VSOCK_SET_RUNNING(), &value) })
        })
    }

    /// Sends a message to the IOTLB. When an invalidation has returned, the
    /// kernel uses no entry that overlaps the range.
    ///
    /// # Errors
    /// The kernel has no IOTLB or no memory, or the message cannot be encoded.
    pub fn send(&self, message: &Message) -> io::Result<()> {
        let bytes = message
            .to_bytes()
            .ok_or(io::Error::from(io::ErrorKind::InvalidInput))?;
        match (&self.file).write(&bytes)? {
            SIZE => Ok(()),
            _ => Err(io::Error::from(io::ErrorKind::WriteZero)),
        }
    }

    /// Reads the next miss; `None` when there is none.
    ///
    /// # Errors
    /// The kernel sent an unknown message.
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

/// Upper bound on entries of a kernel IOTLB on this host; 0 is no limit.
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
    fn errors_of_the_crate_keep_the_system_s_error() {
        let inner = io::Error::from_raw_os_error(libc::EFAULT);
        let error = from_crate(vhost::Error::IoctlError(inner));
        assert_eq!(error.raw_os_error(), Some(libc::EFAULT));
    }
}
