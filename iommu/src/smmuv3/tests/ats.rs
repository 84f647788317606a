//! ATS: conditions for a device IOTLB, its invalidation, and changes of the
//! enable bit and of EATS (IHI 0070 §3.9.1, §4.5.1).

use super::super::spec::{
    Raw as _, command as cmd, command::RawCommand, cr0, cr2, event, reg, ste, ste::RawSte,
};
use super::super::*;
use super::rig::*;
use crate::{Access, AddressSpace, Iova, NotifierEvents, RequestKind};

const F_BAD_ATS_TREQ: u64 = 0x05;
const C_BAD_STREAMID: u64 = 0x02;
const C_BAD_STE: u64 = 0x04;
const DEVIOTLB: NotifierEvents = NotifierEvents::DEVIOTLB_UNMAP;
const UNMAP: NotifierEvents = NotifierEvents::UNMAP;

fn config() -> SmmuConfig {
    SmmuConfig {
        ats: true,
        ..SmmuConfig::default()
    }
}

fn set_eats(rig: &Rig, stream: StreamId, eats: u64) {
    let place = STRTAB + 64 * u64::from(stream.0) + 8;
    rig.put(place, rig.get(place) & !(3 << 28) | eats << 28);
    rig.cfgi_ste(stream);
}

/// A stream with page 0x1000 mapped and a notifier for the events of vhost.
fn vhost(rig: &Rig) -> (Root, AddressSpace, Arc<Sink>) {
    let root = rig.stage1(STREAM, 1);
    rig.map(&root, 0x1000, RAM, 3, RW);
    let (space, sink) = rig.listen(STREAM, &[DEVIOTLB, UNMAP]);
    (root, space, sink)
}

fn tlbi() -> RawCommand {
    command(cmd::op::TLBI_NH_VA, &[(cmd::ASID, 1), (cmd::ADDRESS, 1)])
}

fn atc_inv(stream: StreamId, fields: &[(spec::Field<RawCommand>, u64)]) -> RawCommand {
    let mut words = command(
        cmd::op::ATC_INV,
        &[(cmd::SID, u64::from(stream.0)), (cmd::ADDRESS, 1)],
    );
    for (field, value) in fields {
        field.put(&mut words, *value);
    }
    words
}

fn page(first: u64) -> IovaRange {
    IovaRange::from_len(Iova(first), 0x1000).unwrap()
}

fn treq(rig: &Rig, stream: StreamId, iova: u64, access: Access) -> Result<Mapping, Fault> {
    rig.smmu.translate(&Request {
        kind: RequestKind::AtsTranslation,
        ..Request::untranslated(stream, Iova(iova), access)
    })
}

#[test]
fn map_events_are_always_refused() {
    let rig = Rig::enabled(config());
    let (_space, sink) = rig.listen(STREAM, &[NotifierEvents::MAP | UNMAP, UNMAP]);
    assert_eq!(sink.outcomes.lock().unwrap().as_slice(), [UNMAP]);
}

#[test]
fn the_registration_follows_the_enable_bit_and_eats() {
    let rig = Rig::enabled(config());
    let (_, _space, sink) = vhost(&rig);
    let outcomes = |sink: &Sink| sink.outcomes.lock().unwrap().clone();
    assert_eq!(outcomes(&sink), [UNMAP], "the fallback, at first");
    // Each condition alone is not sufficient.
    rig.smmu.set_ats_enabled(STREAM, true);
    assert_eq!(outcomes(&sink), [UNMAP]);
    set_eats(&rig, STREAM, 1);
    assert_eq!(outcomes(&sink), [UNMAP, DEVIOTLB]);
    rig.smmu.set_ats_enabled(STREAM, false);
    assert_eq!(outcomes(&sink), [UNMAP, DEVIOTLB, UNMAP]);
    rig.smmu.set_ats_enabled(STREAM, true);
    sink.take();
    // Each change unmaps everything in between.
    set_eats(&rig, STREAM, 0);
    assert!(sink.take().contains(&IovaRange::ALL));
    set_eats(&rig, STREAM, 1);
    rig.smmu.write(reg::CR0, cr0::CMDQEN);
    assert_eq!(outcomes(&sink).last(), Some(&UNMAP), "SMMUEN");
    assert_eq!(outcomes(&sink).len(), 7);
    // Nothing changes: nothing is negotiated.
    rig.smmu.set_ats_enabled(STREAM, true);
    rig.smmu.set_ats_enabled(OTHER, true);
    assert_eq!(outcomes(&sink).len(), 7);
}

#[test]
fn a_later_registration_uses_ats() {
    let rig = Rig::enabled(config());
    let (_, space, _) = vhost(&rig);
    rig.smmu.set_ats_enabled(STREAM, true);
    set_eats(&rig, STREAM, 1);
    let late = Arc::new(Sink::default());
    space.region().unwrap().register(crate::IommuNotifier {
        acceptable: vec![DEVIOTLB, UNMAP],
        range: IovaRange::ALL,
        sink: late.clone(),
    });
    assert_eq!(late.outcomes.lock().unwrap().as_slice(), [DEVIOTLB]);
}

