//! A modern virtio-net function over PCI (virtio 1.2 §4.1 and §5.1): one queue pair, no offloads,
//! driven by this program.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::memory::{Shared, page_size};
use crate::ring::{self, Ring};
use crate::vfio::{Access, Container, Device, Mapping};

/// The receive queue of the first pair.
pub const RECEIVE: u16 = 0;
/// The transmit queue of the first pair.
pub const TRANSMIT: u16 = 1;
/// VIRTIO_MSI_NO_VECTOR (virtio 1.2 §4.1.4.3).
pub const NO_VECTOR: u16 = 0xffff;

/// IOVA of the rings' pages.
pub const RING_IOVA: u64 = 0x2000_0000;

const COMMAND_MEMORY_AND_MASTER: u16 = 0x6;

const F_MAC: u64 = 1 << 5;
const F_VERSION_1: u64 = 1 << 32;
const F_ACCESS_PLATFORM: u64 = 1 << 33;

const ACKNOWLEDGE: u8 = 1;
const DRIVER: u8 = 2;
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;

/// Offsets in the common configuration structure (virtio 1.2 §4.1.4.3).
mod common {
    pub const DEVICE_FEATURE_SELECT: usize = 0;
    pub const DEVICE_FEATURE: usize = 4;
    pub const DRIVER_FEATURE_SELECT: usize = 8;
    pub const DRIVER_FEATURE: usize = 12;
    pub const CONFIG_MSIX_VECTOR: usize = 16;
    pub const NUM_QUEUES: usize = 18;
    pub const DEVICE_STATUS: usize = 20;
    pub const QUEUE_SELECT: usize = 22;
    pub const QUEUE_SIZE: usize = 24;
    pub const QUEUE_MSIX_VECTOR: usize = 26;
    pub const QUEUE_ENABLE: usize = 28;
    pub const QUEUE_NOTIFY_OFF: usize = 30;
    pub const QUEUE_DESC: usize = 32;
    pub const QUEUE_DRIVER: usize = 40;
    pub const QUEUE_DEVICE: usize = 48;
}

/// A structure of the function and its location (virtio 1.2 §4.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Structure {
    bar: u8,
    offset: usize,
    /// In the notification structure: bytes between the doorbells of two consecutive offsets.
    notify_multiplier: usize,
}

const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const DEVICE_CFG: u8 = 4;

/// Finds the first virtio structure of type `kind` in the capability list.
fn find_structure(space: &[u8; 256], kind: u8) -> Result<Structure> {
    const VENDOR_SPECIFIC: u8 = 9;
    const STATUS_HAS_LIST: u8 = 0x10;
    let byte = |at: usize| {
        space
            .get(at)
            .copied()
            .context("a capability leaves the space")
    };
    let word = |at: usize| -> Result<usize> {
        let bytes = space
            .get(at..at + 4)
            .context("a capability leaves the space")?;
        Ok(usize::try_from(u32::from_le_bytes(bytes.try_into()?))?)
    };
    ensure!(
        space[6] & STATUS_HAS_LIST != 0,
        "there is no capability list"
    );
    let mut at = usize::from(space[0x34] & 0xfc);
    // 192 bytes hold at most 48 capabilities; more form a loop.
    for _ in 0..48 {
        if at == 0 {
            break;
        }
        if byte(at)? == VENDOR_SPECIFIC && byte(at + 3)? == kind {
            let notify_multiplier = if kind == NOTIFY_CFG {
                word(at + 16)?
            } else {
                0
            };
            return Ok(Structure {
                bar: byte(at + 4)?,
                offset: word(at + 8)?,
                notify_multiplier,
            });
        }
        at = usize::from(byte(at + 1)? & 0xfc);
    }
    anyhow::bail!("no virtio structure of type {kind} in the capability list")
}

/// A structure of the function, accessed through its BAR.
struct Window {
    bar: Shared,
    structure: Structure,
}

impl Window {
    fn open(device: &Device, space: &[u8; 256], kind: u8) -> Result<Self> {
        let structure = find_structure(space, kind)?;
        let bar = device.map_bar(structure.bar)?;
        Ok(Self { bar, structure })
    }

    fn u8(&self, at: usize) -> u8 {
        self.bar.u8(self.structure.offset + at)
    }

    fn u16(&self, at: usize) -> u16 {
        self.bar.u16(self.structure.offset + at)
    }

    fn u32(&self, at: usize) -> u32 {
        self.bar.u32(self.structure.offset + at)
    }

    fn set_u8(&self, at: usize, value: u8) {
        self.bar.set_u8(self.structure.offset + at, value);
    }

