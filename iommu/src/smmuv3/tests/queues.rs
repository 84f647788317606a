//! The event and PRI queues, stalls and the SMMU's own interrupts (IHI 0070
//! §3.12.2, §3.18, §7.2, §7.4, §8.1).

use std::sync::atomic::Ordering;

use super::super::descriptor::Granule;
use super::super::spec::{
    cd, command as cmd, command::RawCommand, cr0, event, gerror, irq_ctrl, pri, queue, reg,
};
use super::super::*;
use super::rig::*;
use crate::{Access, Iova};

const EVENTQ_ENTRIES: u64 = 1 << EVENTQ_LOG2;

fn prod(rig: &Rig) -> u32 {
    rig.smmu.read(reg::PAGE_1 + reg::EVENTQ_PROD)
}

/// A stream with an empty table.
fn faulting(rig: &Rig) -> Root {
    rig.stage1(STREAM, 1)
}

#[test]
fn a_full_event_queue_overflows_until_it_is_acknowledged() {
    let rig = Rig::enabled(SmmuConfig::default());
    faulting(&rig);
    for page in 0..EVENTQ_ENTRIES {
        let _ = rig.read(STREAM, page << 12);
    }
    assert_eq!(prod(&rig) & queue::OVERFLOW, 0, "full is not overflowing");
    for page in 0..3 {
        let _ = rig.read(STREAM, page << 12);
        assert_ne!(prod(&rig) & queue::OVERFLOW, 0, "toggled once");
    }
    assert_eq!(rig.smmu.stats().events_dropped, 3);
    assert_eq!(rig.smmu.read(reg::GERROR), 0, "no global error");
    // events() acknowledges.
    let seen = rig.events();
    assert_eq!(seen.len() as u64, EVENTQ_ENTRIES);
    assert!(
        seen.iter()
            .enumerate()
            .all(|(n, e)| e.get(event::INPUT) == (n as u64) << 12)
    );
    let _ = rig.read(STREAM, 0x9000);
    assert_eq!(rig.events().len(), 1);
    // The next overflow toggles it back.
    for page in 0..=EVENTQ_ENTRIES {
        let _ = rig.read(STREAM, page << 12);
    }
    assert_eq!(prod(&rig) & queue::OVERFLOW, 0);
    assert!(prod(&rig) < 2 << EVENTQ_LOG2, "the index wraps");
}

#[test]
fn records_are_dropped_while_the_queue_is_disabled() {
    let rig = Rig::enabled(SmmuConfig::default());
    faulting(&rig);
    rig.smmu.write(reg::CR0, cr0::SMMUEN);
    let _ = rig.read(STREAM, 0);
    assert_eq!(prod(&rig), 0);
    assert_eq!(rig.smmu.stats().events_dropped, 1);
}

#[test]
fn an_event_queue_outside_of_ram_is_a_global_error() {
    let rig = Rig::enabled(SmmuConfig::default());
    faulting(&rig);
    rig.smmu.write(reg::CR0, cr0::SMMUEN);
    rig.write64(reg::EVENTQ_BASE, 0x2000 | 3);
    rig.smmu.write(reg::CR0, cr0::SMMUEN | cr0::EVENTQEN);
    let _ = rig.read(STREAM, 0);
    let _ = rig.read(STREAM, 0);
    assert_eq!(rig.smmu.read(reg::GERROR), gerror::EVENTQ_ABT);
    assert_eq!(prod(&rig), 0, "not moved");
    assert_eq!(
        rig.wires.pulses.lock().unwrap().as_slice(),
        [SmmuLine::Gerror]
    );
}

#[test]
fn the_event_queues_interrupt_is_a_wire_or_a_message() {
    let rig = Rig::enabled(SmmuConfig::default());
    faulting(&rig);
    let _ = rig.read(STREAM, 0);
    assert_eq!(
        rig.wires.pulses.lock().unwrap().as_slice(),
        [SmmuLine::Eventq]
    );
    // A message, to RAM and to a doorbell.
    rig.smmu.write(reg::IRQ_CTRL, 0);
    assert_eq!(rig.smmu.read(reg::IRQ_CTRLACK), 0);
    let _ = rig.read(STREAM, 0);
    assert_eq!(rig.wires.pulses.lock().unwrap().len(), 1, "disabled");
    let place = rig.alloc(64);
    rig.write64(reg::EVENTQ_IRQ_CFG0, place);
    rig.smmu.write(reg::EVENTQ_IRQ_CFG1, 0x77);
    rig.smmu.write(reg::IRQ_CTRL, irq_ctrl::EVENTQ);
    let _ = rig.read(STREAM, 0);
    assert_eq!(rig.get(place), 0x77);
    rig.smmu.write(reg::IRQ_CTRL, 0);
    rig.write64(reg::EVENTQ_IRQ_CFG0, 0x808_0040);
    rig.write64(reg::GERROR_IRQ_CFG0, 0x808_0044);
    rig.smmu
        .write(reg::IRQ_CTRL, irq_ctrl::EVENTQ | irq_ctrl::GERROR);
    let _ = rig.read(STREAM, 0);
    assert_eq!(
        rig.wires.messages.lock().unwrap().as_slice(),
        [(Gpa(0x808_0040), 0x77)]
    );
    assert_eq!(rig.wires.pulses.lock().unwrap().len(), 1);
    // Without a doorbell both messages are lost, and nothing else changes.
    rig.wires.without_doorbells.store(true, Ordering::Relaxed);
    let _ = rig.read(STREAM, 0);
    let lost = gerror::MSI_EVENTQ_ABT | gerror::MSI_GERROR_ABT;
    assert_eq!(rig.smmu.read(reg::GERROR), lost);
}