#[test]
fn tlbi_notifies_without_ats_and_atc_inv_with_it() {
    let rig = Rig::enabled(config());
    let (_, space, sink) = vhost(&rig);
    let touch = || {
        space
            .region()
            .unwrap()
            .enter()
            .translate(Iova(0x1000), Access::Read)
    };
    touch().unwrap();
    rig.complete(&[tlbi(), atc_inv(STREAM, &[])]);
    assert_eq!(sink.take(), [page(0x1000)], "ATS off: once, by the TLBI");
    rig.smmu.set_ats_enabled(STREAM, true);
    set_eats(&rig, STREAM, 1);
    sink.take();
    let stats = space.region().unwrap().stats();
    touch().unwrap();
    rig.complete(&[tlbi()]);
    assert_eq!(sink.take(), [], "ATS on: a TLBI says nothing to it");
    let now = space.region().unwrap().stats();
    assert_eq!(
        now.invalidations,
        stats.invalidations + 1,
        "but to the emulated devices"
    );
    rig.complete(&[atc_inv(OTHER, &[])]);
    assert_eq!(sink.take(), []);
    rig.complete(&[atc_inv(STREAM, &[])]);
    assert_eq!(sink.take(), [page(0x1000)]);
}

#[test]
fn atc_inv_names_an_aligned_power_of_two() {
    let rig = Rig::enabled(config());
    let (_, _space, sink) = vhost(&rig);
    rig.smmu.set_ats_enabled(STREAM, true);
    set_eats(&rig, STREAM, 1);
    sink.take();
    for (size, expected) in [
        (0, page(0x1000)),
        (4, IovaRange::from_len(Iova(0), 0x1_0000).unwrap()),
        (51, IovaRange::block(Iova(0), 63)),
        (52, IovaRange::ALL),
        (63, IovaRange::ALL),
    ] {
        rig.complete(&[atc_inv(STREAM, &[(cmd::ATC_SIZE, size)])]);
        assert_eq!(sink.take(), [expected], "size {size}");
    }
    // With a SubstreamID it does not select translations without one.
    rig.complete(&[atc_inv(STREAM, &[(cmd::SSV, 1), (cmd::SSID, 1)])]);
    assert_eq!(sink.take(), []);
    // Ignored while SMMUEN is 0 (§4.5.1).
    rig.smmu.write(reg::CR0, cr0::CMDQEN);
    sink.take();
    rig.complete(&[atc_inv(STREAM, &[])]);
    assert_eq!(sink.take(), []);
}

#[test]
fn translation_requests_are_answered_by_the_rules() {
    let rig = Rig::enabled(config());
    let root = rig.stage1(STREAM, 1);
    rig.map(&root, 0x1000, RAM, 3, RO);
    // §3.9.1.2: refused, with an event of its own.
    assert!(treq(&rig, STREAM, 0x1000, Access::Write).is_err());
    let events = rig.events();
    assert_eq!(events[0].number(), F_BAD_ATS_TREQ);
    assert_eq!(events[0].get(event::INPUT), 0x1000);
    set_eats(&rig, STREAM, 1);
    let mapping = treq(&rig, STREAM, 0x1000, Access::Read).unwrap();
    assert_eq!(mapping.gpa, Gpa(RAM));
    // Faults of translation are reported to the function only (§3.9.1.2).
    assert!(treq(&rig, STREAM, 0x9000, Access::Read).is_err());
    assert!(treq(&rig, STREAM, 0x1000, Access::Write).is_err());
    assert_eq!(rig.event_numbers(), Vec::<u64>::new());
    // Bypass refuses ATS with an event; abort records none.
    for (encoding, expected) in [(4, vec![F_BAD_ATS_TREQ]), (0, vec![])] {
        let mut words = RawSte::ZERO;
        ste::V.put(&mut words, 1);
        ste::CONFIG.put(&mut words, encoding);
        ste::EATS.put(&mut words, 1);
        rig.set_ste(OTHER, &words);
        rig.cfgi_ste(OTHER);
        assert!(treq(&rig, OTHER, RAM, Access::Read).is_err());
        assert_eq!(rig.event_numbers(), expected);
    }
    rig.smmu.write(reg::CR0, cr0::EVENTQEN);
    assert!(treq(&rig, STREAM, 0x1000, Access::Read).is_err());
    assert_eq!(rig.event_numbers(), [F_BAD_ATS_TREQ]);
}

#[test]
fn configuration_errors_of_translation_requests_are_recorded_on_request() {
    for (bits, expected) in [
        (cr2::RECINVSID, vec![]),
        (cr2::REC_CFG_ATS, vec![C_BAD_STE]),
        (
            cr2::RECINVSID | cr2::REC_CFG_ATS,
            vec![C_BAD_STE, C_BAD_STREAMID],
        ),
    ] {
        let rig = Rig::enabled(config());
        rig.smmu.write(reg::CR0, 0);
        rig.smmu.write(reg::CR2, bits);
        rig.smmu.write(reg::CR0, cr0::EVENTQEN | cr0::SMMUEN);
        assert!(treq(&rig, STREAM, 0, Access::Read).is_err());
        assert!(treq(&rig, StreamId(0x100), 0, Access::Read).is_err());
        assert_eq!(rig.event_numbers(), expected);
    }
}
