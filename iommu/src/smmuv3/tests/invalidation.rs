//! Scope of invalidations (IHI 0070 §4.3, §4.4).

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use proptest::prelude::*;

use super::super::descriptor::Granule;
use super::super::spec::{
    Raw as _, cd, command as cmd, command::RawCommand, cr0, cr2, reg, ste, ste::RawSte,
};
use super::super::tlb::{
    AsidScope, Entry, MAX_ENTRIES, Scope, Span, StageScope, Tag, TagSummary, Tlb,
};
use super::super::*;
use super::rig::*;
use crate::{Access, AddressSpace, Iova, IovaRange, Mapping, NotifierEvents, NotifierSink, Perm};

const PAGE: u64 = 0x1000;

fn range(first: u64, bytes: u64) -> IovaRange {
    IovaRange::from_len(Iova(first), bytes).unwrap()
}

fn tlbi(opcode: u64, vmid: u64, asid: u64, address: u64) -> RawCommand {
    command(
        opcode,
        &[
            (cmd::VMID, vmid),
            (cmd::ASID, asid),
            (cmd::ADDRESS, address >> 12),
        ],
    )
}

/// A stream with a consumer that registered for `UNMAP`.
struct Listener {
    stream: StreamId,
    space: AddressSpace,
    sink: Arc<Sink>,
}

impl Listener {
    fn new(rig: &Rig, stream: StreamId) -> Self {
        let (space, sink) = rig.listen(stream, &[NotifierEvents::UNMAP]);
        let listener = Self {
            stream,
            space,
            sink,
        };
        listener.sink.take();
        listener
    }

    fn fill(&self, rig: &Rig, iova: u64) {
        rig.read(self.stream, iova).unwrap();
    }
}

/// Two streams with ASIDs 1 and 2 that each hold page 0x1000 and 0x2000.
fn two_streams(rig: &Rig) -> [(Root, Listener); 2] {
    [(STREAM, 1), (OTHER, 2)].map(|(stream, asid)| {
        let root = rig.stage1(stream, asid);
        for (page, gpa) in [(1, 9), (2, 20)] {
            rig.map(&root, page * PAGE, RAM + gpa * PAGE, 3, RW);
        }
        let listener = Listener::new(rig, stream);
        listener.fill(rig, PAGE);
        listener.fill(rig, 2 * PAGE);
        (root, listener)
    })
}

#[test]
fn stage1_commands_reach_the_stream_whose_cd_has_the_asid() {
    use cmd::op;
    let all = vec![IovaRange::ALL];
    let page = vec![range(PAGE, PAGE)];
    for (name, words, one, two) in [
        ("NH_ASID", tlbi(op::TLBI_NH_ASID, 0, 1, 0), &all, &vec![]),
        (
            "NH_ASID of no stream",
            tlbi(op::TLBI_NH_ASID, 0, 3, 0),
            &vec![],
            &vec![],
        ),
        ("NH_VA", tlbi(op::TLBI_NH_VA, 0, 2, PAGE), &vec![], &page),
        ("NH_VAA", tlbi(op::TLBI_NH_VAA, 0, 0, PAGE), &page, &page),
        ("NH_ALL", tlbi(op::TLBI_NH_ALL, 0, 0, 0), &all, &all),
        ("NSNH_ALL", tlbi(op::TLBI_NSNH_ALL, 0, 0, 0), &all, &all),
    ] {
        let rig = Rig::enabled(SmmuConfig::default());
        let [(_, first), (_, second)] = two_streams(&rig);
        rig.complete(&[words]);
        assert_eq!(&first.sink.take(), one, "{name}: first stream");
        assert_eq!(&second.sink.take(), two, "{name}: second stream");
    }
}

#[test]
fn ranges_are_filtered_by_asid_too() {
    let rig = Rig::enabled(SmmuConfig::default());
    let [(_, first), (_, second)] = two_streams(&rig);
    // (3 + 1) << 1 pages of 4 KiB from 0x1000 on, level 3.
    let words = command(
        cmd::op::TLBI_NH_VA,
        &[
            (cmd::ASID, 2),
            (cmd::ADDRESS, 1),
            (cmd::TG, 1),
            (cmd::TTL, 3),
            (cmd::NUM, 3),
            (cmd::SCALE, 1),
        ],
    );
    rig.complete(&[words]);
    assert_eq!(first.sink.take(), []);
    assert_eq!(second.sink.take(), [range(PAGE, 8 * PAGE)]);
}

