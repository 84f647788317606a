//! Errors of stream table entries and context descriptors, and the faults of
//! translation, each with its event.

use super::super::descriptor::Granule;
use super::super::spec::{
    Field, Raw, cd, cd::RawCd, command as cmd, cr0, event, gbpa, reg, ste, ste::RawSte, strtab,
};
use super::super::*;
use super::rig::*;
use crate::{Access, FaultReason, Iova, Perm};

const NONE: [u64; 0] = [];
const C_BAD_STREAMID: u64 = 0x02;
const F_STE_FETCH: u64 = 0x03;
const C_BAD_STE: u64 = 0x04;
const F_STREAM_DISABLED: u64 = 0x06;
const C_BAD_SUBSTREAMID: u64 = 0x08;
const F_CD_FETCH: u64 = 0x09;
const C_BAD_CD: u64 = 0x0a;
const F_WALK_EABT: u64 = 0x0b;
const F_TRANSLATION: u64 = 0x10;
const F_ADDR_SIZE: u64 = 0x11;
const F_ACCESS: u64 = 0x12;
const F_PERMISSION: u64 = 0x13;

/// Not RAM.
const NOWHERE: u64 = 0x1000;

fn stage2_root(rig: &Rig) -> Root {
    let root = rig.root_at(Granule::K4, 40, 1);
    rig.map(&root, RAM, RAM, 1, S2_RW);
    root
}

/// Name of each case, and the fields that it sets.
type Cases<T> = &'static [(&'static str, &'static [(Field<T>, u64)])];

fn put<T: Raw>(words: &mut T, fields: &[(Field<T>, u64)]) {
    for (field, value) in fields {
        field.put(words, *value);
    }
}

#[test]
fn every_illegal_ste_is_a_c_bad_ste() {
    // §5.2.2, on top of a valid nested STE.
    let illegal: Cases<RawSte> = &[
        ("V", &[(ste::V, 0)]),
        ("S1CDMax beyond SSIDSIZE", &[(ste::S1CDMAX, 21)]),
        (
            "S1ContextPtr beyond the IAS",
            &[(ste::S1CONTEXTPTR, 1 << 42)],
        ),
        ("AArch32 stage 2", &[(ste::S2AA64, 0)]),
        ("big-endian stage 2", &[(ste::S2ENDI, 1)]),
        ("S2TG", &[(ste::S2TG, 3)]),
        ("S2T0SZ too small", &[(ste::S2T0SZ, 15)]),
        ("S2T0SZ too large", &[(ste::S2T0SZ, 40)]),
        ("S2SL0 reserved", &[(ste::S2SL0, 3)]),
        (
            "S2SL0 with 32 tables",
            &[(ste::S2SL0, 1), (ste::S2T0SZ, 20)],
        ),
        (
            "S2SL0 with half an entry",
            &[(ste::S2SL0, 2), (ste::S2T0SZ, 25)],
        ),
        ("S2SL0 too low a level", &[(ste::S2SL0, 0)]),
        (
            "S2SL0 too high a level",
            &[(ste::S2SL0, 2), (ste::S2T0SZ, 30)],
        ),
        (
            "S2TTB beyond S2PS",
            &[(ste::S2PS, 0), (ste::S2TTB, 1 << 28)],
        ),
        ("S2TTB beyond 48 bits", &[(ste::S2TTB, 1 << 44)]),
        ("split-stage ATS", &[(ste::EATS, 2)]),
        ("ATS with stalls", &[(ste::EATS, 1), (ste::S2S, 1)]),
    ];
    let legal: Cases<RawSte> = &[
        ("as it is", &[]),
        ("EATS", &[(ste::EATS, 1)]),
        ("EATS with device permission tables", &[(ste::EATS, 3)]),
        ("STRW with stage 2", &[(ste::STRW, 3)]),
        ("S2HA and S2HD", &[(ste::S2HA, 1), (ste::S2HD, 1)]),
        ("S2PS beyond the OAS", &[(ste::S2PS, 7)]),
        ("S2S", &[(ste::S2S, 1)]),
    ];
    let config = SmmuConfig {
        stages: Stages::Nested,
        ats: true,
        ..SmmuConfig::default()
    };
    for (valid, cases) in [(false, illegal), (true, legal)] {
        for (name, fields) in cases {
            let rig = Rig::enabled(config);
            let root = rig.stage1(STREAM, 1);
            rig.map(&root, 0, RAM, 3, RW);
            let mut words = rig.raw(STRTAB + 64 * 8);
            put_stage2(&mut words, Granule::K4, &stage2_root(&rig), 1);
            put(&mut words, fields);
            rig.set_ste(STREAM, &words);
            let answer = rig.gpa(STREAM, 0);
            let events = rig.event_numbers();
            if valid {
                assert_eq!((answer, events), (Some(RAM), vec![]), "{name}");
            } else {
                assert_eq!((answer, events), (None, vec![C_BAD_STE]), "{name}");
            }
        }
    }
}