    fn set_u16(&self, at: usize, value: u16) {
        self.bar.set_u16(self.structure.offset + at, value);
    }

    fn set_u32(&self, at: usize, value: u32) {
        self.bar.set_u32(self.structure.offset + at, value);
    }

    fn set_u64(&self, at: usize, value: u64) {
        self.bar.set_u64(self.structure.offset + at, value);
    }
}

/// A virtio-net function, reset and without queues.
pub struct Function {
    device: Device,
    common: Window,
    notify: Window,
    mac: [u8; 6],
}

impl Function {
    /// Finds the function's structures and enables bus mastering.
    pub fn new(device: Device) -> Result<Self> {
        let space = device.config_space()?;
        let id = [space[0], space[1], space[2], space[3]];
        ensure!(
            id == [0xf4, 0x1a, 0x41, 0x10],
            "vendor and device {id:02x?} are not those of a modern virtio-net"
        );
        device.enable(COMMAND_MEMORY_AND_MASTER)?;
        let config = Window::open(&device, &space, DEVICE_CFG)?;
        let mac = std::array::from_fn(|at| config.u8(at));
        let function = Self {
            common: Window::open(&device, &space, COMMON_CFG)?,
            notify: Window::open(&device, &space, NOTIFY_CFG)?,
            device,
            mac,
        };
        function.reset()?;
        Ok(function)
    }

    /// Its VFIO device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its Ethernet address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Resets the function (virtio 1.2 §4.1.4.3.2: the driver waits until it reads zero).
    pub fn reset(&self) -> Result<()> {
        self.common.set_u8(common::DEVICE_STATUS, 0);
        let end = Instant::now() + Duration::from_secs(10);
        while self.common.u8(common::DEVICE_STATUS) != 0 {
            ensure!(Instant::now() < end, "the reset did not end within 10 s");
        }
        Ok(())
    }

    fn offered_features(&self) -> u64 {
        let half = |select| {
            self.common.set_u32(common::DEVICE_FEATURE_SELECT, select);
            u64::from(self.common.u32(common::DEVICE_FEATURE))
        };
        half(0) | half(1) << 32
    }

    fn accept_features(&self, features: u64) {
        self.common.set_u32(common::DRIVER_FEATURE_SELECT, 0);
        let low = u32::try_from(features & 0xffff_ffff).expect("32 bits were kept");
        self.common.set_u32(common::DRIVER_FEATURE, low);
        self.common.set_u32(common::DRIVER_FEATURE_SELECT, 1);
        let high = u32::try_from(features >> 32).expect("32 bits are left");
        self.common.set_u32(common::DRIVER_FEATURE, high);
    }

    /// Starts the function with new rings (virtio 1.2 §3.1.1). With `vector`, the device signals
    /// used receive buffers by it.
    pub fn start(&self, vector: Option<u16>) -> Result<Queues<'_>> {
        self.reset()?;
        let status = |bits| self.common.set_u8(common::DEVICE_STATUS, bits);
        status(ACKNOWLEDGE);
        status(ACKNOWLEDGE | DRIVER);
        let offered = self.offered_features();
        let wanted = F_VERSION_1 | F_ACCESS_PLATFORM | F_MAC;
        ensure!(
            offered & wanted == wanted,
            "of VERSION_1, ACCESS_PLATFORM and MAC the device offers only {:#x}",
            offered & wanted
        );
        self.accept_features(wanted);
        status(ACKNOWLEDGE | DRIVER | FEATURES_OK);
        ensure!(
            self.common.u8(common::DEVICE_STATUS) & FEATURES_OK != 0,
            "the device does not accept the features {wanted:#x}"
        );
        let queues = self.common.u16(common::NUM_QUEUES);
        ensure!(queues >= 2, "the device has {queues} queues");
        self.common.set_u16(common::CONFIG_MSIX_VECTOR, NO_VECTOR);
        let receive = self.enable(RECEIVE, vector)?;
        let transmit = self.enable(TRANSMIT, None)?;
        status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK);
        Ok(Queues {
            function: self,
            receive,
            transmit,
        })
    }

    fn enable(&self, index: u16, vector: Option<u16>) -> Result<Queue> {
        let page = page_size();
        let container = self.device.container();
        let ring = Ring::new(
            Shared::anonymous(page)?,
            Shared::anonymous(page)?,
            vector.is_some(),
        );
        // A hole between any two of the four pages, so that no page is reached through its
        // neighbour.
        let driver_iova = RING_IOVA + u64::from(index) * 4 * page as u64;
        let device_iova = driver_iova + 2 * page as u64;
        let driver_mapping = container.map(ring.driver_area(), driver_iova, Access::Read)?;
        let device_mapping = container.map(ring.device_area(), device_iova, Access::ReadWrite)?;
        self.common.set_u16(common::QUEUE_SELECT, index);
        let size = self.common.u16(common::QUEUE_SIZE);
        ensure!(size >= ring::SIZE, "queue {index} has a size of {size}");
        self.common.set_u16(common::QUEUE_SIZE, ring::SIZE);
        let vector = vector.unwrap_or(NO_VECTOR);
        self.common.set_u16(common::QUEUE_MSIX_VECTOR, vector);
        ensure!(
            self.common.u16(common::QUEUE_MSIX_VECTOR) == vector,
            "queue {index} does not take the vector {vector}"
        );
        self.common.set_u64(common::QUEUE_DESC, driver_iova);
        self.common
            .set_u64(common::QUEUE_DRIVER, driver_iova + ring::AVAIL as u64);
        self.common.set_u64(common::QUEUE_DEVICE, device_iova);
        let offset = usize::from(self.common.u16(common::QUEUE_NOTIFY_OFF));
        self.common.set_u16(common::QUEUE_ENABLE, 1);
        Ok(Queue {
            _driver_mapping: driver_mapping,
            device_mapping: Some(device_mapping),
            ring,
            index,
            doorbell: offset * self.notify.structure.notify_multiplier,
            device_iova,
        })
    }
}