#[test]
fn a_removed_translation_is_used_until_its_invalidation() {
    let rig = Rig::enabled(SmmuConfig::default());
    let [(root, _), _] = two_streams(&rig);
    rig.map(&root, PAGE, RAM + 50 * PAGE, 3, RW);
    assert_eq!(rig.gpa(STREAM, PAGE), Some(RAM + 9 * PAGE), "still cached");
    rig.complete(&[tlbi(cmd::op::TLBI_NH_VA, 0, 1, PAGE)]);
    assert_eq!(rig.gpa(STREAM, PAGE), Some(RAM + 50 * PAGE));
}

#[test]
fn adjacent_invalidations_are_one_notification_before_the_sync() {
    let rig = Rig::enabled(SmmuConfig::default());
    let [(_, first), _] = two_streams(&rig);
    let words: Vec<_> = (1..=5)
        .map(|page| tlbi(cmd::op::TLBI_NH_VA, 0, 1, page * PAGE))
        .collect();
    rig.complete(&words);
    assert_eq!(first.sink.take(), [range(PAGE, 5 * PAGE)]);
}

/// Records CMDQ_CONS at each notification.
struct Watch {
    smmu: Arc<Smmu>,
    seen: Mutex<Vec<u32>>,
}

impl NotifierSink for Watch {
    fn map(&self, _: &Mapping) {}

    fn unmap(&self, _: &[IovaRange]) {
        self.seen
            .lock()
            .unwrap()
            .push(self.smmu.read(reg::CMDQ_CONS));
    }

    fn registered(&self, _: &crate::Registration) {}
}

#[test]
fn a_sync_is_consumed_after_every_notification() {
    let rig = Rig::enabled(SmmuConfig::default());
    let [(_, first), _] = two_streams(&rig);
    let watch = Arc::new(Watch {
        smmu: rig.smmu.clone(),
        seen: Mutex::default(),
    });
    first
        .space
        .region()
        .unwrap()
        .register(crate::IommuNotifier {
            acceptable: vec![NotifierEvents::UNMAP],
            range: IovaRange::ALL,
            sink: watch.clone(),
        });
    let invalidate = tlbi(cmd::op::TLBI_NH_VA, 0, 1, PAGE);
    rig.issue(&[invalidate, sync(), sync(), invalidate, sync()]);
    // CONS is at the CMD_SYNC after each TLBI.
    assert_eq!(watch.seen.lock().unwrap().as_slice(), [1, 4]);
    assert_eq!(rig.smmu.read(reg::CMDQ_CONS), 5);
}

#[test]
fn many_scattered_invalidations_all_arrive() {
    let rig = Rig::enabled(SmmuConfig::default());
    let [(_, first), _] = two_streams(&rig);
    let words: Vec<_> = (0..200)
        .map(|page| tlbi(cmd::op::TLBI_NH_VA, 0, 1, 2 * page * PAGE))
        .collect();
    rig.complete(&words);
    let expected: Vec<_> = (0..200).map(|page| range(2 * page * PAGE, PAGE)).collect();
    assert_eq!(first.sink.take(), expected);
}

#[test]
fn invalidation_of_one_address_covers_the_whole_block() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.stage1(STREAM, 1);
    rig.map(&root, 2 << 20, RAM, 2, RW);
    let listener = Listener::new(&rig, STREAM);
    listener.fill(&rig, (2 << 20) + 0x1f_0000);
    rig.complete(&[tlbi(cmd::op::TLBI_NH_VA, 0, 1, 2 << 20)]);
    assert_eq!(listener.sink.take(), [range(2 << 20, 2 << 20)]);
    // An invalidation of pages only (TTL) does not select a block.
    listener.fill(&rig, 2 << 20);
    let words = command(
        cmd::op::TLBI_NH_VA,
        &[
            (cmd::ASID, 1),
            (cmd::ADDRESS, (2 << 20) >> 12),
            (cmd::TG, 1),
            (cmd::TTL, 3),
        ],
    );
    rig.complete(&[words]);
    assert_eq!(listener.sink.take(), [range(2 << 20, PAGE)]);
}

