//! The common configuration (virtio 1.2 §4.1.4.3).

use std::mem::offset_of;

use virtio_bindings::virtio_config::VIRTIO_F_RING_RESET;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use super::queues::{NO_VECTOR, QueueSetup};

// Bits of `device_status` (§2.1).
pub(super) const DRIVER_OK: u8 = 4;
pub(super) const FEATURES_OK: u8 = 8;
pub(super) const NEEDS_RESET: u8 = 64;

/// `struct virtio_pci_common_cfg`.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct CommonCfg {
    device_feature_select: U32,
    device_feature: U32,
    driver_feature_select: U32,
    driver_feature: U32,
    config_msix_vector: U16,
    num_queues: U16,
    device_status: u8,
    config_generation: u8,
    queue_select: U16,
    queue_size: U16,
    queue_msix_vector: U16,
    queue_enable: U16,
    queue_notify_off: U16,
    queue_desc: U64,
    queue_driver: U64,
    queue_device: U64,
    queue_notify_data: U16,
    queue_reset: U16,
}

const DEVICE_FEATURE_SELECT: usize = offset_of!(CommonCfg, device_feature_select);
const DRIVER_FEATURE_SELECT: usize = offset_of!(CommonCfg, driver_feature_select);
const DRIVER_FEATURE: usize = offset_of!(CommonCfg, driver_feature);
const CONFIG_VECTOR: usize = offset_of!(CommonCfg, config_msix_vector);
const DEVICE_STATUS: usize = offset_of!(CommonCfg, device_status);
const QUEUE_SELECT: usize = offset_of!(CommonCfg, queue_select);
const QUEUE_SIZE: usize = offset_of!(CommonCfg, queue_size);
const QUEUE_VECTOR: usize = offset_of!(CommonCfg, queue_msix_vector);
const QUEUE_ENABLE: usize = offset_of!(CommonCfg, queue_enable);
const QUEUE_RESET: usize = offset_of!(CommonCfg, queue_reset);
/// Offsets of the addresses of a queue's rings, ordered as
/// [`QueueSetup::rings`].
const RINGS: [usize; 3] = [
    offset_of!(CommonCfg, queue_desc),
    offset_of!(CommonCfg, queue_driver),
    offset_of!(CommonCfg, queue_device),
];

/// The registers that do not belong to a queue.
#[derive(Default)]
pub(super) struct Registers {
    device_select: u32,
    driver_select: u32,
    pub(super) driver_features: u64,
    pub(super) config_vector: u16,
    pub(super) status: u8,
    pub(super) generation: u8,
    pub(super) queue_select: u16,
}

/// A write with effects beyond [`Registers`]. Writes of a queue are for the
/// selected one.
pub(super) enum Write {
    Status(u8),
    ConfigVector(u16),
    QueueSize(u16),
    QueueVector(u16),
    QueueEnable,
    QueueReset,
    /// Writes the bits in `mask` of the address of ring `ring`.
    QueueRing {
        ring: usize,
        value: u64,
        mask: u64,
    },
}

impl Registers {
    /// The registers after a reset, which keeps the generation.
    pub(super) fn new(generation: u8) -> Self {
        Self {
            config_vector: NO_VECTOR,
            generation,
            ..Self::default()
        }
    }

    /// Marks the device configuration as changed.
    pub(super) fn next_generation(&mut self) {
        self.generation = self.generation.wrapping_add(1);
    }

    /// Whether the driver negotiated `VIRTIO_F_RING_RESET`.
    pub(super) fn ring_reset(&self) -> bool {
        self.driver_features >> VIRTIO_F_RING_RESET & 1 == 1
    }

    /// The structure as the driver reads it. `read_image` reads parts of fields
    /// from it.
    pub(super) fn read(&self, offered: u64, queues: &[QueueSetup]) -> CommonCfg {
        let word = |select: u32, features: u64| {
            let shifted = features.checked_shr(select.saturating_mul(32));
            U32::new(u32::try_from(shifted.unwrap_or(0) & 0xffff_ffff).unwrap_or(0))
        };
        let queue = queues.get(usize::from(self.queue_select));
        let [desc, driver, device] = queue.map_or([0; 3], |queue| queue.rings);
        CommonCfg {
            device_feature_select: self.device_select.into(),
            device_feature: word(self.device_select, offered),
            driver_feature_select: self.driver_select.into(),
            driver_feature: word(self.driver_select, self.driver_features),
            config_msix_vector: self.config_vector.into(),
            num_queues: u16::try_from(queues.len()).unwrap_or(u16::MAX).into(),
            device_status: self.status,
            config_generation: self.generation,
            queue_select: self.queue_select.into(),
            queue_size: queue.map_or(0, |queue| queue.size).into(),
            queue_msix_vector: queue.map_or(NO_VECTOR, |queue| queue.vector).into(),
            queue_enable: queue.map_or(0, |queue| queue.enabled.into()).into(),
            queue_notify_off: queue.map_or(0, |_| self.queue_select).into(),
            queue_desc: desc.into(),
            queue_driver: driver.into(),
            queue_device: device.into(),
            queue_notify_data: 0.into(),
            queue_reset: 0.into(),
        }
    }

    /// Writes a whole field, or half of a 64-bit field (§4.1.3.1). Other writes
    /// are ignored.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> Option<Write> {
        let offset = usize::try_from(offset).ok()?;
        if let &[value] = data {
            return (offset == DEVICE_STATUS).then_some(Write::Status(value));
        }
        if let Ok(bytes) = data.try_into() {
            let value = u16::from_le_bytes(bytes);
            return match offset {
                CONFIG_VECTOR => Some(Write::ConfigVector(value)),
                QUEUE_SELECT => {
                    self.queue_select = value;
                    None
                }
                QUEUE_SIZE => Some(Write::QueueSize(value)),
                QUEUE_VECTOR => Some(Write::QueueVector(value)),
                QUEUE_ENABLE => (value == 1).then_some(Write::QueueEnable),
                QUEUE_RESET => (value == 1).then_some(Write::QueueReset),
                _ => None,
            };
        }
        let ring = RINGS.iter().position(|&ring| ring == offset & !7);
        let whole = data.try_into().map(u64::from_le_bytes);
        if let (Some(ring), Ok(value), 0) = (ring, whole, offset % 8) {
            let mask = u64::MAX;
            return Some(Write::QueueRing { ring, value, mask });
        }
        let value = u32::from_le_bytes(data.try_into().ok()?);
        match (offset, ring) {
            (DEVICE_FEATURE_SELECT, _) => self.device_select = value,
            (DRIVER_FEATURE_SELECT, _) => self.driver_select = value,
            (DRIVER_FEATURE, _) => self.write_features(value),
            (_, Some(ring)) if offset.is_multiple_of(4) => {
                let shift = 8 * (offset % 8);
                let (value, mask) = (u64::from(value) << shift, 0xffff_ffff << shift);
                return Some(Write::QueueRing { ring, value, mask });
            }
            _ => {}
        }
        None
    }

    fn write_features(&mut self, word: u32) {
        if self.status & FEATURES_OK != 0 || self.driver_select > 1 {
            return;
        }
        let shift = 32 * self.driver_select;
        let kept = self.driver_features & !(0xffff_ffff << shift);
        self.driver_features = kept | u64::from(word) << shift;
    }
}
