//! A PCI function taken from the kernel's driver and used by this process through VFIO
//! (`linux/vfio.h`, type 1 version 2).

#![allow(
    unsafe_code,
    reason = "VFIO is driven by ioctls that take structures by address"
)]

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::memory::Shared;

const TYPE1_V2: usize = 3;
const GROUP_VIABLE: u32 = 1;
const REGION_CAN_MMAP: u32 = 4;
const CONFIG_REGION: u32 = 7;
const MSIX_INDEX: u32 = 2;
const IRQ_DATA_EVENTFD: u32 = 1 << 2;
const IRQ_ACTION_TRIGGER: u32 = 1 << 5;

/// The number of a VFIO ioctl: `_IO(';', 100 + index)`.
const fn request(index: u64) -> u64 {
    0x3b00 + 100 + index
}

const GET_API_VERSION: u64 = request(0);
const SET_IOMMU: u64 = request(2);
const GROUP_GET_STATUS: u64 = request(3);
const GROUP_SET_CONTAINER: u64 = request(4);
const GROUP_GET_DEVICE_FD: u64 = request(6);
const DEVICE_GET_REGION_INFO: u64 = request(8);
const DEVICE_SET_IRQS: u64 = request(10);
const IOMMU_MAP_DMA: u64 = request(13);
const IOMMU_UNMAP_DMA: u64 = request(14);

#[repr(C)]
#[derive(Default)]
struct GroupStatus {
    argsz: u32,
    flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct RegionInfo {
    argsz: u32,
    flags: u32,
    index: u32,
    cap_offset: u32,
    size: u64,
    offset: u64,
}

#[repr(C)]
struct IrqSet {
    argsz: u32,
    flags: u32,
    index: u32,
    start: u32,
    count: u32,
    eventfd: i32,
}

#[repr(C)]
struct DmaMap {
    argsz: u32,
    flags: u32,
    vaddr: u64,
    iova: u64,
    size: u64,
}

#[repr(C)]
struct DmaUnmap {
    argsz: u32,
    flags: u32,
    iova: u64,
    size: u64,
}

fn argsz<T>() -> u32 {
    u32::try_from(size_of::<T>()).expect("these structures are small")
}

/// Calls an ioctl that takes an integer.
fn ioctl(file: &impl AsRawFd, number: u64, value: usize) -> io::Result<i32> {
    // SAFETY: the VFIO ioctls called through here read no memory of ours.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), number as _, value) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

/// Calls an ioctl that reads and writes `argument`.
fn ioctl_with<T>(file: &impl AsRawFd, number: u64, argument: &mut T) -> io::Result<i32> {
    let argument: *mut T = argument;
    // SAFETY: `argument` is valid for both and of the structure that the kernel expects for
    // `number`; where that has argsz, it holds the structure's size.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), number as _, argument) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(result)
}

fn open(path: impl AsRef<Path>) -> Result<File> {
    let path = path.as_ref();
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .with_context(|| format!("cannot open {}", path.display()))
}

/// Binding of a function to vfio-pci; its kernel driver is restored when dropped.
pub struct Binding {
    address: String,
}

impl Binding {
    /// Binds the function at `address` (`0000:00:02.0`) to vfio-pci.
    pub fn to_vfio(address: &str) -> Result<Self> {
        let binding = Self {
            address: address.to_owned(),
        };
        ensure!(
            binding.sysfs("").exists(),
            "there is no PCI function {address}"
        );
        binding.rebind("vfio-pci")?;
        ensure!(
            binding.driver().as_deref() == Some("vfio-pci"),
            "{address} is not bound to vfio-pci: is the module loaded?"
        );
        Ok(binding)
    }

    fn sysfs(&self, name: &str) -> PathBuf {
        Path::new("/sys/bus/pci/devices")
            .join(&self.address)
            .join(name)
    }

    fn driver(&self) -> Option<String> {
        let link = fs::read_link(self.sysfs("driver")).ok()?;
        Some(link.file_name()?.to_string_lossy().into_owned())
    }

    /// Unbinds the current driver and probes again; an empty `driver` permits any.
    fn rebind(&self, driver: &str) -> Result<()> {
        let write = |path: PathBuf, text: &str| {
            fs::write(&path, text)
                .with_context(|| format!("cannot write {text:?} to {}", path.display()))
        };
        write(self.sysfs("driver_override"), &format!("{driver}\n"))?;
        if self.driver().is_some() {
            write(self.sysfs("driver/unbind"), &self.address)?;
        }
        write("/sys/bus/pci/drivers_probe".into(), &self.address)
    }

    fn group(&self) -> Result<String> {
        let link = fs::read_link(self.sysfs("iommu_group"))
            .with_context(|| format!("{} is behind no IOMMU", self.address))?;
        let number = link.file_name().context("iommu_group without a number")?;
        Ok(number.to_string_lossy().into_owned())
    }
}

impl Drop for Binding {
    fn drop(&mut self) {
        if let Err(error) = self.rebind("") {
            eprintln!("isolation: {} stays with vfio-pci: {error:#}", self.address);
        }
    }
}

/// An I/O address space of this process: the device reaches only its mappings.
#[derive(Clone)]
pub struct Container {
    file: Rc<File>,
}

/// Accesses of a device that a mapping permits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read.
    Read,
    /// Read and write.
    ReadWrite,
}

impl Container {
    /// Maps `memory` at `iova` for the device.
    pub fn map(&self, memory: &Shared, iova: u64, access: Access) -> Result<Mapping> {
        let size = memory.len() as u64;
        let mut argument = DmaMap {
            argsz: argsz::<DmaMap>(),
            flags: match access {
                Access::Read => 1,
                Access::ReadWrite => 3,
            },
            vaddr: memory.address(),
            iova,
            size,
        };
        ioctl_with(&*self.file, IOMMU_MAP_DMA, &mut argument)
            .with_context(|| format!("cannot map {size:#x} bytes at {iova:#x}"))?;
        Ok(Mapping {
            container: self.clone(),
            iova,
            size,
        })
    }
}

/// A mapping of I/O addresses, until it is unmapped or dropped.
pub struct Mapping {
    container: Container,
    iova: u64,
    size: u64,
}

impl Mapping {
    /// Unmaps the range. When this returns, the device no longer uses it.
    pub fn unmap(mut self) -> Result<()> {
        self.release()
    }