#[test]
fn global_translations_are_invalidated_with_any_asid() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.stage1(STREAM, 1);
    rig.map(&root, PAGE, RAM, 3, RW & !(1 << 11));
    let listener = Listener::new(&rig, STREAM);
    listener.fill(&rig, PAGE);
    rig.complete(&[tlbi(cmd::op::TLBI_NH_ASID, 0, 7, 0)]);
    assert_eq!(listener.sink.take(), []);
    rig.complete(&[tlbi(cmd::op::TLBI_NH_VA, 0, 7, PAGE)]);
    assert_eq!(listener.sink.take(), [range(PAGE, PAGE)]);
}

#[test]
fn ignored_top_bytes_invalidate_every_alias() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.root(Granule::K4, 39);
    let context = rig.alloc(64);
    let mut words = cd_words(Granule::K4, 25, root.base, 1);
    cd::TBI0.put(&mut words, 1);
    rig.put_words(context, &words);
    rig.set_ste(STREAM, &ste_stage1(context));
    rig.map(&root, PAGE, RAM, 3, RW);
    let listener = Listener::new(&rig, STREAM);
    let tagged = 0x5a << 56 | PAGE;
    assert_eq!(rig.gpa(STREAM, tagged), Some(RAM));
    rig.complete(&[tlbi(cmd::op::TLBI_NH_VA, 0, 1, PAGE)]);
    assert_eq!(listener.sink.take(), [IovaRange::ALL]);
}

/// A nested stream, one with stage 2 only and one with stage 1 only, with
/// VMIDs 5, 6 and 5 and ASID 1 where there is one.
fn three_kinds(rig: &Rig) -> [Listener; 3] {
    let identity = |vmid| {
        let root = rig.root_at(Granule::K4, 39, 1);
        rig.map(&root, RAM, RAM, 1, S2_RW);
        let mut words = RawSte::ZERO;
        put_stage2(&mut words, Granule::K4, &root, vmid);
        words
    };
    let nested = StreamId(8);
    let root = rig.stage1(nested, 1);
    rig.map(&root, PAGE, RAM + PAGE, 3, RW);
    let mut words = identity(5);
    let stage1: RawSte = rig.raw(STRTAB + 64 * 8);
    words.0[0] |= stage1.0[0];
    rig.set_ste(nested, &words);
    let second = StreamId(16);
    rig.set_ste(second, &identity(6));
    let first = StreamId(24);
    let root = rig.stage1(first, 1);
    rig.map(&root, PAGE, RAM + PAGE, 3, RW);
    let place = STRTAB + 64 * 24 + 16;
    rig.put(place, 5);
    let listeners = [nested, second, first].map(|stream| Listener::new(rig, stream));
    listeners[0].fill(rig, PAGE);
    listeners[1].fill(rig, RAM + PAGE);
    listeners[2].fill(rig, PAGE);
    listeners
}

#[test]
fn vmids_and_stages_select_streams() {
    use cmd::op;
    let all = || vec![IovaRange::ALL];
    let gigabyte = || vec![range(RAM, 1 << 30)];
    for (name, words, reached) in [
        (
            "NH_ALL 5",
            tlbi(op::TLBI_NH_ALL, 5, 0, 0),
            [all(), vec![], all()],
        ),
        (
            "NH_ALL 6",
            tlbi(op::TLBI_NH_ALL, 6, 0, 0),
            [vec![], vec![], vec![]],
        ),
        (
            "NH_ASID 5 1",
            tlbi(op::TLBI_NH_ASID, 5, 1, 0),
            [all(), vec![], all()],
        ),
        (
            "NH_ASID 4 1",
            tlbi(op::TLBI_NH_ASID, 4, 1, 0),
            [vec![], vec![], vec![]],
        ),
        // Stage 2 invalidates nested translations too.
        (
            "S2_IPA 5",
            tlbi(op::TLBI_S2_IPA, 5, 0, RAM),
            [all(), vec![], vec![]],
        ),
        (
            "S2_IPA 6",
            tlbi(op::TLBI_S2_IPA, 6, 0, RAM),
            [vec![], gigabyte(), vec![]],
        ),
        (
            "S12_VMALL 5",
            tlbi(op::TLBI_S12_VMALL, 5, 0, 0),
            [all(), vec![], all()],
        ),
        (
            "S12_VMALL 6",
            tlbi(op::TLBI_S12_VMALL, 6, 0, 0),
            [vec![], all(), vec![]],
        ),
        (
            "NSNH_ALL",
            tlbi(op::TLBI_NSNH_ALL, 0, 0, 0),
            [all(), all(), all()],
        ),
        (
            "EL2_ALL",
            tlbi(op::TLBI_EL2_ALL, 0, 0, 0),
            [vec![], vec![], vec![]],
        ),
    ] {
        let rig = Rig::nested();
        rig.enable();
        let listeners = three_kinds(&rig);
        rig.complete(&[words]);
        let told = listeners.each_ref().map(|listener| listener.sink.take());
        assert_eq!(told, reached, "{name}");
    }
}

