//! Commands that are illegal, and how completion is signalled (IHI 0070 §4,
//! §7.1).

use std::sync::atomic::Ordering;

use super::super::spec::{
    Field, Raw as _, command as cmd, command::RawCommand, cr0, gerror, queue, reg,
};
use super::super::*;
use super::rig::*;

const ILL: u32 = 1;
const ABT: u32 = 2;

fn error(rig: &Rig) -> u32 {
    rig.smmu.read(reg::CMDQ_CONS) >> queue::ERR & 0x7f
}

fn has_stopped(rig: &Rig) -> bool {
    (rig.smmu.read(reg::GERROR) ^ rig.smmu.read(reg::GERRORN)) & gerror::CMDQ != 0
}

/// Name, offered stages, opcode, fields, and whether the command is illegal.
type Case = (
    &'static str,
    Stages,
    u64,
    &'static [(Field<RawCommand>, u64)],
    bool,
);

const CASES: &[Case] = {
    use cmd::op;
    const ONE: Stages = Stages::One;
    const TWO: Stages = Stages::Two;
    const BOTH: Stages = Stages::Nested;
    &[
        ("opcode 0", BOTH, 0, &[], true),
        ("reserved opcode", BOTH, 0x08, &[], true),
        ("EL3_ALL", BOTH, 0x18, &[], true),
        ("EL3_VA", BOTH, 0x1a, &[], true),
        ("S_EL2_ALL", BOTH, 0x50, &[], true),
        ("CFGI_VMS_PIDM", BOTH, 0x07, &[], true),
        ("implementation defined", BOTH, 0x80, &[], true),
        ("secure STE", BOTH, op::CFGI_STE, &[(cmd::SSEC, 1)], true),
        ("secure CD", BOTH, op::CFGI_CD, &[(cmd::SSEC, 1)], true),
        ("CFGI_CD", ONE, op::CFGI_CD, &[], false),
        ("CFGI_CD without stage 1", TWO, op::CFGI_CD, &[], true),
        (
            "CFGI_CD_ALL without stage 1",
            TWO,
            op::CFGI_CD_ALL,
            &[],
            true,
        ),
        ("NH_ALL without stage 1", TWO, op::TLBI_NH_ALL, &[], true),
        ("NH_VA without stage 1", TWO, op::TLBI_NH_VA, &[], true),
        (
            "S12_VMALL without stage 2",
            ONE,
            op::TLBI_S12_VMALL,
            &[],
            true,
        ),
        ("S2_IPA without stage 2", ONE, op::TLBI_S2_IPA, &[], true),
        ("S2_IPA", TWO, op::TLBI_S2_IPA, &[], false),
        (
            "NSNH_ALL without stage 1",
            TWO,
            op::TLBI_NSNH_ALL,
            &[],
            false,
        ),
        (
            "NSNH_ALL without stage 2",
            ONE,
            op::TLBI_NSNH_ALL,
            &[],
            false,
        ),
        ("EL2_ALL without Hyp", ONE, op::TLBI_EL2_ALL, &[], true),
        ("EL2_ASID", BOTH, op::TLBI_EL2_ASID, &[], false),
        (
            "granule without range or level",
            ONE,
            op::TLBI_NH_VA,
            &[(cmd::TG, 1)],
            true,
        ),
        (
            "granule and level",
            ONE,
            op::TLBI_NH_VA,
            &[(cmd::TG, 1), (cmd::TTL, 2)],
            false,
        ),
        (
            "16 KiB at level 1",
            ONE,
            op::TLBI_NH_VA,
            &[(cmd::TG, 2), (cmd::TTL, 1)],
            true,
        ),
        (
            "granule and range",
            ONE,
            op::TLBI_NH_VAA,
            &[(cmd::TG, 3), (cmd::NUM, 1)],
            false,
        ),
        (
            "largest range",
            ONE,
            op::TLBI_NH_VAA,
            &[
                (cmd::TG, 3),
                (cmd::NUM, 31),
                (cmd::SCALE, 31),
                (cmd::ADDRESS, u64::MAX),
            ],
            false,
        ),
        ("ATC_INV without ATS", BOTH, op::ATC_INV, &[], true),
        ("PRI_RESP without PRI", BOTH, op::PRI_RESP, &[], true),
        (
            "RESUME of nothing",
            BOTH,
            op::RESUME,
            &[(cmd::STAG, 1)],
            false,
        ),
        ("STALL_TERM", BOTH, op::STALL_TERM, &[], false),
        ("PREFETCH_ADDR", BOTH, op::PREFETCH_ADDR, &[], false),
        ("SYNC", BOTH, op::SYNC, &[(cmd::CS, 2)], false),
        (
            "SYNC with a reserved signal",
            BOTH,
            op::SYNC,
            &[(cmd::CS, 3)],
            true,
        ),
    ]
};