#[test]
fn strw_is_checked_where_it_is_used() {
    for (config, strw, valid) in [
        (Stages::One, 3, true),
        (Stages::Nested, 0, true),
        (Stages::Nested, 1, false),
        (Stages::Nested, 2, true),
        (Stages::Nested, 3, false),
    ] {
        let rig = Rig::enabled(SmmuConfig {
            stages: config,
            ..SmmuConfig::default()
        });
        let root = rig.stage1(STREAM, 1);
        rig.map(&root, 0, RAM, 3, RW);
        rig.put(STRTAB + 64 * 8 + 8, strw << 30);
        assert_eq!(rig.gpa(STREAM, 0).is_some(), valid, "{config:?} {strw}");
    }
}

#[test]
fn stages_that_are_not_offered_are_illegal() {
    for (stages, encoding, expected) in [
        (Stages::One, 0b101, vec![C_BAD_CD]),
        (Stages::One, 0b110, vec![C_BAD_STE]),
        (Stages::One, 0b111, vec![C_BAD_STE]),
        (Stages::Two, 0b101, vec![C_BAD_STE]),
        (Stages::Two, 0b110, vec![]),
        (Stages::Two, 0b111, vec![C_BAD_STE]),
    ] {
        let rig = Rig::enabled(SmmuConfig {
            stages,
            ..SmmuConfig::default()
        });
        let mut words = ste_stage1(rig.alloc(64));
        put_stage2(&mut words, Granule::K4, &stage2_root(&rig), 0);
        ste::CONFIG.put(&mut words, encoding);
        rig.set_ste(STREAM, &words);
        let answer = rig.gpa(STREAM, RAM);
        assert_eq!(
            answer.is_some(),
            expected.is_empty(),
            "{stages:?} {encoding:b}"
        );
        assert_eq!(rig.event_numbers(), expected, "{stages:?} {encoding:b}");
    }
}

#[test]
fn config_selects_abort_and_bypass() {
    let rig = Rig::enabled(SmmuConfig::default());
    for encoding in 0..4 {
        let mut words = RawSte::ZERO;
        put(&mut words, &[(ste::V, 1), (ste::CONFIG, encoding)]);
        rig.set_ste(STREAM, &words);
        rig.cfgi_ste(STREAM);
        let fault = rig.read(STREAM, RAM).unwrap_err();
        assert_eq!(fault.reason, FaultReason::Aborted);
        assert_eq!(rig.event_numbers(), NONE, "aborted without an event");
    }
    let mut words = RawSte::ZERO;
    put(&mut words, &[(ste::V, 1), (ste::CONFIG, 4)]);
    rig.set_ste(STREAM, &words);
    rig.cfgi_ste(STREAM);
    let whole = rig.read(STREAM, RAM + 7).unwrap();
    assert_eq!(whole.iova.size(), Some(RAM_SIZE as u64));
    assert_eq!((whole.gpa.0, whole.perm), (RAM, Perm::READ_WRITE));
    // A doorbell passes too.
    assert_eq!(rig.gpa(STREAM, 0x808_0040), Some(0x808_0040));
    // §3.4: beyond what stage 1 could output.
    assert!(rig.read(STREAM, 1 << 48).is_err());
    let events = rig.events();
    assert_eq!(events[0].number(), F_ADDR_SIZE);
    assert_eq!(
        (events[0].get(event::S2), events[0].get(event::CLASS)),
        (0, 2)
    );
    let request = Request {
        substream: Some(1),
        ..Request::untranslated(STREAM, Iova(RAM), Access::Read)
    };
    assert!(rig.smmu.translate(&request).is_err());
    assert_eq!(rig.event_numbers(), [C_BAD_SUBSTREAMID]);
}