#[test]
fn vmid_wildcards_ignore_low_bits() {
    let rig = Rig::nested();
    rig.enable();
    let listeners = three_kinds(&rig);
    let value = rig.smmu.read(reg::CR0);
    rig.smmu.write(reg::CR0, value | 2 << cr0::VMW_SHIFT);
    rig.complete(&[tlbi(cmd::op::TLBI_S12_VMALL, 4, 0, 0)]);
    let told = listeners.map(|listener| listener.sink.take().len());
    assert_eq!(told, [1, 1, 1]);
}

#[test]
fn el2_streams_are_invalidated_by_el2_commands_only() {
    use cmd::op;
    for e2h in [false, true] {
        let asid = u64::from(e2h);
        for (name, words, reached) in [
            ("NH_ALL", tlbi(op::TLBI_NH_ALL, 0, 0, 0), false),
            ("NSNH_ALL", tlbi(op::TLBI_NSNH_ALL, 0, 0, 0), false),
            ("EL2_ALL", tlbi(op::TLBI_EL2_ALL, 0, 0, 0), true),
            ("EL2_VA", tlbi(op::TLBI_EL2_VA, 0, asid, PAGE), true),
            ("EL2_VA, other", tlbi(op::TLBI_EL2_VA, 0, 9, PAGE), !e2h),
            ("EL2_VAA", tlbi(op::TLBI_EL2_VAA, 0, 0, PAGE), true),
            ("EL2_ASID", tlbi(op::TLBI_EL2_ASID, 0, asid, 0), e2h),
        ] {
            let rig = Rig::nested();
            rig.smmu.write(reg::CR2, u32::from(e2h) * cr2::E2H);
            rig.enable();
            rig.smmu.write(reg::CR0, cr0::CMDQEN);
            rig.smmu.write(reg::CR2, u32::from(e2h) * cr2::E2H);
            rig.smmu.write(reg::CR0, cr0::CMDQEN | cr0::SMMUEN);
            let root = rig.stage1(STREAM, 1);
            rig.map(&root, PAGE, RAM, 3, RW);
            let place = STRTAB + 64 * u64::from(STREAM.0) + 8;
            rig.put(place, 2 << 30);
            let listener = Listener::new(&rig, STREAM);
            listener.fill(&rig, PAGE);
            rig.complete(&[words]);
            assert_eq!(
                listener.sink.take().len(),
                usize::from(reached),
                "{name} {e2h}"
            );
        }
    }
}