#[test]
fn every_illegal_command_is_a_cerror_ill() {
    for (name, stages, opcode, fields, illegal) in CASES {
        let rig = Rig::enabled(SmmuConfig {
            stages: *stages,
            ..SmmuConfig::default()
        });
        // Two legal commands, the one under test, one legal command.
        rig.issue(&[sync(), sync(), command(*opcode, fields), sync()]);
        let cons = rig.smmu.read(reg::CMDQ_CONS) & queue::INDEX;
        assert_eq!(cons, if *illegal { 2 } else { 4 }, "{name}");
        assert_eq!(has_stopped(&rig), *illegal, "{name}");
        let pulses = rig.wires.pulses.lock().unwrap().clone();
        if *illegal {
            assert_eq!(error(&rig), ILL, "{name}");
            assert_eq!(pulses, [SmmuLine::Gerror], "{name}");
        } else {
            assert_eq!(pulses, [], "{name}");
        }
    }
}

#[test]
fn the_queue_continues_when_its_error_is_acknowledged() {
    let rig = Rig::enabled(SmmuConfig::default());
    rig.issue(&[sync(), RawCommand::ZERO, sync(), sync()]);
    assert!(has_stopped(&rig));
    // More commands do not restart the queue.
    rig.issue(&[sync()]);
    assert_eq!(rig.smmu.read(reg::CMDQ_CONS) & queue::INDEX, 1);
    // As Linux does: turn the command into a CMD_SYNC, acknowledge.
    rig.put_words(rig.command_address(1), &sync());
    rig.smmu.write(reg::GERRORN, rig.smmu.read(reg::GERROR));
    assert!(!has_stopped(&rig));
    assert_eq!(rig.smmu.read(reg::CMDQ_CONS) & queue::INDEX, 5);
    // The next error toggles the flag back.
    rig.issue(&[RawCommand::ZERO]);
    assert!(has_stopped(&rig));
    assert_eq!(rig.smmu.read(reg::GERROR) & gerror::CMDQ, 0);
}

#[test]
fn a_queue_outside_of_ram_is_a_cerror_abt() {
    let rig = Rig::enabled(SmmuConfig::default());
    rig.smmu.write(reg::CR0, 0);
    rig.write64(reg::CMDQ_BASE, 0x1_0000 | 4);
    rig.smmu.write(reg::CMDQ_PROD, 1);
    rig.smmu.write(reg::CR0, cr0::CMDQEN);
    assert!(has_stopped(&rig));
    assert_eq!(error(&rig), ABT);
    assert_eq!(rig.smmu.read(reg::CMDQ_CONS) & queue::INDEX, 0);
}

#[test]
fn enabling_the_queue_executes_waiting_commands() {
    let rig = Rig::enabled(SmmuConfig::default());
    rig.smmu.write(reg::CR0, 0);
    rig.issue(&[sync(), sync()]);
    assert_eq!(rig.smmu.read(reg::CMDQ_CONS), 0);
    rig.smmu.write(reg::CR0, cr0::CMDQEN);
    assert_eq!(rig.smmu.read(reg::CMDQ_CONS), 2);
}

