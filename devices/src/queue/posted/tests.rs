use std::sync::Arc;

use iommu::{Gpa, IommuRegion, Perm, Request};
use proptest::prelude::*;

use super::*;
use crate::testing::{INDIRECT, NEXT, TranslateBy, WRITE};

/// An answer of an IOMMU that maps every address one to one.
fn identity(_request: &Request) -> Result<Mapping, Fault> {
    Ok(Mapping {
        iova: IovaRange::ALL,
        gpa: Gpa(0),
        perm: Perm::READ_WRITE,
    })
}

const LAYOUT: Layout = Layout {
    size: 8,
    desc: Iova(0x1000),
    avail: Iova(0x2000),
    used: Iova(0x3000),
};

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap()
}

fn walk(ram: &GuestRam, layout: &Layout) -> Result<Vec<Buffer>, RingReadError> {
    let region = IommuRegion::new(Arc::new(TranslateBy(identity)), StreamId(1));
    let inside = region.enter();
    posted(&Memory::new(&inside, ram), layout, &Steps::new(usize::MAX))
}

fn descriptor(ram: &GuestRam, at: u64, (address, len, flags, next): (u64, u32, u16, u16)) {
    ram.write_obj(address, GuestAddress(at)).unwrap();
    ram.write_obj(len, GuestAddress(at + 8)).unwrap();
    ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
    ram.write_obj(next, GuestAddress(at + 14)).unwrap();
}

fn available(ram: &GuestRam, from: u16, heads: &[u16]) {
    let count = u16::try_from(heads.len()).unwrap();
    ram.write_obj(from, GuestAddress(0x3002)).unwrap();
    ram.write_obj(from.wrapping_add(count), GuestAddress(0x2002))
        .unwrap();
    for (n, head) in (0_u16..).zip(heads) {
        let slot = from.wrapping_add(n) % LAYOUT.size;
        ram.write_obj(*head, GuestAddress(0x2004 + 2 * u64::from(slot)))
            .unwrap();
    }
}

fn buffer(first: u64, len: u64, access: Access) -> Buffer {
    let iova = IovaRange::from_len(Iova(first), len).unwrap();
    Buffer { iova, access }
}

#[test]
fn chains_are_followed_in_the_order_they_were_posted() {
    let ram = ram();
    descriptor(&ram, 0x1000, (0x5000, 64, NEXT, 3));
    descriptor(&ram, 0x1030, (0x6000, 1500, WRITE, 0));
    descriptor(&ram, 0x1010, (0x7000, 10, 0, 0));
    available(&ram, 0xffff, &[1, 0]);
    assert_eq!(
        walk(&ram, &LAYOUT).unwrap(),
        [
            buffer(0x7000, 10, Access::Read),
            buffer(0x5000, 64, Access::Read),
            buffer(0x6000, 1500, Access::Write),
        ]
    );
}

#[test]
fn indirect_table_and_its_buffers_are_found() {
    let ram = ram();
    descriptor(&ram, 0x1000, (0x8000, 32, INDIRECT, 0));
    descriptor(&ram, 0x8000, (0x5000, 64, NEXT, 1));
    descriptor(&ram, 0x8010, (0x6000, 64, WRITE, 0));
    available(&ram, 0, &[0]);
    assert_eq!(
        walk(&ram, &LAYOUT).unwrap(),
        [
            buffer(0x8000, 32, Access::Read),
            buffer(0x5000, 64, Access::Read),
            buffer(0x6000, 64, Access::Write),
        ]
    );
}

#[test]
fn broken_rules_are_reported() {
    type Case = (&'static str, &'static [(u64, (u64, u32, u16, u16))]);
    let cases: [Case; 6] = [
        ("no end", &[(0x1000, (0, 1, NEXT, 0))]),
        ("outside its table", &[(0x1000, (0, 1, NEXT, 8))]),
        (
            "reads after it writes",
            &[(0x1000, (0, 1, NEXT | WRITE, 1)), (0x1010, (0, 1, 0, 0))],
        ),
        ("odd length", &[(0x1000, (0x8000, 17, INDIRECT, 0))]),
        ("odd length", &[(0x1000, (0x8000, 0, INDIRECT, 0))]),
        (
            "refers to another",
            &[
                (0x1000, (0x8000, 16, INDIRECT, 0)),
                (0x8000, (0x8000, 16, INDIRECT, 0)),
            ],
        ),
    ];
    for (expected, descriptors) in cases {
        let ram = ram();
        for &(at, fields) in descriptors {
            descriptor(&ram, at, fields);
        }
        available(&ram, 0, &[0]);
        match walk(&ram, &LAYOUT) {
            Err(RingReadError::Malformed(reason)) => {
                assert!(reason.contains(expected), "{reason:?} for {expected:?}");
            }
            other => panic!("{expected}: {other:?}"),
        }
    }
    let ram = ram();
    ram.write_obj(9_u16, GuestAddress(0x2002)).unwrap();
    assert!(matches!(
        walk(&ram, &LAYOUT),
        Err(RingReadError::Malformed(_))
    ));
}

#[test]
fn rings_outside_of_memory_are_a_fault() {
    let layout = Layout {
        avail: Iova(0xffff_ffff_ffff_fffe),
        ..LAYOUT
    };
    assert!(matches!(
        walk(&ram(), &layout),
        Err(RingReadError::Fault(_))
    ));
}

proptest! {
    /// A walk of random rings is bounded and returns buffers or an error.
    #[test]
    fn rings_of_any_bytes_have_a_bounded_walk(
        bytes in prop::collection::vec(any::<u8>(), 0x200),
        huge in any::<bool>(),
    ) {
        let ram = ram();
        for at in [0x1000, 0x2000, 0x3000, 0x8000] {
            ram.write_slice(&bytes, GuestAddress(at)).unwrap();
        }
        ram.write_obj(0_u16, GuestAddress(0x3002)).unwrap();
        ram.write_obj(8_u16, GuestAddress(0x2002)).unwrap();
        if huge {
            // A table of the largest size, in which zero bytes form an endless
            // chain.
            descriptor(&ram, 0x1000, (0x9000, 0xffff_fff0, INDIRECT, 0));
            descriptor(&ram, 0x9000, (0, 0, NEXT, 1));
            descriptor(&ram, 0x9010, (0, 0, NEXT, 0));
            available(&ram, 0, &[0]);
        }
        if let Ok(buffers) = walk(&ram, &LAYOUT) {
            prop_assert!(buffers.len() <= MAX_STEPS + usize::from(LAYOUT.size));
        }
    }
}