#[test]
fn configuration_commands_flush_the_stream_they_name() {
    use cmd::op;
    let sid = |opcode| command(opcode, &[(cmd::SID, u64::from(STREAM.0))]);
    let range_of = |stream, bits| {
        command(
            op::CFGI_STE_RANGE,
            &[(cmd::SID, stream), (cmd::RANGE, bits)],
        )
    };
    for (name, words, reached) in [
        ("CFGI_STE", sid(op::CFGI_STE), [1, 0]),
        ("CFGI_CD", sid(op::CFGI_CD), [1, 0]),
        ("CFGI_CD_ALL", sid(op::CFGI_CD_ALL), [1, 0]),
        ("CFGI_STE_RANGE of 8", range_of(8, 2), [1, 0]),
        ("CFGI_STE_RANGE of 16", range_of(20, 3), [0, 1]),
        ("CFGI_STE_RANGE of 32", range_of(0, 4), [1, 1]),
        ("CFGI_ALL", range_of(0, 31), [1, 1]),
        (
            "CFGI_STE of no stream",
            command(op::CFGI_STE, &[(cmd::SID, 9)]),
            [0, 0],
        ),
        (
            "CFGI_STE beyond",
            command(op::CFGI_STE, &[(cmd::SID, 0xffff_ffff)]),
            [0, 0],
        ),
    ] {
        let rig = Rig::enabled(SmmuConfig::default());
        let [(_, first), (_, second)] = two_streams(&rig);
        rig.complete(&[words]);
        let told = [&first, &second].map(|listener| listener.sink.take().len());
        assert_eq!(told, reached, "{name}");
    }
}

#[test]
fn a_stream_is_flushed_even_when_its_ste_no_longer_decodes() {
    let rig = Rig::enabled(SmmuConfig::default());
    let [(_, first), _] = two_streams(&rig);
    rig.set_ste(STREAM, &RawSte::ZERO);
    rig.complete(&[tlbi(cmd::op::TLBI_NH_ASID, 0, 1, 0)]);
    assert_eq!(first.sink.take(), [IovaRange::ALL]);
}

#[test]
fn configuration_commands_of_a_disabled_smmu_notify_no_stream() {
    let rig = Rig::enabled(SmmuConfig::default());
    let [(_, first), _] = two_streams(&rig);
    rig.smmu.write(reg::CR0, cr0::CMDQEN);
    first.sink.take();
    rig.complete(&[command(cmd::op::CFGI_STE_RANGE, &[(cmd::RANGE, 31)])]);
    assert_eq!(first.sink.take(), []);
}

#[test]
fn a_changed_cd_is_seen_after_its_invalidation() {
    let rig = Rig::enabled(SmmuConfig::default());
    let [(_, _), _] = two_streams(&rig);
    let root = rig.root(Granule::K4, 39);
    rig.map(&root, PAGE, RAM + 70 * PAGE, 3, RW);
    let context = rig.get(STRTAB + 64 * u64::from(STREAM.0)) & !0x3f;
    rig.put_words(context, &cd_words(Granule::K4, 25, root.base, 7));
    assert_eq!(rig.gpa(STREAM, PAGE), Some(RAM + 9 * PAGE), "still cached");
    let sid = (cmd::SID, u64::from(STREAM.0));
    rig.complete(&[command(cmd::op::CFGI_CD, &[sid])]);
    assert_eq!(rig.gpa(STREAM, PAGE), Some(RAM + 70 * PAGE));
}

#[test]
fn streams_with_more_tags_than_are_recorded_miss_no_invalidation() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.root(Granule::K4, 39);
    rig.map(&root, PAGE, RAM, 3, RW);
    let table = rig.alloc(64 * 128);
    for asid in 0..128 {
        let words = cd_words(Granule::K4, 25, root.base, asid);
        rig.put_words(table + 64 * asid, &words);
    }
    let mut words = ste_stage1(table);
    ste::S1CDMAX.put(&mut words, 7);
    rig.set_ste(STREAM, &words);
    let listener = Listener::new(&rig, STREAM);
    for substream in 0..128 {
        let request = Request {
            substream: Some(substream),
            ..Request::untranslated(STREAM, Iova(PAGE), Access::Read)
        };
        rig.smmu.translate(&request).unwrap();
    }
    rig.complete(&[tlbi(cmd::op::TLBI_NH_ASID, 0, 127, 0)]);
    assert_eq!(listener.sink.take(), [IovaRange::ALL]);
}