#[test]
fn stream_ids_are_found_in_both_kinds_of_tables() {
    // §7.3.3
    let two_level = |split: u32| strtab::FMT_2_LEVEL << strtab::FMT | split << strtab::SPLIT;
    for (name, cfg, span, stream, expected) in [
        ("linear", 8, 0, 255, None),
        ("linear, beyond", 8, 0, 256, Some(C_BAD_STREAMID)),
        ("2-level", 16 | two_level(8), 9, 0x3ff, None),
        ("2-level, split 6", 16 | two_level(6), 7, 0xff, None),
        ("2-level, split 10", 16 | two_level(10), 11, 0xfff, None),
        (
            "no level 2",
            16 | two_level(8),
            0,
            0x3ff,
            Some(C_BAD_STREAMID),
        ),
        (
            "reserved span",
            16 | two_level(10),
            12,
            0xfff,
            Some(C_BAD_STREAMID),
        ),
        (
            "span beyond split",
            16 | two_level(8),
            10,
            0x3ff,
            Some(C_BAD_STREAMID),
        ),
        (
            "beyond span",
            16 | two_level(8),
            8,
            0x3ff,
            Some(C_BAD_STREAMID),
        ),
        (
            "beyond the level 1 table",
            9 | two_level(8),
            9,
            0x3ff,
            Some(C_BAD_STREAMID),
        ),
    ] {
        let rig = Rig::enabled(SmmuConfig::default());
        rig.smmu.write(reg::CR0, cr0::CMDQEN | cr0::EVENTQEN);
        rig.smmu.write(reg::STRTAB_BASE_CFG, cfg);
        let mut words = RawSte::ZERO;
        put(&mut words, &[(ste::V, 1), (ste::CONFIG, 4)]);
        if span == 0 && cfg >> strtab::FMT == 0 {
            rig.put_words(STRTAB + 64 * u64::from(stream & 0xff), &words);
        } else {
            let split = cfg >> strtab::SPLIT & 0x1f;
            let level_2 = rig.alloc(64 << split);
            rig.put(STRTAB + 8 * (u64::from(stream) >> split), level_2 | span);
            let entry = u64::from(stream) & ((1 << split) - 1);
            rig.put_words(level_2 + 64 * entry, &words);
        }
        let enables = cr0::CMDQEN | cr0::EVENTQEN | cr0::SMMUEN;
        rig.smmu.write(reg::CR0, enables);
        let answer = rig.gpa(StreamId(stream), RAM);
        assert_eq!(answer.is_some(), expected.is_none(), "{name}");
        assert_eq!(rig.event_numbers(), Vec::from_iter(expected), "{name}");
    }
}

#[test]
fn bad_stream_ids_are_silent_without_recinvsid() {
    let rig = Rig::enabled(SmmuConfig::default());
    rig.smmu.write(reg::CR0, 0);
    rig.smmu.write(reg::CR2, 0);
    rig.smmu.write(reg::CR0, cr0::EVENTQEN | cr0::SMMUEN);
    assert!(rig.read(StreamId(0x100), RAM).is_err());
    assert_eq!(rig.event_numbers(), NONE);
}

