use std::sync::Arc;

use iommu::{AddressSpace, GuestRam};
use proptest::prelude::*;
use virtio_queue::QueueT as _;
use vm_memory::Bytes as _;

use super::*;
use crate::testing::{INDIRECT, NEXT, RAM, REQUESTER, Ring, WRITE, ram};

const BASE: u64 = 0x1000;
const TABLE: u64 = 0x8000;
const SIZE: u16 = 8;
/// Upper bound on descriptors of a chain: more than the ring's table and the
/// indirect tables of these tests have.
const LONGEST: u16 = 16;

fn ring() -> Ring {
    Ring::new(&ram(), BASE, SIZE)
}

fn take_from(queue: &mut Queue, ram: &Arc<GuestRam>) -> Result<Option<Chain>, QueueError> {
    let dma = AddressSpace::identity(REQUESTER, Arc::clone(ram)).dma();
    Chain::take(queue, &dma.view(), LONGEST)
}

fn take(ring: &Ring) -> Result<Option<Chain>, QueueError> {
    take_from(&mut ring.queue(), &ring.ram)
}

fn refusal(ring: &Ring) -> &'static str {
    take(ring).expect_err("the chain must be refused").0
}

fn buffer(at: u64, len: u32) -> Buffer {
    let at = GuestAddress(at);
    Buffer { at, len }
}

#[test]
fn buffers_come_in_the_order_of_the_chain() {
    let ring = ring();
    assert_eq!(take(&ring), Ok(None));
    ring.post(&[
        (0x100, 16, false),
        (0x200, 0, false),
        (0x300, 7, true),
        (0x400, 1, true),
    ]);
    let chain = take(&ring).unwrap().unwrap();
    assert_eq!(chain.head, 0);
    assert_eq!(chain.readable, [buffer(0x100, 16), buffer(0x200, 0)]);
    assert_eq!(chain.writable, [buffer(0x300, 7), buffer(0x400, 1)]);
}

#[test]
fn indirect_table_is_followed() {
    let ring = ring();
    ring.describe(TABLE, 0, (0x100, 16), NEXT, 2);
    ring.describe(TABLE, 2, (0x300, 8), WRITE, 0);
    ring.describe(BASE, 3, (TABLE, 48), INDIRECT, 0);
    ring.make_available(3);
    let chain = take(&ring).unwrap().unwrap();
    assert_eq!(chain.head, 3);
    assert_eq!(chain.readable, [buffer(0x100, 16)]);
    assert_eq!(chain.writable, [buffer(0x300, 8)]);
}

#[test]
fn loop_of_descriptors_is_refused() {
    let ring = ring();
    ring.describe(BASE, 0, (0x100, 16), NEXT, 1);
    ring.describe(BASE, 1, (0x200, 16), NEXT, 0);
    ring.make_available(0);
    assert!(refusal(&ring).contains("no end"));
}

#[test]
fn loop_in_an_indirect_table_is_refused() {
    let ring = ring();
    ring.describe(TABLE, 0, (0x100, 0), NEXT, 0);
    ring.describe(BASE, 0, (TABLE, 16), INDIRECT, 0);
    ring.make_available(0);
    assert!(refusal(&ring).contains("no end"));
}

#[test]
fn indirect_inside_indirect_is_refused() {
    let ring = ring();
    ring.describe(TABLE, 0, (0x100, 16), NEXT, 1);
    ring.describe(TABLE, 1, (TABLE, 32), INDIRECT, 0);
    ring.describe(BASE, 0, (TABLE, 32), INDIRECT, 0);
    ring.make_available(0);
    assert!(refusal(&ring).contains("no end"));
}

#[test]
fn descriptor_beyond_its_table_is_refused() {
    let ring = ring();
    ring.describe(BASE, 0, (0x100, 16), NEXT, SIZE);
    ring.make_available(0);
    assert!(refusal(&ring).contains("leaves its table"));
}

#[test]
fn head_beyond_the_table_is_refused() {
    let ring = ring();
    ring.make_available(SIZE);
    assert!(refusal(&ring).contains("leaves its table"));
}

#[test]
fn indirect_table_of_odd_length_is_refused() {
    let ring = ring();
    for len in [0, 17] {
        ring.describe(BASE, 0, (TABLE, len), INDIRECT, 0);
        ring.write(ring.avail() + 2, 0_u16);
        ring.make_available(0);
        assert!(take(&ring).is_err(), "{len}");
    }
}

#[test]
fn indirect_table_outside_memory_is_refused() {
    let ring = ring();
    for at in [RAM, u64::MAX - 15, u64::MAX] {
        ring.describe(BASE, 0, (at, 16), INDIRECT, 0);
        ring.write(ring.avail() + 2, 0_u16);
        ring.make_available(0);
        assert!(take(&ring).is_err(), "{at:#x}");
    }
}

#[test]
fn readable_buffer_after_a_writable_one_is_refused() {
    let ring = ring();
    ring.post(&[(0x100, 16, true), (0x200, 16, false)]);
    assert!(refusal(&ring).contains("behind one to write"));
}

#[test]
fn chain_of_4_gib_is_refused() {
    let ring = ring();
    ring.post(&[(0, u32::MAX, false), (0, 1, true)]);
    assert!(refusal(&ring).contains("no end"));
}

