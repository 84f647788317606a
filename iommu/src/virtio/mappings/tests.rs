use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::{Gpa, Perm};

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first), Iova(last)).unwrap()
}

fn mapping(first: u64, last: u64) -> Mapping {
    Mapping {
        iova: range(first, last),
        gpa: Gpa(first + 1000),
        perm: Perm::READ,
    }
}

/// Removes mappings and frees their chunks.
fn remove<const CHUNK: usize>(
    mappings: &mut Mappings<CHUNK>,
    range: IovaRange,
) -> Result<usize, Status> {
    let mut removed = Removed::default();
    let outcome = mappings.remove(range, &mut removed);
    assert!(removed.len() <= outcome.unwrap_or(0));
    while removed.len() != 0 {
        let before = removed.len();
        removed.free(1);
        assert!(removed.len() < before, "an empty chunk");
    }
    outcome
}

#[test]
fn removed_chunks_are_freed_in_pieces() {
    let mut mappings = Mappings::<8>::default();
    for at in 0..80 {
        mappings.insert(mapping(at, at)).unwrap();
    }
    let mut removed = Removed::default();
    assert_eq!(mappings.remove(range(4, 75), &mut removed), Ok(72));
    assert_eq!((mappings.len(), removed.len()), (8, 64), "8 whole chunks");
    removed.free(3);
    assert_eq!(removed.len(), 40);
    mappings.discard(&mut removed);
    assert_eq!(removed.len(), 48);
    removed.free(usize::MAX);
    assert_eq!(removed.len(), 0);
}

#[test]
fn unmap_that_splits_a_mapping_is_refused() {
    let mut mappings = Mappings::<8>::default();
    mappings.insert(mapping(10, 19)).unwrap();
    mappings.insert(mapping(20, 29)).unwrap();
    for part in [range(10, 18), range(11, 19), range(15, 29), range(0, 25)] {
        assert_eq!(remove(&mut mappings, part), Err(Status::Range), "{part}");
    }
    assert_eq!(mappings.len(), 2);
    assert_eq!(remove(&mut mappings, range(0, 50)), Ok(2));
}

#[test]
fn last_byte_of_the_address_space_can_be_mapped() {
    let mut mappings = Mappings::<8>::default();
    let top = Mapping {
        iova: range(u64::MAX - 0xfff, u64::MAX),
        gpa: Gpa(0),
        perm: Perm::READ,
    };
    mappings.insert(top).unwrap();
    assert_eq!(mappings.find(Iova(u64::MAX)), Some(top));
    assert_eq!(remove(&mut mappings, IovaRange::ALL), Ok(1));
}

/// Checks the invariants after an operation.
fn check<const CHUNK: usize>(mappings: &Mappings<CHUNK>) {
    let chunks: Vec<_> = mappings.chunks.iter().collect();
    let ends = chunks.iter().skip(1).map(|(key, _)| key.0 - 1);
    for ((key, chunk), end) in chunks.iter().zip(ends.chain([u64::MAX])) {
        assert!(chunk.len() <= CHUNK && chunk.capacity() <= CHUNK);
        let starts = chunk.iter().map(|mapping| mapping.iova.first());
        assert!(starts.clone().is_sorted());
        assert!(
            starts
                .into_iter()
                .all(|first| **key <= first && first.0 <= end)
        );
    }
    for (_, chunk) in chunks.iter().skip(1).rev().skip(1) {
        assert!(chunk.len() >= Mappings::<CHUNK>::LEAST, "{}", chunk.len());
    }
    assert!(chunks.iter().skip(1).all(|(_, chunk)| !chunk.is_empty()));
    let len: usize = chunks.iter().map(|(_, chunk)| chunk.len()).sum();
    assert_eq!(mappings.len(), len);
}

#[derive(Clone, Debug)]
enum Op {
    Map(u64, u64),
    Unmap(u64, u64),
    /// Maps one address at a time, upwards or downwards.
    MapEach(u64, u64, bool),
}

const ADDRESSES: u64 = 160;