    fn release(&mut self) -> Result<()> {
        let (iova, size) = (self.iova, std::mem::take(&mut self.size));
        let mut argument = DmaUnmap {
            argsz: argsz::<DmaUnmap>(),
            flags: 0,
            iova,
            size,
        };
        ioctl_with(&*self.container.file, IOMMU_UNMAP_DMA, &mut argument)
            .with_context(|| format!("cannot unmap {size:#x} bytes at {iova:#x}"))?;
        ensure!(
            argument.size == size,
            "{:#x} bytes of {size:#x} were unmapped at {iova:#x}",
            argument.size
        );
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.size != 0
            && let Err(error) = self.release()
        {
            eprintln!("isolation: {error:#}");
        }
    }
}

/// A PCI function that this process owns.
pub struct Device {
    device: File,
    container: Container,
    /// Released after the device, as VFIO requires.
    _group: File,
}

impl Device {
    /// Opens the function that `binding` has bound.
    pub fn open(binding: &Binding) -> Result<Self> {
        let container = open("/dev/vfio/vfio")?;
        let version = ioctl(&container, GET_API_VERSION, 0).context("cannot ask VFIO's version")?;
        ensure!(version == 0, "VFIO has version {version}, not 0");
        let number = binding.group()?;
        let group = open(format!("/dev/vfio/{number}"))?;
        let mut status = GroupStatus {
            argsz: argsz::<GroupStatus>(),
            flags: 0,
        };
        ioctl_with(&group, GROUP_GET_STATUS, &mut status).context("cannot ask a group's state")?;
        ensure!(
            status.flags & GROUP_VIABLE != 0,
            "IOMMU group {number} is shared with a kernel driver"
        );
        let mut fd = container.as_raw_fd();
        ioctl_with(&group, GROUP_SET_CONTAINER, &mut fd).context("cannot set the container")?;
        ioctl(&container, SET_IOMMU, TYPE1_V2)
            .context("cannot set the IOMMU (allow_unsafe_interrupts missing?)")?;
        let mut name = [0_u8; 32];
        name[..binding.address.len()].copy_from_slice(binding.address.as_bytes());
        let fd =
            ioctl_with(&group, GROUP_GET_DEVICE_FD, &mut name).context("cannot open the device")?;
        // SAFETY: the ioctl returned a new file descriptor with no other owner.
        let device = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self {
            device: device.into(),
            container: Container {
                file: Rc::new(container),
            },
            _group: group,
        })
    }