#[test]
fn chain_longer_than_the_bound_is_refused_before_it_is_read_to_its_end() {
    let ring = ring();
    // The table is longer than a ring can be, and mostly outside memory.
    let entries = u32::from(u16::MAX) - 5;
    ring.describe(BASE, 0, (TABLE, entries * 16), INDIRECT, 0);
    for (slot, last) in [(LONGEST, true), (LONGEST + 1, false)] {
        for slot in 0..slot {
            ring.describe(TABLE, slot, (0x100, 1), NEXT, slot + 1);
        }
        ring.describe(TABLE, slot - 1, (0x100, 1), 0, 0);
        ring.write(ring.avail() + 2, 0_u16);
        ring.make_available(0);
        match take(&ring) {
            Ok(chain) => {
                assert!(last);
                assert_eq!(chain.unwrap().readable.len(), usize::from(LONGEST));
            }
            Err(QueueError(reason)) => {
                assert!(!last && reason.contains("more descriptors"), "{reason}");
            }
        }
    }
}

#[test]
fn more_chains_than_the_ring_holds_are_refused() {
    let ring = ring();
    ring.write(ring.avail() + 2, SIZE + 1);
    assert!(refusal(&ring).contains("room for"));
}

#[test]
fn rings_outside_memory_are_refused() {
    let there = ring();
    there.post(&[(0x100, 16, false)]);
    let set: [fn(&mut Queue, u32); 2] = [
        |queue, high| queue.set_desc_table_address(None, Some(high)),
        |queue, high| queue.set_avail_ring_address(None, Some(high)),
    ];
    for set in set {
        for high in [1, u32::MAX] {
            let mut queue = there.queue();
            set(&mut queue, high);
            assert!(take_from(&mut queue, &there.ram).is_err(), "{high:#x}");
        }
    }
    let mut last = there.queue();
    last.set_avail_ring_address(Some(0xffff_fffe), Some(u32::MAX));
    assert!(take_from(&mut last, &there.ram).is_err());
}

/// A descriptor of the model: the fields that decide the length of a chain.
#[derive(Clone, Debug)]
struct Shape {
    len: u32,
    flags: u16,
    next: u16,
}

fn shape(slots: u16) -> impl Strategy<Value = Shape> {
    let len = prop_oneof![
        Just(0_u32),
        1..100_u32,
        (1..=6_u32).prop_map(|n| n * 16),
        Just(u32::MAX)
    ];
    (len, 0..8_u16, 0..=slots).prop_map(|(len, flags, next)| Shape { len, flags, next })
}

/// State of the model's walk.
#[derive(Clone, Copy, Default)]
struct Walk {
    buffers: usize,
    bytes: u32,
    written: bool,
}

/// Number of buffers of the chain that starts at `head`; `None` when it is
/// invalid. Direct descriptors may be followed by one that refers to the table
/// `inner`.
fn model(table: &[Shape], head: u16, mut walk: Walk, inner: Option<&[Shape]>) -> Option<usize> {
    let mut at = usize::from(head);
    for _ in 0..table.len() {
        let this = table.get(at)?;
        if this.flags & INDIRECT != 0 {
            let entries = usize::try_from(this.len).ok()? / 16;
            let inner = inner.filter(|_| this.len.is_multiple_of(16))?;
            return model(inner.get(..entries)?, 0, walk, None);
        }
        walk.buffers += 1;
        walk.bytes = walk.bytes.checked_add(this.len)?;
        if this.flags & WRITE == 0 && walk.written {
            return None;
        }
        walk.written |= this.flags & WRITE != 0;
        if this.flags & NEXT == 0 {
            return Some(walk.buffers);
        }
        at = usize::from(this.next);
    }
    None
}

/// Entries of the indirect table: the maximum in `Shape`.
const INNER: u16 = 6;

proptest! {
    #[test]
    fn chains_are_those_of_the_specification(
        outer in proptest::collection::vec(shape(SIZE), usize::from(SIZE)),
        inner in proptest::collection::vec(shape(INNER), usize::from(INNER)),
        head in 0..=SIZE,
    ) {
        let ring = ring();
        for (slot, d) in (0..).zip(&outer) {
            let at = if d.flags & INDIRECT == 0 { 0x100 } else { TABLE };
            ring.describe(BASE, slot, (at, d.len), d.flags, d.next);
        }
        for (slot, d) in (0..).zip(&inner) {
            ring.describe(TABLE, slot, (0x100, d.len), d.flags, d.next);
        }
        ring.make_available(head);
        let taken = take(&ring).map(|chain| chain.map(|c| c.readable.len() + c.writable.len()));
        match model(&outer, head, Walk::default(), Some(&inner)) {
            Some(buffers) => prop_assert_eq!(taken, Ok(Some(buffers))),
            None => prop_assert!(taken.is_err()),
        }
    }

    #[test]
    fn rings_of_noise_end_in_a_chain_or_a_refusal(
        noise in proptest::collection::vec(any::<u8>(), 0x100),
        avail in proptest::collection::vec(any::<u8>(), 24),
    ) {
        let ring = ring();
        ring.ram.write_slice(&noise, GuestAddress(BASE)).unwrap();
        ring.ram.write_slice(&avail, GuestAddress(ring.avail())).unwrap();
        if let Ok(Some(chain)) = take(&ring) {
            prop_assert!(chain.readable.len() + chain.writable.len() <= usize::from(u16::MAX));
        }
    }
}