fn stalling(rig: &Rig) -> Root {
    let root = rig.stage1(STREAM, 1);
    let context = rig.get(STRTAB + 64 * 8) & !0x3f;
    let mut words = cd_words(Granule::K4, 25, root.base, 1);
    cd::S.put(&mut words, 1);
    rig.put_words(context, &words);
    root
}

fn resume(stream: StreamId, stag: u64, retry: u64) -> RawCommand {
    command(
        cmd::op::RESUME,
        &[
            (cmd::SID, u64::from(stream.0)),
            (cmd::STAG, stag),
            (cmd::RESUME_RETRY, retry),
        ],
    )
}

#[test]
fn a_stalled_transaction_waits_for_its_resume() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = stalling(&rig);
    assert!(rig.read(STREAM, 0x1000).is_err());
    assert!(
        rig.read(STREAM, 0x1008).is_err(),
        "the same page: no second record"
    );
    let events = rig.events();
    assert_eq!(events.len(), 1);
    assert_eq!(events[0].get(event::STALL), 1);
    let stag = events[0].get(event::STAG);
    // Commands for another stream or STAG have no effect.
    rig.complete(&[resume(OTHER, stag, 1), resume(STREAM, stag ^ 0x80, 1)]);
    assert!(rig.wires.resumed.lock().unwrap().is_empty());
    rig.map(&root, 0x1000, RAM, 3, RW);
    rig.complete(&[resume(STREAM, stag, 1), resume(STREAM, stag, 1)]);
    let resumed = rig.wires.resumed.lock().unwrap().clone();
    assert_eq!(resumed, [(STREAM, Iova(0x1000), Resume::Retry)]);
    assert_eq!(rig.gpa(STREAM, 0x1000), Some(RAM));
}

#[test]
fn stall_term_and_disabling_end_all_stalled_transactions() {
    let rig = Rig::enabled(SmmuConfig::default());
    stalling(&rig);
    for page in 1..=3 {
        assert!(rig.read(STREAM, page << 12).is_err());
    }
    let sid = |stream: StreamId| (cmd::SID, u64::from(stream.0));
    rig.complete(&[command(cmd::op::STALL_TERM, &[sid(OTHER)])]);
    assert!(rig.wires.resumed.lock().unwrap().is_empty());
    rig.complete(&[command(cmd::op::STALL_TERM, &[sid(STREAM)])]);
    assert_eq!(rig.wires.resumed.lock().unwrap().len(), 3);
    assert!(rig.read(STREAM, 0x4000).is_err());
    rig.smmu.write(reg::CR0, cr0::CMDQEN);
    let last = rig.wires.resumed.lock().unwrap().last().copied();
    assert_eq!(last, Some((STREAM, Iova(0x4000), Resume::Terminate)));
}

#[test]
fn stalls_are_bounded_and_their_records_never_lost() {
    let rig = Rig::enabled(SmmuConfig::default());
    stalling(&rig);
    let most = u64::from(registers::STALL_MAX);
    for page in 1..=most + 5 {
        assert!(rig.read(STREAM, page << 12).is_err());
    }
    // The queue has 8 entries; the rest follows as the driver consumes them.
    let mut stags = Vec::new();
    loop {
        let events = rig.events();
        if events.is_empty() {
            break;
        }
        stags.extend(events.iter().map(|event| event.get(event::STAG)));
    }
    assert_eq!(stags.len() as u64, most);
    stags.sort_unstable();
    stags.dedup();
    assert_eq!(stags.len() as u64, most, "each has its own tag");
}

#[test]
fn stage_2_stalls_by_its_own_bit() {
    let rig = Rig::nested();
    rig.enable();
    let root = rig.root_at(Granule::K4, 40, 1);
    let mut words = <spec::ste::RawSte as spec::Raw>::ZERO;
    put_stage2(&mut words, Granule::K4, &root, 1);
    spec::ste::S2S.put(&mut words, 1);
    rig.set_ste(STREAM, &words);
    assert!(rig.read(STREAM, RAM).is_err());
    let events = rig.events();
    assert_eq!(
        (events[0].get(event::STALL), events[0].get(event::S2)),
        (1, 1)
    );
}