    /// Its I/O address space.
    pub fn container(&self) -> &Container {
        &self.container
    }

    fn region(&self, index: u32) -> Result<RegionInfo> {
        let mut info = RegionInfo {
            argsz: argsz::<RegionInfo>(),
            index,
            ..RegionInfo::default()
        };
        ioctl_with(&self.device, DEVICE_GET_REGION_INFO, &mut info)
            .with_context(|| format!("cannot ask about region {index}"))?;
        Ok(info)
    }

    /// Maps a whole BAR.
    pub fn map_bar(&self, index: u8) -> Result<Shared> {
        let info = self.region(index.into())?;
        let size = usize::try_from(info.size)?;
        ensure!(
            size != 0 && info.flags & REGION_CAN_MMAP != 0,
            "BAR {index} of {size:#x} bytes cannot be mapped"
        );
        Shared::of_file(self.device.as_fd(), info.offset, size)
            .with_context(|| format!("cannot map BAR {index}"))
    }

    /// The first 256 bytes of configuration space.
    pub fn config_space(&self) -> Result<[u8; 256]> {
        let info = self.region(CONFIG_REGION)?;
        let mut space = [0; 256];
        self.device
            .read_exact_at(&mut space, info.offset)
            .context("cannot read configuration space")?;
        Ok(space)
    }

    /// Sets bits of the command register.
    pub fn enable(&self, bits: u16) -> Result<()> {
        const COMMAND: u64 = 4;
        let offset = self.region(CONFIG_REGION)?.offset + COMMAND;
        let mut command = [0; 2];
        self.device.read_exact_at(&mut command, offset)?;
        let command = u16::from_le_bytes(command) | bits;
        self.device
            .write_all_at(&command.to_le_bytes(), offset)
            .context("cannot write the command register")
    }

    /// Connects MSI-X vector 0, the only one enabled, to an eventfd.
    pub fn msix(&self) -> Result<Interrupt<'_>> {
        // SAFETY: eventfd takes plain numbers and returns a new file descriptor or an error.
        let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error()).context("cannot make an eventfd");
        }
        // SAFETY: the descriptor is new and has no other owner.
        let event = unsafe { OwnedFd::from_raw_fd(fd) };
        self.set_irqs(IRQ_DATA_EVENTFD, 1, event.as_raw_fd())
            .context("cannot enable MSI-X")?;
        Ok(Interrupt {
            device: self,
            event: event.into(),
        })
    }

    fn set_irqs(&self, data: u32, count: u32, eventfd: i32) -> io::Result<()> {
        let mut argument = IrqSet {
            argsz: argsz::<IrqSet>(),
            flags: data | IRQ_ACTION_TRIGGER,
            index: MSIX_INDEX,
            start: 0,
            count,
            eventfd,
        };
        ioctl_with(&self.device, DEVICE_SET_IRQS, &mut argument).map(drop)
    }
}

/// MSI-X vector 0, enabled until dropped.
pub struct Interrupt<'a> {
    device: &'a Device,
    event: File,
}

impl Interrupt<'_> {
    /// Whether the interrupt arrives within `limit`.
    pub fn came_within(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while Instant::now() < end {
            let mut count = [0; 8];
            if matches!(io::Read::read(&mut &self.event, &mut count), Ok(8)) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        false
    }
}

impl Drop for Interrupt<'_> {
    fn drop(&mut self) {
        const DATA_NONE: u32 = 1;
        if let Err(error) = self.device.set_irqs(DATA_NONE, 0, -1) {
            eprintln!("isolation: cannot disable MSI-X: {error}");
        }
    }
}