#[test]
fn structures_outside_of_ram_are_fetch_errors() {
    // §7.3.4: the stream table.
    let rig = Rig::enabled(SmmuConfig::default());
    rig.smmu.write(reg::CR0, 0);
    rig.write64(reg::STRTAB_BASE, 0x8000);
    rig.smmu.write(reg::CR0, cr0::EVENTQEN | cr0::SMMUEN);
    assert!(rig.read(STREAM, 0).is_err());
    let events = rig.events();
    assert_eq!(events[0].number(), F_STE_FETCH);
    assert_eq!(events[0].get(event::FETCH) << 3, 0x8000 + 64 * 8);
    assert_eq!(events[0].get(event::SID), 8);

    // §7.3.10: the context descriptor.
    let rig = Rig::enabled(SmmuConfig::default());
    rig.set_ste(STREAM, &ste_stage1(NOWHERE));
    assert!(rig.read(STREAM, 0).is_err());
    let events = rig.events();
    assert_eq!(events[0].number(), F_CD_FETCH);
    assert_eq!(events[0].get(event::FETCH) << 3, NOWHERE);

    // §7.3.12: a translation table, at any level.
    for level in 1..=3 {
        let rig = Rig::enabled(SmmuConfig::default());
        let root = rig.stage1(STREAM, 1);
        if level == 1 {
            let context = rig.get(STRTAB + 64 * 8) & !0x3f;
            rig.put_words(context, &cd_words(Granule::K4, 25, NOWHERE, 1));
        } else {
            let place = rig.descriptor(&root, 0, level - 1);
            rig.put(place, NOWHERE | 3);
        }
        assert!(rig.access(STREAM, 8, Access::Write).is_err());
        let events = rig.events();
        assert_eq!(events[0].number(), F_WALK_EABT);
        assert_eq!(events[0].get(event::FETCH) << 3, NOWHERE);
        assert_eq!(events[0].get(event::CLASS), 1);
        assert_eq!(events[0].get(event::INPUT), 8);
        assert_eq!(events[0].get(event::RNW), 0);
    }
}

#[test]
fn every_illegal_cd_is_a_c_bad_cd() {
    // §5.4.2, on top of a valid CD with both regions.
    let illegal: Cases<RawCd> = &[
        ("V", &[(cd::V, 0)]),
        ("AArch32", &[(cd::AA64, 0)]),
        ("RAZ/WI", &[(cd::A, 0)]),
        ("stall where the STE forbids it", &[(cd::S, 1)]),
        ("big-endian", &[(cd::ENDI, 1)]),
        ("TG0", &[(cd::TG0, 3)]),
        ("TG1", &[(cd::TG1, 0)]),
        ("T0SZ too small", &[(cd::T0SZ, 15)]),
        ("T0SZ too small for 64 KiB", &[(cd::T0SZ, 12), (cd::TG0, 1)]),
        ("T0SZ too large", &[(cd::T0SZ, 40)]),
        ("T1SZ too small", &[(cd::T1SZ, 0)]),
        ("T1SZ too large", &[(cd::T1SZ, 63)]),
        ("TTB0 beyond IPS", &[(cd::IPS, 0), (cd::TTB0, 1 << 28)]),
        ("TTB0 beyond 48 bits", &[(cd::IPS, 6), (cd::TTB0, 1 << 44)]),
        ("TTB1 beyond IPS", &[(cd::IPS, 1), (cd::TTB1, 1 << 32)]),
    ];
    let legal: Cases<RawCd> = &[
        ("as it is", &[]),
        (
            "fields of a disabled half",
            &[(cd::EPD1, 1), (cd::TG1, 0), (cd::T1SZ, 0)],
        ),
        ("endianness of nothing", &[(cd::EPD1, 1)]),
        ("HA and HD", &[(cd::HA, 1), (cd::HD, 1)]),
        ("HD without HA", &[(cd::HD, 1)]),
    ];
    for (valid, cases) in [(false, illegal), (true, legal)] {
        for (name, fields) in cases {
            let rig = Rig::enabled(SmmuConfig::default());
            let root = rig.root(Granule::K4, 39);
            rig.map(&root, 0, RAM, 3, RW);
            let context = rig.alloc(64);
            let mut words = cd_words(Granule::K4, 25, root.base, 1);
            let high = [
                (cd::EPD1, 0),
                (cd::TG1, 2),
                (cd::T1SZ, 25),
                (cd::TTB1, root.base >> 4),
            ];
            put(&mut words, &high);
            put(&mut words, fields);
            rig.put_words(context, &words);
            let mut stream = ste_stage1(context);
            ste::S1STALLD.put(&mut stream, 1);
            rig.set_ste(STREAM, &stream);
            let answer = rig.gpa(STREAM, 0);
            let events = rig.event_numbers();
            if valid {
                assert_eq!((answer, events), (Some(RAM), vec![]), "{name}");
            } else {
                assert_eq!((answer, events), (None, vec![C_BAD_CD]), "{name}");
            }
        }
    }
}

