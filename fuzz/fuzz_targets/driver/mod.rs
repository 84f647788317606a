//! The driver side of a queue.
#![allow(dead_code, reason = "not every target needs all of it")]

use std::sync::Arc;

use iommu::{AddressSpace, GuestRam, StreamId};
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{ByteValued, Bytes as _, GuestAddress};

pub const RAM: u64 = 0x2_0000;
/// Addresses of the rings of a queue of `SIZE` entries.
pub const TABLE: u64 = 0x1000;
pub const AVAIL: u64 = 0x2000;
pub const USED: u64 = 0x3000;
pub const SIZE: u16 = 16;

pub fn ram() -> Arc<GuestRam> {
    let size = usize::try_from(RAM).expect("it is small");
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), size)]).expect("memory"))
}

pub fn space(ram: &Arc<GuestRam>) -> AddressSpace {
    AddressSpace::identity(StreamId(8), Arc::clone(ram))
}

pub fn write<T: ByteValued>(ram: &GuestRam, at: u64, value: T) {
    ram.write_obj(value, GuestAddress(at))
        .expect("it is inside");
}

pub fn read<T: ByteValued>(ram: &GuestRam, at: u64) -> T {
    ram.read_obj(GuestAddress(at)).expect("it is inside")
}

/// Writes bytes at an address, as far as they are in RAM.
pub fn scribble(ram: &GuestRam, at: u64, bytes: &[u8]) {
    let _ = ram.write(bytes, GuestAddress(at % RAM));
}

/// Clears the rings and adds one chain of (address, length, device-writable).
pub fn post(ram: &GuestRam, buffers: &[(u64, u32, bool)]) {
    write(ram, USED, [0_u32; 2]);
    for (slot, &(at, len, writable)) in (0_u16..).zip(buffers) {
        let entry = TABLE + u64::from(slot) * 16;
        let more = usize::from(slot) + 1 < buffers.len();
        write(ram, entry, at);
        write(ram, entry + 8, len);
        write(
            ram,
            entry + 12,
            u16::from(more) | (u16::from(writable) << 1),
        );
        write(ram, entry + 14, slot + 1);
    }
    write(ram, AVAIL, [0_u16, 1, 0]);
}

pub fn queue(event_idx: bool) -> Queue {
    let mut queue = Queue::new(SIZE).expect("a size");
    queue.set_desc_table_address(Some(TABLE as u32), None);
    queue.set_avail_ring_address(Some(AVAIL as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_event_idx(event_idx);
    queue.set_ready(true);
    queue
}