fn with_pri() -> Rig {
    Rig::enabled(SmmuConfig {
        ats: true,
        pri: true,
        ..SmmuConfig::default()
    })
}

fn page_request(last: bool, group: u16) -> PageRequest {
    PageRequest {
        stream: STREAM,
        substream: Some(3),
        iova: Iova(0x5123),
        read: true,
        write: false,
        last,
        group,
    }
}

#[test]
fn page_requests_reach_the_driver_and_its_answer_the_function() {
    let rig = with_pri();
    assert_eq!(rig.smmu.page_request(&page_request(true, 5)), None);
    let record = rig.pri_record(0);
    for (field, value) in [
        (pri::SID, 8),
        (pri::SSID, 3),
        (pri::SSV, 1),
        (pri::READ, 1),
        (pri::WRITE, 0),
        (pri::LAST, 1),
        (pri::PRG_INDEX, 5),
        (pri::ADDRESS, 5),
    ] {
        assert_eq!(field.of(&record), value);
    }
    assert_eq!(
        rig.wires.pulses.lock().unwrap().as_slice(),
        [SmmuLine::Priq]
    );
    let answer = command(
        cmd::op::PRI_RESP,
        &[
            (cmd::SID, 8),
            (cmd::SSV, 1),
            (cmd::SSID, 3),
            (cmd::PRG_INDEX, 5),
            (cmd::PRI_RESP, 2),
        ],
    );
    rig.complete(&[answer]);
    let responses = rig.wires.responses.lock().unwrap().clone();
    assert_eq!(responses, [(STREAM, Some(3), 5, PageResponse::Success)]);
}

#[test]
fn an_overflowing_pri_queue_responds_automatically() {
    let rig = with_pri();
    for group in 0..1 << PRIQ_LOG2 {
        assert_eq!(rig.smmu.page_request(&page_request(true, group)), None);
    }
    let success = Some(PageResponse::Success);
    assert_eq!(rig.smmu.page_request(&page_request(true, 9)), success);
    assert_eq!(rig.smmu.page_request(&page_request(false, 9)), None);
    let prod = rig.smmu.read(reg::PAGE_1 + reg::PRIQ_PROD);
    assert_ne!(prod & queue::OVERFLOW, 0);
    // Space without an acknowledgement is not sufficient (§8.1).
    rig.smmu.write(reg::PAGE_1 + reg::PRIQ_CONS, 2);
    assert_eq!(rig.smmu.page_request(&page_request(true, 9)), success);
    rig.smmu
        .write(reg::PAGE_1 + reg::PRIQ_CONS, 2 | queue::OVERFLOW);
    assert_eq!(rig.smmu.page_request(&page_request(true, 9)), None);
    // Disabled: the response is a failure, after which a function stops.
    rig.smmu.write(reg::CR0, cr0::PRIQEN);
    let failure = Some(PageResponse::Failure);
    assert_eq!(rig.smmu.page_request(&page_request(true, 9)), failure);
}

#[test]
fn a_snapshot_restores_registers_and_stalls() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = stalling(&rig);
    rig.map(&root, 0x8000, RAM, 3, RW);
    assert!(rig.read(STREAM, 0x1000).is_err());
    let saved = rig.smmu.save();
    let wires = Arc::new(Wires::default());
    let copy = Smmu::new(SmmuConfig::default(), rig.ram.clone(), wires.clone());
    copy.restore(&saved);
    assert_eq!(copy.save(), saved);
    let request = Request::untranslated(STREAM, Iova(0x8000), Access::Read);
    assert_eq!(copy.translate(&request).unwrap().gpa, Gpa(RAM));
    // A second access to the stalled page writes no record.
    let request = Request::untranslated(STREAM, Iova(0x1000), Access::Read);
    assert!(copy.translate(&request).is_err());
    assert_eq!(copy.read(reg::PAGE_1 + reg::EVENTQ_PROD), 1);
}

#[test]
fn a_reset_goes_back_to_bypass() {
    let rig = Rig::enabled(SmmuConfig::default());
    faulting(&rig);
    let (_space, sink) = rig.listen(STREAM, &[NotifierEvents::UNMAP]);
    assert!(rig.read(STREAM, RAM).is_err());
    rig.smmu.reset();
    assert_eq!(rig.gpa(STREAM, RAM), Some(RAM));
    assert_eq!(sink.take(), [IovaRange::ALL]);
    assert_eq!(rig.smmu.read(reg::CR0ACK), 0);
    assert_eq!(rig.smmu.read(reg::PAGE_1 + reg::EVENTQ_PROD), 0);
}
