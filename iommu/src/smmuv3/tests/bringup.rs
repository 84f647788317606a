//! The order in which Linux 6.12 brings an SMMUv3 up
//! (`drivers/iommu/arm/arm-smmu-v3`), register by register.

use super::super::spec::{
    command as cmd, command::RawCommand, cr0, cr2, gbpa, idr0, idr1, idr5, irq_ctrl, queue, reg,
    strtab,
};
use super::super::*;
use super::rig::*;
use crate::{Access, FaultReason};

const QUEUES: u64 = RAM + 0x20_0000;
const TABLE: u64 = RAM + 0x30_0000;

/// Writes a control register and polls its ACK register.
fn write_sync(rig: &Rig, value: u32, register: u64, ack: u64) {
    rig.smmu.write(register, value);
    assert_eq!(rig.smmu.read(ack), value);
}

struct Driver<'a> {
    rig: &'a Rig,
    prod: u32,
    log2: u32,
}

impl Driver<'_> {
    fn issue(&mut self, words: RawCommand) {
        let index = self.prod & ((1 << self.log2) - 1);
        self.rig.put_words(QUEUES + 16 * u64::from(index), &words);
        self.prod = (self.prod + 1) & ((2 << self.log2) - 1);
    }

    /// With MSI polling: CMD_SYNC overwrites its own first word with zero.
    fn issue_with_sync(&mut self, words: RawCommand) {
        self.issue(words);
        let index = self.prod & ((1 << self.log2) - 1);
        let place = QUEUES + 16 * u64::from(index);
        self.issue(command(
            cmd::op::SYNC,
            &[(cmd::CS, 1), (cmd::MSI_ADDRESS, place >> 2)],
        ));
        self.rig.smmu.write(reg::CMDQ_PROD, self.prod);
        assert_eq!(self.rig.get(place) as u32, 0, "CMD_SYNC is not complete");
    }
}

#[test]
fn linux_initializes_it_and_translates() {
    let rig = Rig::new(SmmuConfig::default());
    let smmu = &rig.smmu;

    // arm_smmu_device_hw_probe
    let value = smmu.read(reg::IDR0);
    assert_eq!(value >> 27 & 3, 1, "2-level stream tables");
    assert_eq!(value >> 21 & 3, 2, "little-endian tables");
    assert_ne!(value & idr0::CD2L, 0);
    assert_ne!(value & idr0::COHACC, 0);
    assert_ne!(value & idr0::MSI, 0);
    assert_eq!(value >> 24 & 3, 0, "stall and terminate");
    assert_eq!(value >> 2 & 3, 2, "AArch64 tables");
    assert_eq!(value & (idr0::S1P | idr0::S2P), idr0::S1P);
    let value = smmu.read(reg::IDR1);
    assert_eq!(value >> 28, 0, "nothing preset, no extended queues");
    assert!(value >> idr1::CMDQS & 0x1f > 6);
    assert_eq!(value & 0x3f, 16);
    assert_ne!(smmu.read(reg::IDR3) & 1 << 10, 0, "range invalidation");
    let value = smmu.read(reg::IDR5);
    assert_eq!(value & 7, 5, "48 bits");
    assert_eq!(value & idr5::GRANULES, idr5::GRANULES);

    // Devices work before a driver is bound.
    assert_eq!(rig.gpa(STREAM, RAM + 5), Some(RAM + 5));

    // arm_smmu_device_reset
    assert_eq!(smmu.read(reg::CR0) & cr0::SMMUEN, 0);
    write_sync(&rig, 0, reg::CR0, reg::CR0ACK);
    smmu.write(reg::CR1, 0xd75);
    smmu.write(reg::CR2, cr2::PTM | cr2::RECINVSID);
    let (split, bits) = (8, 16);
    rig.write64(reg::STRTAB_BASE, TABLE | 1 << 62);
    smmu.write(
        reg::STRTAB_BASE_CFG,
        strtab::FMT_2_LEVEL << strtab::FMT | split << strtab::SPLIT | bits,
    );
    let log2 = smmu.read(reg::IDR1) >> idr1::CMDQS & 0x1f;
    rig.write64(reg::CMDQ_BASE, QUEUES | u64::from(log2) | 1 << 62);
    smmu.write(reg::CMDQ_PROD, 0);
    smmu.write(reg::CMDQ_CONS, 0);
    let mut enables = cr0::CMDQEN;
    write_sync(&rig, enables, reg::CR0, reg::CR0ACK);
    let mut driver = Driver {
        rig: &rig,
        prod: 0,
        log2,
    };
    driver.issue_with_sync(command(cmd::op::CFGI_STE_RANGE, &[(cmd::RANGE, 31)]));
    driver.issue_with_sync(command(cmd::op::TLBI_NSNH_ALL, &[]));
    let events = QUEUES + 0x10_0000;
    let event_log2 = smmu.read(reg::IDR1) >> idr1::EVENTQS & 0x1f;
    rig.write64(reg::EVENTQ_BASE, events | u64::from(event_log2) | 1 << 62);
    smmu.write(reg::PAGE_1 + reg::EVENTQ_PROD, 0);
    smmu.write(reg::PAGE_1 + reg::EVENTQ_CONS, 0);
    enables |= cr0::EVENTQEN;
    write_sync(&rig, enables, reg::CR0, reg::CR0ACK);
    write_sync(&rig, 0, reg::IRQ_CTRL, reg::IRQ_CTRLACK);
    let irqs = irq_ctrl::EVENTQ | irq_ctrl::GERROR;
    write_sync(&rig, irqs, reg::IRQ_CTRL, reg::IRQ_CTRLACK);
    enables |= cr0::SMMUEN;
    write_sync(&rig, enables, reg::CR0, reg::CR0ACK);
    assert!(smmu.is_enabled());

    // arm_smmu_init_sid_strtab, arm_smmu_install_ste_for_dev
    let root = rig.stage1(STREAM, 1);
    let stes = rig.alloc(64 << split);
    let ste = STRTAB + 64 * u64::from(STREAM.0);
    for word in 0..8 {
        rig.put(
            stes + 64 * u64::from(STREAM.0) + 8 * word,
            rig.get(ste + 8 * word),
        );
    }
    rig.put(TABLE, stes | u64::from(split + 1));
    let sid = (cmd::SID, u64::from(STREAM.0));
    driver.issue_with_sync(command(cmd::op::CFGI_STE, &[sid, (cmd::RANGE, 1)]));
    driver.issue_with_sync(command(cmd::op::TLBI_NH_ASID, &[(cmd::ASID, 1)]));

    // dma_map_page, the device's access, dma_unmap_page
    let iova = 0xffff_f000 & 0x7f_ffff_ffff;
    rig.map(&root, iova, RAM + 0x5000, 3, RW);
    assert_eq!(rig.gpa(STREAM, iova + 0x10), Some(RAM + 0x5010));
    rig.unmap(&root, iova, 3);
    driver.issue_with_sync(command(
        cmd::op::TLBI_NH_VA,
        &[
            (cmd::ASID, 1),
            (cmd::ADDRESS, iova >> 12),
            (cmd::TG, 1),
            (cmd::TTL, 3),
        ],
    ));
    assert!(rig.access(STREAM, iova, Access::Write).is_err());
    assert_eq!(smmu.read(reg::PAGE_1 + reg::EVENTQ_PROD) & queue::INDEX, 1);
    assert_eq!(
        rig.wires.pulses.lock().unwrap().last(),
        Some(&SmmuLine::Eventq)
    );
    assert_eq!(rig.get(events) & 0xff, 0x10);
}

