//! The driver's side of a split virtqueue (virtio 1.2 §2.7).
//!
//! The driver area and the device area are on separate pages, so that they can be mapped with
//! different permissions.

use anyhow::{Context, Result};

use crate::memory::Shared;

/// Number of descriptors of every queue here.
pub const SIZE: u16 = 64;

/// Offset of the avail ring in the driver area, after the descriptor table.
pub const AVAIL: usize = 16 * SIZE as usize;

const DESC_F_WRITE: u16 = 2;
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// A buffer of one descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Address for the device.
    pub iova: u64,
    /// Length in bytes.
    pub len: u32,
    /// Whether the buffer is device-writable; otherwise it is device-readable.
    pub device_writes: bool,
}

/// A split ring whose descriptors are used in turn, each for one buffer.
pub struct Ring {
    driver_area: Shared,
    device_area: Shared,
    /// The last buffer of each descriptor.
    offered: Vec<Option<Buffer>>,
    next_avail: u16,
    next_used: u16,
}

impl Ring {
    /// Creates an empty ring, in memory of a page for each area.
    pub fn new(driver_area: Shared, device_area: Shared, interrupts: bool) -> Self {
        driver_area.fill(0);
        device_area.fill(0);
        let flags = if interrupts { 0 } else { AVAIL_F_NO_INTERRUPT };
        driver_area.set_u16(AVAIL, flags);
        Self {
            driver_area,
            device_area,
            offered: vec![None; SIZE.into()],
            next_avail: 0,
            next_used: 0,
        }
    }

    /// Descriptor table and avail ring, which the device reads.
    pub fn driver_area(&self) -> &Shared {
        &self.driver_area
    }

    /// Used ring, which the device writes.
    pub fn device_area(&self) -> &Shared {
        &self.device_area
    }

    /// Makes `buffer` available. If the device has not used the buffer of [`SIZE`] calls ago, that
    /// one is lost.
    pub fn offer(&mut self, buffer: Buffer) {
        let index = self.next_avail % SIZE;
        self.offered[usize::from(index)] = Some(buffer);
        let descriptor = 16 * usize::from(index);
        let flags = if buffer.device_writes {
            DESC_F_WRITE
        } else {
            0
        };
        self.driver_area.set_u64(descriptor, buffer.iova);
        self.driver_area.set_u32(descriptor + 8, buffer.len);
        self.driver_area.set_u16(descriptor + 12, flags);
        self.driver_area.set_u16(descriptor + 14, 0);
        let entry = AVAIL + 4 + 2 * usize::from(index);
        self.driver_area.set_u16(entry, index);
        self.next_avail = self.next_avail.wrapping_add(1);
        self.driver_area.set_u16(AVAIL + 2, self.next_avail);
    }

    /// Number of buffers that the device has used since the ring was created, modulo 2^16.
    pub fn used_index(&self) -> u16 {
        self.device_area.u16(2)
    }

    /// Consumes the next used buffer; returns it with the number of bytes that the device reports
    /// as written. An error if the descriptor is not available.
    pub fn take_used(&mut self) -> Result<Option<(Buffer, u32)>> {
        if self.used_index() == self.next_used {
            return Ok(None);
        }
        let entry = 4 + 8 * usize::from(self.next_used % SIZE);
        self.next_used = self.next_used.wrapping_add(1);
        let descriptor = self.device_area.u32(entry);
        let len = self.device_area.u32(entry + 4);
        let buffer = self
            .offered
            .get_mut(usize::try_from(descriptor)?)
            .and_then(Option::take)
            .with_context(|| format!("descriptor {descriptor} is used but was not offered"))?;
        Ok(Some((buffer, len)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::page_size;

    fn ring() -> Ring {
        let page = || Shared::anonymous(page_size()).unwrap();
        Ring::new(page(), page(), false)
    }

    fn receive(iova: u64) -> Buffer {
        Buffer {
            iova,
            len: 2048,
            device_writes: true,
        }
    }

    #[test]
    fn an_offered_buffer_is_laid_out_as_the_specification_says() {
        let mut ring = ring();
        ring.offer(receive(0x1_2345_6000));
        ring.offer(Buffer {
            device_writes: false,
            ..receive(0x1000)
        });
        let area = ring.driver_area();
        // le64 addr, le32 len, le16 flags, le16 next
        let expected = [0, 0x60, 0x45, 0x23, 1, 0, 0, 0, 0, 8, 0, 0, 2, 0, 0, 0];
        assert_eq!(area.read(0, 16), expected);
        assert_eq!(area.u16(16 + 12), 0, "the second is for reading");
        // le16 flags, le16 idx, le16 ring[]
        assert_eq!(area.read(AVAIL, 8), [1, 0, 2, 0, 0, 0, 1, 0]);
    }

    /// Uses `descriptor` as the `turn`th buffer, as a device does.
    fn use_buffer(ring: &Ring, turn: u16, descriptor: u32, len: u32) {
        let entry = 4 + 8 * usize::from(turn % SIZE);
        ring.device_area().set_u32(entry, descriptor);
        ring.device_area().set_u32(entry + 4, len);
        ring.device_area().set_u16(2, turn.wrapping_add(1));
    }

    #[test]
    fn used_buffers_come_back_once_and_in_order() {
        let mut ring = ring();
        ring.offer(receive(0x1000));
        ring.offer(receive(0x2000));
        assert_eq!(ring.take_used().unwrap(), None);
        use_buffer(&ring, 0, 1, 60);
        use_buffer(&ring, 1, 0, 42);
        assert_eq!(ring.take_used().unwrap(), Some((receive(0x2000), 60)));
        assert_eq!(ring.take_used().unwrap(), Some((receive(0x1000), 42)));
        assert_eq!(ring.take_used().unwrap(), None);
    }

    #[test]
    fn a_descriptor_that_was_not_offered_is_an_error() {
        let mut ring = ring();
        ring.offer(receive(0x1000));
        use_buffer(&ring, 0, 0, 1);
        use_buffer(&ring, 1, 0, 1);
        use_buffer(&ring, 2, 64, 1);
        assert!(ring.take_used().is_ok());
        assert!(ring.take_used().is_err(), "used twice");
        assert!(ring.take_used().is_err(), "no such descriptor");
    }

    #[test]
    fn indices_wrap_while_slots_go_round() {
        let mut ring = ring();
        for turn in 0..=u16::MAX {
            ring.offer(receive(turn.into()));
            use_buffer(&ring, turn, u32::from(turn % SIZE), 1);
            let (buffer, _) = ring.take_used().unwrap().unwrap();
            assert_eq!(buffer.iova, u64::from(turn));
        }
        ring.offer(receive(7));
        assert_eq!(ring.take_used().unwrap(), None);
        assert_eq!(ring.driver_area().u16(AVAIL + 2), 1);
    }
}
