//! Lookups and listings: their results, and that they change nothing.

use super::super::descriptor::Granule;
use super::super::spec::{command as cmd, gbpa, reg};
use super::super::*;
use super::rig::*;
use crate::{Access, Iova, Perm};

/// Address of a mapping above tables without mappings.
const HIDDEN: u64 = 3 << 30;
/// Upper bound on calls for a whole listing.
const MAX_CALLS: usize = 64;

fn lookup(rig: &Rig, iova: u64) -> Option<u64> {
    let request = Request::untranslated(STREAM, Iova(iova), Access::Read);
    let mapping = rig.smmu.lookup(&request).ok()?;
    Some(mapping.gpa_of(Iova(iova)).unwrap().0)
}

#[test]
fn lookup_fills_no_tlb_and_counts_nothing() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.stage1(STREAM, 1);
    rig.map(&root, 0x1000, RAM, 3, RW);
    let before = rig.smmu.stats();
    assert_eq!(lookup(&rig, 0x1000), Some(RAM));
    assert_eq!(lookup(&rig, 0x9000), None);
    assert_eq!(rig.smmu.stats(), before);
    // Without a TLB entry the next walk sees the new descriptor.
    rig.map(&root, 0x1000, RAM + 0x5000, 3, RW);
    assert_eq!(rig.gpa(STREAM, 0x1000), Some(RAM + 0x5000));
    // A lookup that hits the TLB is not counted either.
    let before = rig.smmu.stats();
    assert_eq!(lookup(&rig, 0x1000), Some(RAM + 0x5000));
    assert_eq!(rig.smmu.stats(), before);
}

#[test]
fn lookup_caches_no_configuration() {
    let rig = Rig::enabled(SmmuConfig::default());
    let (_space, _) = rig.listen(STREAM, &[]);
    let old = rig.stage1(STREAM, 1);
    rig.map(&old, 0x1000, RAM, 3, RW);
    assert_eq!(lookup(&rig, 0x1000), Some(RAM));
    assert!(rig.smmu.stream_state(STREAM).is_some());
    assert_eq!(rig.smmu.mappings(STREAM, Iova(0), 10).0.len(), 1);
    // Nothing was cached, so another STE and CD need no CFGI.
    let new = rig.stage1(STREAM, 2);
    rig.map(&new, 0x1000, RAM + 0x5000, 3, RW);
    assert_eq!(rig.gpa(STREAM, 0x1000), Some(RAM + 0x5000));
}

#[test]
fn invalidation_of_a_looked_up_translation_reaches_the_stream() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.stage1(STREAM, 1);
    let (_space, sink) = rig.listen(STREAM, &[NotifierEvents::UNMAP]);
    rig.map(&root, 0x1000, RAM, 3, RW);
    assert_eq!(lookup(&rig, 0x1000), Some(RAM));
    rig.unmap(&root, 0x1000, 3);
    let tlbi = command(cmd::op::TLBI_NH_ALL, &[]);
    rig.complete(&[tlbi]);
    assert_eq!(sink.take(), [IovaRange::ALL]);
}

#[test]
fn listing_continues_after_tables_without_mappings() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.stage1(STREAM, 1);
    // Every lower entry of the tables points to an empty table.
    let place = rig.descriptor(&root, 0, 2) & !0xfff;
    let empty = rig.alloc(1 << Granule::K4.bits());
    for entry in 0..512 {
        rig.put(place + 8 * entry, empty | 3);
    }
    for entry in 0..HIDDEN >> 30 {
        rig.put(root.base + 8 * entry, place | 3);
    }
    rig.map(&root, HIDDEN, RAM, 1, RW);
    let (mut found, mut next, mut calls) = (Vec::new(), Some(Iova(0)), 0);
    while let Some(from) = next {
        let (mappings, more) = rig.smmu.mappings(STREAM, from, 10);
        assert!(more.is_none_or(|more| more > from), "it goes on");
        found.extend(mappings);
        next = more;
        calls += 1;
        assert!(calls <= MAX_CALLS);
    }
    assert!(calls > 1, "one call is bounded");
    let shown: Vec<_> = found.iter().map(|m| (m.iova.first().0, m.perm)).collect();
    assert_eq!(shown, [(HIDDEN, Perm::READ_WRITE)]);
}

#[test]
fn listing_leaves_out_gaps_of_every_kind() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.stage1(STREAM, 1);
    // First and last page of a table, next to gaps at each level.
    let pages = [
        0x1000,
        0x5000,
        0x1f_f000,
        0x4000_0000,
        0x7fff_f000,
        (512 << 30) - 0x1000,
    ];
    for page in pages {
        rig.map(
            &root,
            page,
            RAM + 0x10_0000 + (page >> 12) % 7 * 0x2000,
            3,
            RW,
        );
    }
    // A page without read permission is listed.
    rig.map(&root, 0x9000, RAM, 3, RW & !(1 << 6));
    let (mappings, next) = rig.smmu.mappings(STREAM, Iova(0), 100);
    let found: Vec<_> = mappings.iter().map(|m| m.iova.first().0).collect();
    assert_eq!((found.as_slice(), next), (pages.as_slice(), None));
    // From within a gap.
    let (mappings, _) = rig.smmu.mappings(STREAM, Iova(0x3123), 1);
    assert_eq!(mappings[0].iova.first(), Iova(0x5000));
}

#[test]
fn listing_of_a_bypassing_stream_continues_at_the_next_block() {
    let blocks = [
        (vm_memory::GuestAddress(RAM), 0x1000),
        (vm_memory::GuestAddress(RAM << 1), 0x1000),
    ];
    let ram = Arc::new(GuestRam::from_ranges(&blocks).unwrap());
    let smmu = Smmu::new(SmmuConfig::default(), ram, Arc::new(Wires::default()));
    let (first, next) = smmu.mappings(STREAM, Iova(0), 1);
    assert_eq!((first[0].gpa, next), (Gpa(RAM), Some(Iova(RAM << 1))));
    let (second, next) = smmu.mappings(STREAM, Iova(RAM << 1), 1);
    assert_eq!((second[0].gpa, next), (Gpa(RAM << 1), None));
    smmu.write(reg::GBPA, gbpa::ABORT | gbpa::UPDATE);
    assert_eq!(smmu.mappings(STREAM, Iova(0), 1), (Vec::new(), None));
}