fn op() -> impl Strategy<Value = Op> {
    let few = (0..ADDRESSES - 8, 0_u64..8).prop_map(|(first, more)| (first, first + more));
    let many = (0..ADDRESSES, 0..ADDRESSES).prop_map(|(a, b)| (a.min(b), a.max(b)));
    prop_oneof![
        6 => few.clone().prop_map(|(a, b)| Op::Map(a, b)),
        6 => few.prop_map(|(a, b)| Op::Unmap(a, b)),
        1 => many.clone().prop_map(|(a, b)| Op::Unmap(a, b)),
        2 => (many, any::<bool>()).prop_map(|((a, b), up)| Op::MapEach(a, b, up)),
    ]
}

/// The naive model: the mapping of each address.
type Table = Vec<Option<(u64, u64)>>;

fn map<const CHUNK: usize>(mappings: &mut Mappings<CHUNK>, table: &mut Table, ends: (u64, u64)) {
    let cells = ends.0 as usize..=ends.1 as usize;
    let free = table[cells.clone()].iter().all(Option::is_none);
    let outcome = mappings.insert(mapping(ends.0, ends.1));
    assert_eq!(outcome, if free { Ok(()) } else { Err(Status::Inval) });
    if free {
        table[cells].fill(Some(ends));
    }
}

fn unmap<const CHUNK: usize>(mappings: &mut Mappings<CHUNK>, table: &mut Table, ends: (u64, u64)) {
    let cells = ends.0 as usize..=ends.1 as usize;
    let inside: BTreeSet<_> = table[cells.clone()].iter().flatten().copied().collect();
    let whole = inside.iter().all(|(a, b)| *a >= ends.0 && *b <= ends.1);
    let outcome = remove(mappings, range(ends.0, ends.1));
    if whole {
        assert_eq!(outcome, Ok(inside.len()));
        table[cells].fill(None);
    } else {
        assert_eq!(outcome, Err(Status::Range));
    }
}

fn agrees_with_a_table<const CHUNK: usize>(ops: &[Op]) {
    let mut mappings = Mappings::<CHUNK>::default();
    let mut table = vec![None; ADDRESSES as usize];
    for op in ops {
        match *op {
            Op::Map(first, last) => map(&mut mappings, &mut table, (first, last)),
            Op::Unmap(first, last) => unmap(&mut mappings, &mut table, (first, last)),
            Op::MapEach(first, last, up) => {
                for step in 0..=last - first {
                    let at = if up { first + step } else { last - step };
                    map(&mut mappings, &mut table, (at, at));
                }
            }
        }
        check(&mappings);
        for (at, cell) in (0..).zip(&table) {
            assert_eq!(mappings.find(Iova(at)), cell.map(|(a, b)| mapping(a, b)));
        }
    }
    let all: BTreeSet<_> = table.iter().flatten().copied().collect();
    for first in (0..ADDRESSES).step_by(7) {
        for last in (first..ADDRESSES).step_by(11) {
            let listed: Vec<_> = mappings.iter(range(first, last)).collect();
            let inside = all.iter().filter(|(a, b)| *a <= last && *b >= first);
            let expected: Vec<_> = inside.map(|&(a, b)| mapping(a, b)).collect();
            assert_eq!(listed, expected, "{first} to {last}");
        }
    }
}

proptest! {
    #[test]
    fn mappings_agree_with_a_table_of_addresses(ops in prop::collection::vec(op(), 1..80)) {
        agrees_with_a_table::<8>(&ops);
        agrees_with_a_table::<128>(&ops);
    }
}

#[test]
fn mapping_in_order_fills_the_chunks() {
    let mut upwards = Mappings::<8>::default();
    let mut downwards = Mappings::<8>::default();
    for at in 0..64 {
        upwards.insert(mapping(at, at)).unwrap();
        downwards.insert(mapping(63 - at, 63 - at)).unwrap();
    }
    assert_eq!((upwards.chunks.len(), downwards.chunks.len()), (8, 8));
}
