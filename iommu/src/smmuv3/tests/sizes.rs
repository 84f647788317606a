//! Sizes beyond what the identification registers offer (IHI 0070 §6.3.24 to
//! §6.3.37).

use super::super::spec::{
    Raw as _, command::RawCommand, cr0, event, event::RawEvent, idr1, queue, reg, ste::RawSte,
    strtab,
};
use super::super::*;
use super::rig::*;
use crate::{Access, Iova};

const C_BAD_STREAMID: u64 = 0x02;
const F_STE_FETCH: u64 = 0x03;

fn rig_with(pri: bool) -> Rig {
    Rig::new(SmmuConfig {
        ats: pri,
        pri,
        ..SmmuConfig::default()
    })
}

const CMDQ: u64 = RAM + 0x200_0000;
const EVENTQ: u64 = RAM + 0x210_0000;
const PRIQ: u64 = RAM + 0x220_0000;

/// The base registers of the queues, each with the shift of its size in IDR1
/// and the address of the queue.
const QUEUES: [(u64, u32, u64); 3] = [
    (reg::CMDQ_BASE, idr1::CMDQS, CMDQ),
    (reg::EVENTQ_BASE, idr1::EVENTQS, EVENTQ),
    (reg::PRIQ_BASE, idr1::PRIQS, PRIQ),
];

fn offered(rig: &Rig, shift: u32) -> u32 {
    rig.smmu.read(reg::IDR1) >> shift & 0x1f
}

/// An SMMU whose queue registers have 2^`beyond` times the offered sizes, and
/// base addresses that are not aligned to the offered size.
fn oversized(beyond: u32) -> Rig {
    let rig = rig_with(true);
    rig.enable();
    rig.smmu.write(reg::CR0, 0);
    for (base, shift, address) in QUEUES {
        let log2size = u64::from((offered(&rig, shift) + beyond).min(31));
        rig.write64(base, address | 0x20 | log2size);
        assert_eq!(
            u64::from(rig.smmu.read(base)) & 0x1f,
            log2size,
            "as written"
        );
    }
    rig.smmu.write(
        reg::CR0,
        cr0::SMMUEN | cr0::CMDQEN | cr0::EVENTQEN | cr0::PRIQEN,
    );
    rig
}

#[test]
fn command_queue_wraps_at_the_offered_size() {
    for beyond in [0, 1, 31] {
        let rig = oversized(beyond);
        let entries = 1 << offered(&rig, idr1::CMDQS);
        for entry in 0..u64::from(entries) {
            rig.put_words(CMDQ + RawCommand::SIZE * entry, &sync());
        }
        rig.smmu.write(reg::CMDQ_PROD, entries);
        assert_eq!(rig.smmu.read(reg::CMDQ_CONS), entries);
        // The second time around, in two steps.
        rig.smmu.write(reg::CMDQ_PROD, 2 * entries - 1);
        rig.smmu.write(reg::CMDQ_PROD, 0);
        assert_eq!(rig.smmu.read(reg::CMDQ_CONS), 0, "{beyond} beyond");
        assert_eq!(rig.smmu.read(reg::GERROR), 0);
    }
}

#[test]
fn event_queue_is_full_at_the_offered_size() {
    for beyond in [0, 1, 31] {
        let rig = oversized(beyond);
        rig.stage1(STREAM, 1);
        let entries = 1 << offered(&rig, idr1::EVENTQS);
        let prod = || rig.smmu.read(reg::PAGE_1 + reg::EVENTQ_PROD);
        for page in 0..u64::from(entries) {
            assert!(rig.read(STREAM, page << 12).is_err());
        }
        assert_eq!(prod(), entries);
        assert!(rig.read(STREAM, 0).is_err());
        assert_eq!(prod(), entries | queue::OVERFLOW, "{beyond} beyond");
        let first = rig.get(EVENTQ + 16);
        assert_eq!(first, 0, "the first record is at the aligned base");
        assert_eq!(rig.get(EVENTQ + RawEvent::SIZE + 16), 0x1000);
    }
}

#[test]
fn pri_queue_is_full_at_the_offered_size() {
    for beyond in [0, 1, 31] {
        let rig = oversized(beyond);
        let entries = 1 << offered(&rig, idr1::PRIQS);
        let request = PageRequest {
            stream: STREAM,
            substream: None,
            iova: Iova(0x5000),
            read: true,
            write: false,
            last: true,
            group: 1,
        };
        for _ in 0..entries {
            assert_eq!(rig.smmu.page_request(&request), None);
        }
        let automatic = Some(PageResponse::Success);
        assert_eq!(rig.smmu.page_request(&request), automatic);
        let prod = rig.smmu.read(reg::PAGE_1 + reg::PRIQ_PROD);
        assert_eq!(prod, entries | queue::OVERFLOW, "{beyond} beyond");
    }
}

/// An SMMU with a stream table of 2^`log2size` entries in the registers, whose
/// base is not aligned to that size.
fn with_table(log2size: u32, format: u32) -> Rig {
    let rig = Rig::enabled(SmmuConfig::default());
    rig.smmu.write(reg::CR0, 0);
    rig.write64(reg::STRTAB_BASE, STRTAB);
    rig.smmu.write(reg::STRTAB_BASE_CFG, format | log2size);
    rig.smmu.write(reg::CR0, cr0::SMMUEN | cr0::EVENTQEN);
    rig
}

fn bypass() -> RawSte {
    let mut words = RawSte::ZERO;
    spec::ste::V.put(&mut words, 1);
    spec::ste::CONFIG.put(&mut words, 0b100);
    words
}

#[test]
fn linear_stream_table_is_aligned_by_the_literal_size() {
    // 2^14 entries are 1 MiB, 2^20 are 64 MiB: the table starts at RAM.
    for log2size in [14, 16, 17, 20] {
        let rig = with_table(log2size, 0);
        rig.put_words(RAM + 64 * u64::from(STREAM.0), &bypass());
        assert_eq!(rig.gpa(STREAM, RAM), Some(RAM), "2^{log2size} entries");
    }
    // The range of StreamIDs is that of IDR1.
    let rig = with_table(20, 0);
    assert!(rig.read(StreamId(1 << 16), 0).is_err());
    assert_eq!(rig.event_numbers(), [C_BAD_STREAMID]);
    // Beyond 52 bits the base is 0, which is not RAM here.
    for log2size in [46, 58, 63] {
        let rig = with_table(log2size, 0);
        assert!(rig.read(STREAM, 0).is_err());
        let events = rig.events();
        assert_eq!(events[0].number(), F_STE_FETCH);
        let place = events[0].get(event::FETCH) << 3;
        assert_eq!(place, 64 * u64::from(STREAM.0));
    }
}

#[test]
fn two_level_stream_table_is_aligned_by_the_literal_size() {
    // 2^(24 - 8) descriptors are 512 KiB: the table starts at RAM.
    let two_levels = strtab::FMT_2_LEVEL << strtab::FMT | 8 << strtab::SPLIT;
    let rig = with_table(24, two_levels);
    let leaf = rig.alloc(64 << 8);
    rig.put(RAM, leaf | 9);
    rig.put_words(leaf + 64 * u64::from(STREAM.0), &bypass());
    assert_eq!(rig.gpa(STREAM, RAM), Some(RAM));
    for log2size in [60, 63] {
        let rig = with_table(log2size, two_levels);
        let request = Request::untranslated(STREAM, Iova(0), Access::Read);
        assert!(rig.smmu.translate(&request).is_err());
        assert_eq!(rig.event_numbers(), [F_STE_FETCH]);
    }
}
