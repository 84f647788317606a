//! Stalled transactions whose records find the event queue full (IHI 0070
//! §3.12.2, §7.2.1, §7.4).

use super::super::descriptor::Granule;
use super::super::spec::{cd, command as cmd, command::RawCommand, event, queue, reg};
use super::super::*;
use super::rig::*;
use crate::{Access, Iova};

const EVENTQ_ENTRIES: u64 = 1 << EVENTQ_LOG2;
/// Address of the access that stalls while the queue is full.
const LAST: u64 = 0x9_0000;
const F_TRANSLATION: u64 = 0x10;
const F_PERMISSION: u64 = 0x13;

fn prod(rig: &Rig) -> u32 {
    rig.smmu.read(reg::PAGE_1 + reg::EVENTQ_PROD)
}

fn context(rig: &Rig) -> u64 {
    rig.get(STRTAB + 64 * u64::from(STREAM.0)) & !0x3f
}

fn set_stalling(rig: &Rig, root: &Root, stalling: bool) {
    let mut words = cd_words(Granule::K4, 25, root.base, 1);
    cd::S.put(&mut words, u64::from(stalling));
    rig.put_words(context(rig), &words);
}

/// An SMMU whose event queue is full of stalled reads, and a write to
/// [`LAST`] that is stalled without a record.
fn full() -> (Rig, Root) {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.stage1(STREAM, 1);
    set_stalling(&rig, &root, true);
    for page in 0..EVENTQ_ENTRIES {
        assert!(rig.read(STREAM, page << 12).is_err());
    }
    assert!(rig.access(STREAM, LAST, Access::Write).is_err());
    (rig, root)
}

fn resumed(rig: &Rig) -> Vec<(StreamId, Iova, Resume)> {
    rig.wires.resumed.lock().unwrap().clone()
}

fn tlbi() -> RawCommand {
    command(cmd::op::TLBI_NSNH_ALL, &[])
}

#[test]
fn unwritten_record_of_a_stall_is_no_overflow() {
    let (rig, _) = full();
    assert_eq!(prod(&rig) & queue::OVERFLOW, 0);
    // A write of CONS that frees no entry retries, and loses nothing.
    rig.smmu.write(reg::PAGE_1 + reg::EVENTQ_CONS, 0);
    rig.complete(&[tlbi()]);
    assert_eq!(prod(&rig) & queue::OVERFLOW, 0);
    assert_eq!(rig.smmu.stats().events_dropped, 0);
    assert_eq!(resumed(&rig), []);
    assert_eq!(rig.events().len() as u64, EVENTQ_ENTRIES);
    let late = rig.events();
    assert_eq!(late.len(), 1, "recorded once there is room");
    assert_eq!(late[0].number(), F_TRANSLATION);
    assert_eq!(late[0].get(event::INPUT), LAST);
    assert_eq!(late[0].get(event::STALL), 1);
    assert_eq!(resumed(&rig), []);
}

#[test]
fn stall_without_record_is_retried_when_there_is_room() {
    let (rig, root) = full();
    rig.map(&root, LAST, RAM, 3, RW);
    rig.complete(&[tlbi()]);
    assert_eq!(rig.events().len() as u64, EVENTQ_ENTRIES);
    assert_eq!(resumed(&rig), [(STREAM, Iova(LAST), Resume::Retry)]);
    assert_eq!(rig.events().len(), 0, "the mapping is there: no record");
}

#[test]
fn record_has_the_result_of_the_retry() {
    let (rig, root) = full();
    rig.map(&root, LAST, RAM, 3, RO);
    rig.complete(&[tlbi()]);
    assert_eq!(rig.events().len() as u64, EVENTQ_ENTRIES);
    let late = rig.events();
    assert_eq!(late.len(), 1);
    assert_eq!(late[0].number(), F_PERMISSION);
    assert_eq!(late[0].get(event::STALL), 1);
    assert_eq!(resumed(&rig), []);
    // The STAG of the record is valid: the driver can terminate it.
    let resume = command(
        cmd::op::RESUME,
        &[
            (cmd::SID, u64::from(STREAM.0)),
            (cmd::STAG, late[0].get(event::STAG)),
        ],
    );
    rig.complete(&[resume]);
    assert_eq!(resumed(&rig), [(STREAM, Iova(LAST), Resume::Terminate)]);
}

#[test]
fn retry_under_a_terminating_configuration_ends_the_transaction() {
    let (rig, root) = full();
    set_stalling(&rig, &root, false);
    rig.cfgi_ste(STREAM);
    assert_eq!(resumed(&rig), []);
    assert_eq!(rig.events().len() as u64, EVENTQ_ENTRIES);
    let late = rig.events();
    assert_eq!(late.len(), 1);
    assert_eq!(late[0].get(event::STALL), 0);
    assert_eq!(late[0].get(event::INPUT), LAST);
    assert_eq!(resumed(&rig), [(STREAM, Iova(LAST), Resume::Terminate)]);
}