#[test]
fn no_access_continues_after_the_sync_of_its_unmap() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.stage1(STREAM, 1);
    let (space, _) = rig.listen(STREAM, &[NotifierEvents::UNMAP]);
    let (mapped, ended) = (AtomicBool::new(false), AtomicBool::new(false));
    let accesses = AtomicUsize::new(0);
    let device = || {
        while !ended.load(Ordering::Acquire) {
            let inside = space.region().unwrap().enter();
            if inside.translate(Iova(PAGE), Access::Write).is_ok() {
                let before = mapped.load(Ordering::Acquire);
                std::thread::yield_now();
                let after = mapped.load(Ordering::Acquire);
                accesses.fetch_add(1, Ordering::AcqRel);
                assert!(before && after);
            }
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(device);
        scope.spawn(device);
        for _ in 0..300 {
            mapped.store(true, Ordering::Release);
            rig.map(&root, PAGE, RAM, 3, RW);
            let before = accesses.load(Ordering::Acquire);
            while accesses.load(Ordering::Acquire) == before {
                std::thread::yield_now();
            }
            rig.unmap(&root, PAGE, 3);
            rig.complete(&[tlbi(cmd::op::TLBI_NH_VA, 0, 1, PAGE)]);
            mapped.store(false, Ordering::Release);
        }
        ended.store(true, Ordering::Release);
    });
}

fn tag(asid: u16) -> Tag {
    Tag {
        world: super::super::ste::StreamWorld::El1,
        vmid: 0,
        stages: super::super::Stages::One,
        asid,
    }
}

fn scope(asid: AsidScope, span: Option<(u64, u64)>) -> Scope {
    Scope {
        el1: true,
        e2h: None,
        vmid: None,
        asid,
        stages: StageScope::First,
        span: span.map(|(first, last)| Span {
            first,
            last,
            limit: 0,
            group: 0,
        }),
    }
}

#[test]
fn the_tlb_is_bounded() {
    let mut tlb = Tlb::default();
    for number in 0..4 * MAX_ENTRIES as u64 {
        let entry = Entry {
            first: number << 12,
            last: number << 12 | 0xfff,
            output: Gpa(number << 12),
            perm: Perm::READ,
        };
        tlb.insert(tag((number % 7) as u16), entry, TagSummary::default());
        assert!(tlb.entries() <= MAX_ENTRIES);
    }
    assert_eq!(tlb.entries(), MAX_ENTRIES);
}

#[derive(Clone, Debug)]
enum TlbStep {
    Insert(u16, u64, u64, u64),
    Forget(AsidScope, Option<(u64, u64)>),
}

fn tlb_step() -> impl Strategy<Value = TlbStep> {
    let asid = prop_oneof![Just(AsidScope::Any), (0_u16..3).prop_map(AsidScope::Only),];
    let span = proptest::option::of((0_u64..64, 0_u64..8));
    prop_oneof![
        (0_u16..3, 0_u64..64, 0_u64..8, 0_u64..1000)
            .prop_map(|(asid, first, more, output)| TlbStep::Insert(asid, first, more, output)),
        (asid, span).prop_map(|(asid, span)| {
            TlbStep::Forget(asid, span.map(|(first, more)| (first, first + more)))
        }),
    ]
}

proptest! {
    /// Compares with one slot for each address and ASID. An entry is removed
    /// as a whole, so the TLB may drop more than the map, never less.
    #[test]
    fn the_tlb_has_no_translation_that_the_naive_map_lacks(
        steps in proptest::collection::vec(tlb_step(), 1..60),
    ) {
        let mut tlb = Tlb::default();
        let mut model = std::collections::BTreeMap::new();
        for step in steps {
            match step {
                TlbStep::Insert(asid, first, more, output) => {
                    let entry = Entry { first, last: first + more, output: Gpa(output), perm: Perm::READ };
                    tlb.insert(tag(asid), entry, TagSummary::default());
                    for offset in 0..=more {
                        model.insert((asid, first + offset), output + offset);
                    }
                }
                TlbStep::Forget(asid, span) => {
                    tlb.invalidate(&scope(asid, span));
                    model.retain(|(known, address), _| {
                        let asid = match asid {
                            AsidScope::Only(one) => one == *known,
                            _ => true,
                        };
                        let inside = span.is_none_or(|(a, b)| (a..=b).contains(address));
                        !(asid && inside)
                    });
                }
            }
            for asid in 0..3 {
                for address in 0..80 {
                    if let Some(entry) = tlb.find(&tag(asid), address) {
                        let output = entry.output.0 + (address - entry.first);
                        prop_assert_eq!(model.get(&(asid, address)), Some(&output));
                    }
                }
            }
        }
    }
}