#[test]
fn gbpa_selects_bypass_or_abort_while_smmuen_is_0() {
    let rig = Rig::new(SmmuConfig::default());
    let (_space, sink) = rig.listen(STREAM, &[crate::NotifierEvents::UNMAP]);
    let whole = rig.read(STREAM, RAM).unwrap();
    assert_eq!(
        whole.iova.size(),
        Some(RAM_SIZE as u64),
        "all of RAM at once"
    );
    rig.smmu.write(reg::GBPA, gbpa::ABORT);
    assert!(rig.read(STREAM, RAM).is_ok(), "no update without UPDATE");
    rig.smmu.write(reg::GBPA, gbpa::ABORT | gbpa::UPDATE);
    assert_eq!(rig.smmu.read(reg::GBPA) & gbpa::UPDATE, 0);
    let fault = rig.read(STREAM, RAM).unwrap_err();
    assert_eq!(fault.reason, FaultReason::Aborted);
    assert_eq!(sink.take(), [IovaRange::ALL]);
    // An address beyond the OAS.
    rig.smmu.write(reg::GBPA, gbpa::UPDATE);
    assert!(rig.read(STREAM, 1 << 48).is_err());
}

#[test]
fn enabling_and_disabling_flush_every_stream() {
    let rig = Rig::new(SmmuConfig::default());
    let (_a, one) = rig.listen(STREAM, &[crate::NotifierEvents::UNMAP]);
    let (_b, two) = rig.listen(OTHER, &[crate::NotifierEvents::UNMAP]);
    rig.enable();
    assert_eq!(
        (one.take(), two.take()),
        (vec![IovaRange::ALL], vec![IovaRange::ALL])
    );
    // Other bits of CR0 concern no stream.
    let value = rig.smmu.read(reg::CR0);
    rig.smmu.write(reg::CR0, value & !cr0::EVENTQEN);
    assert_eq!(one.take(), []);
    rig.smmu.write(reg::CR0, 0);
    assert_eq!(
        (one.take(), two.take()),
        (vec![IovaRange::ALL], vec![IovaRange::ALL])
    );
}

#[test]
fn guarded_registers_keep_their_value() {
    let rig = Rig::enabled(SmmuConfig::default());
    for (offset, value) in [
        (reg::STRTAB_BASE, 0x1000),
        (reg::STRTAB_BASE_CFG, 3),
        (reg::CMDQ_BASE, 0x2000),
        (reg::CMDQ_CONS, 1),
        (reg::EVENTQ_BASE, 0x3000),
        (reg::EVENTQ_PROD, 1),
        (reg::CR2, 0),
        (reg::EVENTQ_IRQ_CFG0, 0x4000),
        (reg::GERROR_IRQ_CFG1, 5),
        (reg::IDR0, 0),
        (reg::GERROR, 1),
        (reg::CR0ACK, 0),
    ] {
        let before = rig.smmu.read(offset);
        rig.smmu.write(offset, value);
        assert_eq!(rig.smmu.read(offset), before, "{offset:#x}");
    }
    // Features that IDR0 does not offer cannot be enabled.
    let value = rig.smmu.read(reg::CR0);
    rig.smmu.write(reg::CR0, value | cr0::ATSCHK | cr0::VMW);
    assert_eq!(rig.smmu.read(reg::CR0), value & !cr0::PRIQEN);
}