/// The queues of a running function. The function is reset when they are dropped, before their
/// memory is unmapped.
pub struct Queues<'a> {
    function: &'a Function,
    /// The receive queue.
    pub receive: Queue,
    /// The transmit queue.
    pub transmit: Queue,
}

impl Queues<'_> {
    /// Notifies the function of available buffers in the receive queue.
    pub fn kick_receive(&self) {
        self.kick(&self.receive);
    }

    /// Notifies the function of available buffers in the transmit queue.
    pub fn kick_transmit(&self) {
        self.kick(&self.transmit);
    }

    fn kick(&self, queue: &Queue) {
        self.function.notify.set_u16(queue.doorbell, queue.index);
    }
}

impl Drop for Queues<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.function.reset() {
            eprintln!("isolation: {error:#}");
        }
    }
}

/// A ring that the function uses.
pub struct Queue {
    _driver_mapping: Mapping,
    device_mapping: Option<Mapping>,
    pub ring: Ring,
    index: u16,
    doorbell: usize,
    /// IOVA of the used ring.
    pub device_iova: u64,
}

impl Queue {
    /// Unmaps the used ring.
    pub fn unmap_used_ring(&mut self) -> Result<()> {
        self.device_mapping.take().map_or(Ok(()), Mapping::unmap)
    }

    /// Maps the used ring again, at its old address.
    pub fn map_used_ring(&mut self, container: &Container) -> Result<()> {
        let area = self.ring.device_area();
        self.device_mapping = Some(container.map(area, self.device_iova, Access::ReadWrite)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A configuration space whose list holds MSI-X and two virtio structures.
    fn space() -> [u8; 256] {
        let mut space = [0; 256];
        space[6] = 0x10;
        space[0x34] = 0x40;
        space[0x40..0x42].copy_from_slice(&[0x11, 0x50]);
        let common = [9, 0x60, 16, 1, 2, 0, 0, 0, 0, 0x10, 0, 0, 0x38, 0, 0, 0];
        space[0x50..0x60].copy_from_slice(&common);
        let notify = [
            9, 0, 20, 2, 4, 0, 0, 0, 0, 0x30, 0, 0, 0, 0x10, 0, 0, 4, 0, 0, 0,
        ];
        space[0x60..0x74].copy_from_slice(&notify);
        space
    }

    #[test]
    fn structures_are_found_by_their_type() {
        let common = find_structure(&space(), COMMON_CFG).unwrap();
        assert_eq!((common.bar, common.offset), (2, 0x1000));
        let notify = find_structure(&space(), NOTIFY_CFG).unwrap();
        assert_eq!((notify.bar, notify.offset), (4, 0x3000));
        assert_eq!(notify.notify_multiplier, 4);
    }

    #[test]
    fn a_missing_structure_or_a_loop_of_capabilities_is_an_error() {
        assert!(find_structure(&space(), DEVICE_CFG).is_err());
        let mut space = space();
        space[0x61] = 0x50;
        assert!(find_structure(&space, DEVICE_CFG).is_err());
        space[0x61] = 0xfc;
        space[0xfc] = 9;
        space[0xff] = NOTIFY_CFG;
        assert!(find_structure(&space, DEVICE_CFG).is_err());
    }
}