/// A stream with `1 << bits` contexts. Context n maps page n of RAM one to one.
fn with_substreams(rig: &Rig, bits: u32, format: u64, dss: u64) {
    let contexts = 1_u64 << bits;
    let split = if format == 1 { 6 } else { 10 };
    let (pointer, level_1) = if format == 0 {
        (rig.alloc(64 << bits), None)
    } else {
        let table = rig.alloc((8 << bits.saturating_sub(split)).max(64));
        (table, Some(table))
    };
    for index in 0..contexts {
        let root = rig.root(Granule::K4, 39);
        rig.map(&root, index << 12, RAM + (index << 12), 3, RW);
        let place = match level_1 {
            None => pointer + 64 * index,
            Some(table) => {
                let entry = table + 8 * (index >> split);
                if rig.get(entry) == 0 {
                    rig.put(entry, rig.alloc(64 << split) | 1);
                }
                (rig.get(entry) & !0xfff) + 64 * (index & ((1 << split) - 1))
            }
        };
        rig.put_words(place, &cd_words(Granule::K4, 25, root.base, index));
    }
    let mut words = ste_stage1(pointer);
    let fields = [
        (ste::S1CDMAX, u64::from(bits)),
        (ste::S1FMT, format),
        (ste::S1DSS, dss),
    ];
    put(&mut words, &fields);
    rig.set_ste(STREAM, &words);
}

fn ask(rig: &Rig, substream: Option<u32>, iova: u64) -> Option<u64> {
    let request = Request {
        substream,
        ..Request::untranslated(STREAM, Iova(iova), Access::Read)
    };
    let mapping = rig.smmu.translate(&request).ok()?;
    Some(mapping.gpa_of(Iova(iova)).unwrap().0)
}

#[test]
fn substreams_select_contexts_in_linear_and_2_level_tables() {
    for format in 0..3 {
        let rig = Rig::enabled(SmmuConfig::default());
        with_substreams(&rig, 7, format, 2);
        for substream in [1_u32, 63, 64, 127] {
            let iova = u64::from(substream) << 12;
            assert_eq!(ask(&rig, Some(substream), iova), Some(RAM + iova));
            assert_eq!(ask(&rig, Some(substream), iova ^ 0x1000), None);
        }
        rig.events();
        assert_eq!(ask(&rig, Some(128), 0), None);
        assert_eq!(rig.event_numbers(), [C_BAD_SUBSTREAMID], "format {format}");
    }
}

#[test]
fn s1dss_applies_to_accesses_without_a_substream() {
    for (dss, plain, zero) in [
        (0, Err(F_STREAM_DISABLED), Ok(RAM)),
        (1, Ok(0), Ok(RAM)),
        (2, Ok(RAM), Err(F_STREAM_DISABLED)),
        (3, Err(F_STREAM_DISABLED), Ok(RAM)),
    ] {
        let rig = Rig::enabled(SmmuConfig::default());
        with_substreams(&rig, 2, 0, dss);
        for (substream, expected) in [(None, plain), (Some(0), zero)] {
            let answer = ask(&rig, substream, 0);
            assert_eq!(answer, expected.ok(), "S1DSS {dss}, {substream:?}");
            let events = Vec::from_iter(expected.err());
            assert_eq!(rig.event_numbers(), events, "S1DSS {dss}, {substream:?}");
        }
    }
}

#[test]
fn an_invalid_level_1_cd_is_a_bad_substream() {
    let rig = Rig::enabled(SmmuConfig::default());
    let table = rig.alloc(64);
    let mut words = ste_stage1(table);
    put(&mut words, &[(ste::S1CDMAX, 8), (ste::S1FMT, 1)]);
    rig.set_ste(STREAM, &words);
    for descriptor in [0, 1 << 48 | 1] {
        rig.put(table, descriptor);
        assert_eq!(ask(&rig, Some(5), 0), None);
        let events = rig.events();
        assert_eq!(events[0].number(), C_BAD_SUBSTREAMID);
        assert_eq!(events[0].get(event::SSID), 5);
    }
    assert_eq!(ask(&rig, None, 0), None);
    assert_eq!(rig.event_numbers(), [F_STREAM_DISABLED]);
}

