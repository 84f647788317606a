//! Answers that need no state lock: every command that names one drops it.

use super::super::spec::{Field, command as cmd, command::RawCommand, cr0, reg};
use super::super::*;
use super::rig::*;
use crate::{Access, Iova, NotifierEvents};

const PAGE: u64 = 0x1000;
const BLOCK: u64 = 0x20_0000;
const UNMAP: &[NotifierEvents] = &[NotifierEvents::UNMAP];
/// Targets of the page, and of the second page of the block.
type Targets = [Option<u64>; 2];
/// Opcode and fields of a command, and the targets after it.
type Case = (u64, &'static [(Field<RawCommand>, u64)], Targets);
const OLD: Targets = [Some(RAM), Some(RAM + BLOCK + PAGE)];
const NEW: Targets = [Some(RAM + 2 * BLOCK), Some(RAM + 3 * BLOCK + PAGE)];

/// Two connected streams with ASIDs 1 and 2, each with a page at `PAGE` and a block at
/// `BLOCK` that were used three times.
fn used() -> (Rig, [Root; 2], [crate::AddressSpace; 2]) {
    let rig = Rig::enabled(SmmuConfig::default());
    let roots = [(STREAM, 1), (OTHER, 2)].map(|(stream, asid)| rig.stage1(stream, asid));
    let spaces = [STREAM, OTHER].map(|stream| rig.listen(stream, UNMAP).0);
    for (root, stream) in roots.iter().zip([STREAM, OTHER]) {
        map(&rig, root, 0);
        for _ in 0..3 {
            assert_eq!(results(&rig, stream), OLD);
        }
    }
    (rig, roots, spaces)
}

/// Maps both, to addresses that are `more` blocks apart from the first ones.
fn map(rig: &Rig, root: &Root, more: u64) {
    rig.map(root, PAGE, RAM + more * BLOCK, 3, RW);
    rig.map(root, BLOCK, RAM + (more + 1) * BLOCK, 2, RW);
}

fn results(rig: &Rig, stream: StreamId) -> Targets {
    [PAGE, BLOCK + PAGE].map(|iova| rig.gpa(stream, iova))
}

#[test]
fn answers_are_dropped_by_the_commands_that_name_them() {
    const SID: (Field<RawCommand>, u64) = (cmd::SID, STREAM.0 as u64);
    const ASID: (Field<RawCommand>, u64) = (cmd::ASID, 1);
    let cases: [Case; 9] = [
        (
            cmd::op::TLBI_NH_VA,
            &[ASID, (cmd::ADDRESS, PAGE >> 12)],
            [NEW[0], OLD[1]],
        ),
        // Any address of a block removes it.
        (
            cmd::op::TLBI_NH_VA,
            &[ASID, (cmd::ADDRESS, BLOCK >> 12 | 0x1f)],
            [OLD[0], NEW[1]],
        ),
        (
            cmd::op::TLBI_NH_VA,
            &[(cmd::ASID, 2), (cmd::ADDRESS, PAGE >> 12)],
            OLD,
        ),
        (cmd::op::TLBI_NH_ASID, &[ASID], NEW),
        (cmd::op::TLBI_NH_ALL, &[], NEW),
        (cmd::op::TLBI_NSNH_ALL, &[], NEW),
        (cmd::op::CFGI_CD, &[SID], OLD),
        (cmd::op::CFGI_STE, &[SID], OLD),
        (cmd::op::CFGI_STE_RANGE, &[(cmd::RANGE, 31)], OLD),
    ];
    for (opcode, fields, expected) in cases {
        let (rig, [root, _], _spaces) = used();
        map(&rig, &root, 2);
        assert_eq!(results(&rig, STREAM), OLD, "before {opcode:#x}");
        rig.complete(&[command(opcode, fields)]);
        assert_eq!(results(&rig, STREAM), expected, "after {opcode:#x}");
        assert_eq!(
            results(&rig, OTHER),
            OLD,
            "the other stream after {opcode:#x}"
        );
    }
}

#[test]
fn answers_are_dropped_with_the_configuration() {
    // Another table of the stream, with another ASID.
    let (rig, _, _spaces) = used();
    let root = rig.stage1(STREAM, 3);
    map(&rig, &root, 2);
    assert_eq!(results(&rig, STREAM), OLD);
    rig.cfgi_ste(STREAM);
    assert_eq!(results(&rig, STREAM), NEW);

    // SMMUEN: bypass while it is 0.
    let enables = rig.smmu.read(reg::CR0);
    rig.smmu.write(reg::CR0, enables & !cr0::SMMUEN);
    assert_eq!(rig.gpa(STREAM, PAGE), Some(PAGE));
    rig.smmu.reset();
    assert_eq!(rig.gpa(STREAM, BLOCK), Some(BLOCK));
}

#[test]
fn answers_are_for_accesses_of_their_permission_and_are_counted() {
    let (rig, [root, _], _spaces) = used();
    rig.map(&root, 0x3000, RAM, 3, RO);
    for _ in 0..3 {
        assert_eq!(rig.gpa(STREAM, 0x3000), Some(RAM));
        assert!(rig.access(STREAM, Iova(0x3000).0, Access::Write).is_err());
    }
    let before = rig.smmu.stats();
    assert_eq!(rig.gpa(STREAM, 0x3000), Some(RAM));
    let after = rig.smmu.stats();
    assert_eq!(after.tlb_hits, before.tlb_hits + 1);
    assert_eq!(after.tlb_misses, before.tlb_misses);
}