#[test]
fn the_index_wraps() {
    let rig = Rig::enabled(SmmuConfig::default());
    for _ in 0..700 {
        rig.complete(&[]);
    }
    assert_eq!(rig.smmu.read(reg::CMDQ_CONS), 700 % 512);
    let stats = rig.smmu.stats();
    assert_eq!(stats.commands[&CommandKind::Sync], 700);
}

#[test]
fn a_hostile_index_costs_one_queue_at_most() {
    let rig = Rig::enabled(SmmuConfig::default());
    for index in 0..256 {
        rig.put_words(rig.command_address(index), &sync());
    }
    rig.smmu.write(reg::CMDQ_PROD, u32::MAX);
    let consumed = rig.smmu.stats().commands[&CommandKind::Sync];
    assert!(consumed < 512, "{consumed}");
}

#[test]
fn sync_signals_by_wire_and_by_message() {
    let signal = |address: u64| {
        command(
            cmd::op::SYNC,
            &[
                (cmd::CS, 1),
                (cmd::MSI_ADDRESS, address >> 2),
                (cmd::MSI_DATA, 0x1234_5678),
            ],
        )
    };
    let rig = Rig::enabled(SmmuConfig::default());
    let place = rig.alloc(64);
    rig.put(place, u64::MAX);
    // To RAM: a 32-bit write that the driver polls.
    rig.issue(&[signal(place + 4)]);
    assert_eq!(rig.get(place), 0x1234_5678_ffff_ffff);
    assert_eq!(
        rig.wires.pulses.lock().unwrap().as_slice(),
        [SmmuLine::CmdSync]
    );
    assert!(rig.wires.messages.lock().unwrap().is_empty());
    // To a doorbell.
    rig.issue(&[signal(0x808_0040)]);
    let messages = rig.wires.messages.lock().unwrap().clone();
    assert_eq!(messages, [(Gpa(0x808_0040), 0x1234_5678)]);
    // Address 0: by wire only.
    rig.issue(&[signal(0)]);
    assert_eq!(rig.wires.messages.lock().unwrap().len(), 1);
    assert_eq!(rig.wires.pulses.lock().unwrap().len(), 3);
    // To an address that is neither RAM nor a doorbell.
    rig.wires.without_doorbells.store(true, Ordering::Relaxed);
    rig.issue(&[signal(0x900_0000)]);
    assert_eq!(rig.smmu.read(reg::GERROR), gerror::MSI_CMDQ_ABT);
    assert_eq!(
        rig.smmu.read(reg::CMDQ_CONS),
        4,
        "it is consumed all the same"
    );
}

#[test]
fn an_interrupted_queue_resumes_at_cons() {
    let rig = Rig::enabled(SmmuConfig::default());
    let start = rig.smmu.read(reg::CMDQ_CONS);
    *rig.wires.interrupted_after.lock().unwrap() = Some(2);
    let message = RAM + 0x8000;
    let signal = [
        (cmd::CS, 1),
        (cmd::MSI_ADDRESS, message >> 2),
        (cmd::MSI_DATA, 7),
    ];
    let nop = command(cmd::op::TLBI_NSNH_ALL, &[]);
    rig.issue(&[nop, sync(), nop, command(cmd::op::SYNC, &signal)]);
    assert_eq!(rig.smmu.read(reg::CMDQ_CONS), start + 2);
    // A write of another vCPU does not continue the queue either.
    rig.issue(&[nop]);
    rig.smmu.resume();
    assert_eq!(rig.smmu.read(reg::CMDQ_CONS), start + 2);
    let data = || rig.ram.read_obj::<u32>(Gpa(message).into()).unwrap();
    assert_eq!(data(), 0, "a CMD_SYNC completed that was not reached");
    *rig.wires.interrupted_after.lock().unwrap() = None;
    rig.smmu.resume();
    assert_eq!(rig.smmu.read(reg::CMDQ_CONS), start + 5);
    assert_eq!(data(), 7);
}