#[test]
fn faults_of_stage_1_have_their_events() {
    // §7.3.13 to §7.3.16
    for (name, level, descriptor, access, expected) in [
        ("nothing there", 3, 0, Access::Read, F_TRANSLATION),
        (
            "a block at level 3",
            3,
            RAM | RW,
            Access::Read,
            F_TRANSLATION,
        ),
        (
            "a table address beyond IPS",
            2,
            1 << 36 | 3,
            Access::Read,
            F_ADDR_SIZE,
        ),
        (
            "an output address beyond IPS",
            3,
            1 << 36 | RW | 2,
            Access::Read,
            F_ADDR_SIZE,
        ),
        (
            "access flag",
            3,
            RAM | (RW & !(1 << 10)) | 2,
            Access::Read,
            F_ACCESS,
        ),
        ("read-only", 3, RAM | RO | 2, Access::Write, F_PERMISSION),
        (
            "privileged",
            3,
            RAM | (RW & !(1 << 6)) | 2,
            Access::Read,
            F_PERMISSION,
        ),
        (
            "below a table that is not for user mode",
            2,
            1 << 61,
            Access::Read,
            F_PERMISSION,
        ),
        (
            "below a read-only table",
            2,
            1 << 62,
            Access::Write,
            F_PERMISSION,
        ),
    ] {
        let rig = Rig::enabled(SmmuConfig::default());
        let root = rig.stage1(STREAM, 1);
        let context = rig.get(STRTAB + 64 * 8) & !0x3f;
        let mut words = cd_words(Granule::K4, 25, root.base, 1);
        cd::IPS.put(&mut words, 1);
        rig.put_words(context, &words);
        rig.map(&root, 0, RAM, 3, RW);
        let place = rig.descriptor(&root, 0, level);
        let above = descriptor >> 61 != 0;
        rig.put(place, descriptor | if above { rig.get(place) } else { 0 });
        let fault = rig.access(STREAM, 0x123, access).unwrap_err();
        let events = rig.events();
        assert_eq!(events[0].number(), expected, "{name}");
        assert_eq!(events[0].get(event::INPUT), 0x123);
        assert_eq!(events[0].get(event::S2), 0);
        assert_eq!(events[0].get(event::CLASS), 2);
        assert_eq!(events[0].get(event::STALL), 0);
        let read = u64::from(access == Access::Read);
        assert_eq!(events[0].get(event::RNW), read, "{name}");
        let kind = EventKind::ALL
            .into_iter()
            .find(|kind| *kind as u64 == expected);
        assert_eq!(fault.reason, kind.unwrap().reason());
    }
}

#[test]
fn table_descriptors_restrict_stage_1_only_and_not_with_had() {
    let (stream_off, read_only) = (1 << 61, 1 << 62);
    for (had, works) in [(0, false), (1, true)] {
        let rig = Rig::enabled(SmmuConfig::default());
        let root = rig.stage1(STREAM, 1);
        let context = rig.get(STRTAB + 64 * 8) & !0x3f;
        let mut words = cd_words(Granule::K4, 25, root.base, 1);
        cd::HAD0.put(&mut words, had);
        rig.put_words(context, &words);
        rig.map(&root, 0, RAM, 3, RW);
        let place = rig.descriptor(&root, 0, 1);
        rig.put(place, rig.get(place) | read_only);
        let write = rig.access(STREAM, 0, Access::Write);
        assert_eq!(write.is_ok(), works, "HAD0 {had}");
        assert_eq!(rig.gpa(STREAM, 0), Some(RAM));
    }
    let rig = Rig::nested();
    rig.enable();
    let root = rig.root_at(Granule::K4, 40, 1);
    rig.map(&root, RAM, RAM, 3, S2_RW);
    let place = rig.descriptor(&root, RAM, 2);
    rig.put(place, rig.get(place) | stream_off | read_only);
    let mut words = RawSte::ZERO;
    put_stage2(&mut words, Granule::K4, &root, 1);
    rig.set_ste(STREAM, &words);
    assert!(rig.access(STREAM, RAM, Access::Write).is_ok());
}

#[test]
fn addresses_outside_of_the_halves_fault() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.stage1(STREAM, 1);
    rig.map(&root, 0, RAM, 3, RW);
    for iova in [1 << 39, 1 << 63, u64::MAX, u64::MAX << 39] {
        assert!(rig.read(STREAM, iova).is_err());
        assert_eq!(rig.event_numbers(), [F_TRANSLATION], "{iova:#x}");
    }
}

#[test]
fn both_halves_translate() {
    let rig = Rig::enabled(SmmuConfig::default());
    let (low, high) = (rig.root(Granule::K4, 39), rig.root(Granule::K16, 47));
    rig.map(&low, 0x1000, RAM, 3, RW);
    rig.map(&high, 0x4000, RAM + 0x8000, 3, RW);
    let context = rig.alloc(64);
    let mut words = cd_words(Granule::K4, 25, low.base, 1);
    let fields = [
        (cd::EPD1, 0),
        (cd::TG1, 1),
        (cd::T1SZ, 17),
        (cd::TTB1, high.base >> 4),
        (cd::TBI1, 1),
    ];
    put(&mut words, &fields);
    rig.put_words(context, &words);
    rig.set_ste(STREAM, &ste_stage1(context));
    assert_eq!(rig.gpa(STREAM, 0x1000), Some(RAM));
    let top = u64::MAX << 47 | 0x4123;
    assert_eq!(rig.gpa(STREAM, top), Some(RAM + 0x8123));
    // TBI1 only.
    assert_eq!(
        rig.gpa(STREAM, top & !(0xff << 56) | 0x12 << 56),
        Some(RAM + 0x8123)
    );
    assert_eq!(rig.gpa(STREAM, 0x12 << 56 | 0x1000), None);
    // EPD0: cached translations may hit until an invalidation.
    cd::EPD0.put(&mut words, 1);
    rig.put_words(context, &words);
    rig.cfgi_ste(STREAM);
    rig.complete(&[command(cmd::op::TLBI_NH_ALL, &[])]);
    rig.events();
    assert_eq!(rig.gpa(STREAM, 0x1000), None);
    assert_eq!(rig.event_numbers(), [F_TRANSLATION]);
    assert_eq!(rig.gpa(STREAM, top), Some(RAM + 0x8123));
}

/// A nested stream. Its stage 1 table, CD and pages are in RAM that stage 2
/// maps one to one, page by page.
fn nested(rig: &Rig) -> (Root, Root) {
    let one = rig.stage1(STREAM, 1);
    rig.map(&one, 0x5000, RAM, 3, RW);
    let two = rig.root_at(Granule::K4, 40, 1);
    for page in (RAM..rig.alloc(4096) + 0x4_0000).step_by(4096) {
        rig.map(&two, page, page, 3, S2_RW);
    }
    let mut words = rig.raw(STRTAB + 64 * 8);
    put_stage2(&mut words, Granule::K4, &two, 3);
    rig.set_ste(STREAM, &words);
    (one, two)
}

#[test]
fn faults_of_stage_2_report_their_class() {
    for (name, class, expected) in [
        ("CD fetch", 0, F_TRANSLATION),
        ("stage 1 table", 1, F_PERMISSION),
        ("input", 2, F_ACCESS),
    ] {
        let rig = Rig::nested();
        rig.enable();
        let (one, two) = nested(&rig);
        let context = rig.get(STRTAB + 64 * 8) & 0xffff_ffff_ffc0;
        let (ipa, descriptor) = match class {
            0 => (context, 0),
            1 => (rig.descriptor(&one, 0x5000, 3), 1 << 10 | 0xf << 2 | 3),
            _ => (RAM, RAM | (S2_RW & !(1 << 10)) | 2),
        };
        let place = rig.descriptor(&two, ipa, 3);
        rig.put(place, descriptor);
        assert!(rig.access(STREAM, 0x5123, Access::Write).is_err());
        let events = rig.events();
        assert_eq!(events[0].number(), expected, "{name}");
        assert_eq!(events[0].get(event::S2), 1, "{name}");
        assert_eq!(events[0].get(event::CLASS), class, "{name}");
        assert_eq!(
            events[0].get(event::IPA),
            (ipa + if class == 2 { 0x123 } else { 0 }) >> 12
        );
        assert_eq!(events[0].get(event::INPUT), 0x5123);
        if class == 1 {
            assert_eq!(events[0].get(event::TTRNW), 1);
        }
    }
}

#[test]
fn walks_into_device_memory_fault_with_s2ptw() {
    for protect in [0, 1] {
        let rig = Rig::nested();
        rig.enable();
        let (one, two) = nested(&rig);
        let table = rig.descriptor(&one, 0x5000, 3);
        let place = rig.descriptor(&two, table, 3);
        // Device-nGnRE.
        rig.put(place, rig.get(place) & !(0xf << 2) | 1 << 2);
        let mut words = rig.raw(STRTAB + 64 * 8);
        ste::S2PTW.put(&mut words, protect);
        rig.set_ste(STREAM, &words);
        assert_eq!(rig.gpa(STREAM, 0x5000).is_none(), protect == 1);
        let expected = if protect == 1 {
            vec![F_PERMISSION]
        } else {
            vec![]
        };
        assert_eq!(rig.event_numbers(), expected);
    }
}

#[test]
fn faults_are_recorded_if_r_is_set() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.stage1(STREAM, 1);
    let context = rig.get(STRTAB + 64 * 8) & !0x3f;
    let mut words = cd_words(Granule::K4, 25, root.base, 1);
    cd::R.put(&mut words, 0);
    rig.put_words(context, &words);
    assert!(rig.read(STREAM, 0).is_err());
    assert_eq!(rig.event_numbers(), NONE);
    // Other faults are always recorded.
    let place = rig.descriptor(&root, 0, 2);
    rig.put(place, NOWHERE | 3);
    assert!(rig.read(STREAM, 0).is_err());
    assert_eq!(rig.event_numbers(), [F_WALK_EABT]);
}

#[test]
fn lookup_records_no_event() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.stage1(STREAM, 1);
    let context = rig.get(STRTAB + 64 * 8) & !0x3f;
    let mut words = cd_words(Granule::K4, 25, root.base, 1);
    put(&mut words, &[(cd::HA, 1), (cd::HD, 1)]);
    rig.put_words(context, &words);
    rig.map(&root, 0, RAM, 3, RO & !(1 << 10) | 1 << 51);
    let before = rig.get(rig.descriptor(&root, 0, 3));
    for access in [Access::Read, Access::Write] {
        for iova in [0, 0x9000] {
            let request = Request::untranslated(STREAM, Iova(iova), access);
            assert!(rig.smmu.lookup(&request).is_err());
        }
    }
    assert_eq!(rig.event_numbers(), NONE);
    assert_eq!(rig.get(rig.descriptor(&root, 0, 3)), before);
    assert_eq!(rig.smmu.stats().events_dropped, 0);
}

#[test]
fn stream_state_reports_the_configuration() {
    let rig = Rig::nested();
    assert_eq!(rig.smmu.stream_state(STREAM), None);
    let (_space, _) = rig.listen(STREAM, &[]);
    let mode = |rig: &Rig| rig.smmu.stream_state(STREAM).unwrap().mode;
    assert_eq!(mode(&rig), StreamMode::Bypass);
    rig.smmu.write(reg::GBPA, gbpa::ABORT | gbpa::UPDATE);
    assert_eq!(mode(&rig), StreamMode::Abort);
    rig.enable();
    assert_eq!(mode(&rig), StreamMode::Invalid);
    let (one, _) = nested(&rig);
    rig.cfgi_ste(STREAM);
    let state = rig.smmu.stream_state(STREAM).unwrap();
    assert_eq!(state.mode, StreamMode::Nested);
    assert_eq!((state.asid, state.vmid), (Some(1), Some(3)));
    rig.map(&one, 0x8000, RAM + 0x1000, 3, RO);
    let (mappings, next) = rig.smmu.mappings(STREAM, Iova(0), 10);
    let shown: Vec<_> = mappings
        .iter()
        .map(|m| (m.iova.first().0, m.iova.extent() + 1, m.gpa.0, m.perm))
        .collect();
    assert_eq!(
        shown,
        [
            (0x5000, 0x1000, RAM, Perm::READ_WRITE),
            (0x8000, 0x1000, RAM + 0x1000, Perm::READ),
        ]
    );
    assert_eq!(next, None);
    let (mappings, next) = rig.smmu.mappings(STREAM, Iova(0), 1);
    assert_eq!((mappings.len(), next), (1, Some(Iova(0x6000))));
    let (mappings, _) = rig.smmu.mappings(STREAM, Iova(0x6000), 9);
    assert_eq!(mappings.len(), 1);
}
