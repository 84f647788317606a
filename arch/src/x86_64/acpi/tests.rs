//! The tables are read back the way an operating system does: from the RSDP.

use super::*;
use crate::platform::{LegacyDevice, Smmu, SmmuGsis};

const BASE: u64 = layout::ACPI.base;

fn platform() -> Platform {
    Platform {
        cpus: 2,
        caches: Vec::new(),
        ram: layout::ram_ranges(128 << 20).unwrap(),
        cmdline: String::new(),
        seed: [0; 32],
        serial: layout::SERIAL,
        rtc: layout::RTC,
        pci: None,
        iommu: None,
    }
}

fn with_pci() -> Platform {
    let pci = PciHost {
        ecam: layout::PCI_ECAM,
        last_bus: layout::PCI_LAST_BUS,
        mmio32: layout::PCI_MMIO32,
        mmio64: layout::PCI_MMIO64,
    };
    Platform {
        pci: Some(pci),
        ..platform()
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(bytes[at..at + 2].try_into().unwrap())
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn sum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0, |sum: u8, byte| sum.wrapping_add(*byte))
}

/// All tables of a machine, checked as they are found.
struct Tables {
    blob: Vec<u8>,
}

impl Tables {
    fn of(platform: &Platform) -> Self {
        let this = Self {
            blob: tables(platform, layout::ACPI).unwrap(),
        };
        assert_eq!(&this.blob[..8], b"RSD PTR ");
        assert_eq!((sum(&this.blob[..20]), sum(&this.blob[..36])), (0, 0));
        this
    }

    fn at(&self, address: u64) -> &[u8] {
        let at = usize::try_from(address - BASE).unwrap();
        let len = usize::try_from(u32_at(&self.blob, at + 4)).unwrap();
        let table = &self.blob[at..at + len];
        assert_eq!(sum(table), 0, "checksum of {:?}", &table[..4]);
        table
    }

    fn find(&self, signature: &[u8; 4]) -> Option<&[u8]> {
        let xsdt = self.at(u64_at(&self.blob, 24));
        assert_eq!(&xsdt[..4], b"XSDT");
        let entries = xsdt[36..]
            .chunks_exact(8)
            .map(|entry| self.at(u64_at(entry, 0)));
        entries.into_iter().find(|table| &table[..4] == signature)
    }

    fn dsdt(&self) -> &[u8] {
        let dsdt = self.at(u64_at(self.find(b"FACP").unwrap(), 140));
        assert_eq!(&dsdt[..4], b"DSDT");
        dsdt
    }
}

/// Type and body of each entry of a list of (type, length, body).
fn entries(mut bytes: &[u8]) -> Vec<(u8, &[u8])> {
    let mut entries = Vec::new();
    while let [kind, len, ..] = *bytes {
        entries.push((kind, &bytes[..usize::from(len)]));
        bytes = &bytes[usize::from(len)..];
    }
    entries
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack
        .windows(needle.len())
        .any(|window| window == needle)
}

/// A compressed EISA ID, ACPI 6.5 §19.3.4.
fn eisa(id: &str) -> [u8; 4] {
    let bytes = id.as_bytes();
    let letter = |i: usize| u32::from(bytes[i] - 0x40);
    let digits = u32::from_str_radix(&id[3..], 16).unwrap();
    (letter(0) << 26 | letter(1) << 21 | letter(2) << 16 | digits).to_be_bytes()
}

#[test]
fn the_machine_is_hardware_reduced_with_sleep_and_reset_registers() {
    let tables = Tables::of(&platform());
    let fadt = tables.find(b"FACP").unwrap();
    let ports = layout::POWER.unwrap();
    let flags = u32_at(fadt, 112);
    assert_eq!(flags & (1 << 20 | 1 << 10), 1 << 20 | 1 << 10);
    let register = |at: usize| (fadt[at], fadt[at + 1], u64_at(fadt, at + 4));
    assert_eq!(register(116), (1, 8, u64::from(ports.reset)));
    assert_eq!(fadt[128], PowerPorts::RESET_VALUE);
    assert_eq!(register(244), (1, 8, u64::from(ports.sleep_control)));
    assert_eq!(register(256), (1, 8, u64::from(ports.sleep_status)));
    assert_eq!(u32_at(fadt, 36), 0, "no FACS");
}

#[test]
fn boot_flags_name_the_missing_devices() {
    let boot_arch = |platform: &Platform| u16_at(Tables::of(platform).find(b"FACP").unwrap(), 109);
    // Neither legacy devices nor an 8042; a clock, but no VGA.
    assert_eq!(boot_arch(&platform()) & 0b10_0111, 0b100);
}

#[test]
fn every_cpu_has_an_interrupt_controller_entry() {
    let tables = Tables::of(&Platform {
        cpus: 257,
        ..platform()
    });
    let madt = tables.find(b"APIC").unwrap();
    assert_eq!(u64::from(u32_at(madt, 36)), layout::LAPIC.base);
    let entries = entries(&madt[44..]);
    let small: Vec<u8> = entries
        .iter()
        .filter(|e| e.0 == 0)
        .map(|e| e.1[3])
        .collect();
    assert_eq!(small, (0..=254).collect::<Vec<u8>>());
    let large: Vec<(u32, u32, u32)> = entries
        .iter()
        .filter(|e| e.0 == 9)
        .map(|e| (u32_at(e.1, 4), u32_at(e.1, 8), u32_at(e.1, 12)))
        .collect();
    assert_eq!(large, [(255, 1, 255), (256, 1, 256)]);
    let ioapic = entries.iter().find(|e| e.0 == 1).unwrap().1;
    assert_eq!(
        (u64::from(u32_at(ioapic, 4)), u32_at(ioapic, 8)),
        (layout::IOAPIC.base, 0)
    );
}

#[test]
fn the_namespace_has_the_devices_of_the_platform_and_no_others() {
    let names = ["PNP0501", "PNP0B00", "PNP0A08", "PNP0C02"];
    let present = |platform: &Platform| {
        let tables = Tables::of(platform);
        names.map(|name| contains(tables.dsdt(), &eisa(name)))
    };
    assert_eq!(present(&platform()), [true, true, false, false]);
    assert_eq!(present(&with_pci()), [true, true, true, true]);
}

#[test]
fn the_serial_port_has_its_ports_and_an_edge_interrupt() {
    let tables = Tables::of(&platform());
    // IO descriptor: 16-bit decode, 0x3F8 to 0x3F8, 8 ports.
    assert!(contains(tables.dsdt(), &[0x47, 1, 0xF8, 3, 0xF8, 3, 0, 8]));
    // Extended interrupt: consumer, edge, active high, exclusive, GSI 4.
    assert!(contains(
        tables.dsdt(),
        &[0x89, 6, 0, 0b0011, 1, 4, 0, 0, 0]
    ));
}

#[test]
fn soft_off_has_the_sleep_type_the_power_device_expects() {
    let tables = Tables::of(&platform());
    // Name(_S5_, Package(4) { 5, 0, 0, 0 })
    let package = [8, b'_', b'S', b'5', b'_', 0x12, 7, 4, 0x0A, 5];
    let dsdt = tables.dsdt();
    let at = dsdt
        .windows(4)
        .position(|window| window == b"_S5_")
        .unwrap();
    assert_eq!(dsdt[at + 4], 0x12);
    assert_eq!(dsdt[at + 6], 4);
    assert_eq!(dsdt[at + 7..at + 9], package[8..]);
}

#[test]
fn pci_has_configuration_space_and_three_windows() {
    let tables = Tables::of(&with_pci());
    let mcfg = tables.find(b"MCFG").unwrap();
    assert_eq!(u64_at(mcfg, 44), layout::PCI_ECAM.base);
    assert_eq!(
        (u16_at(mcfg, 52), mcfg[54], mcfg[55]),
        (0, 0, layout::PCI_LAST_BUS)
    );
    let dsdt = tables.dsdt();
    let dword = |value: u64| u32::try_from(value).unwrap().to_le_bytes();
    let low = layout::PCI_MMIO32;
    assert!(contains(
        dsdt,
        &[dword(low.base), dword(low.last())].concat()
    ));
    let high = layout::PCI_MMIO64;
    let window = [high.base.to_le_bytes(), high.last().to_le_bytes()].concat();
    assert!(contains(dsdt, &window));
    assert!(Tables::of(&platform()).find(b"MCFG").is_none());
}

#[test]
fn viot_names_the_iommu_and_the_functions_behind_it() {
    let iommu = IommuNode {
        model: NodeModel::VirtioPci { bdf: 0x08 },
        endpoints: vec![0x00..=0x07, 0x10..=0xF7],
    };
    let tables = Tables::of(&Platform {
        iommu: Some(iommu),
        ..with_pci()
    });
    let viot = tables.find(b"VIOT").unwrap();
    let (count, first) = (u16_at(viot, 36), usize::from(u16_at(viot, 38)));
    assert_eq!((count, first), (3, 48));
    let iommu = &viot[first..first + 16];
    assert_eq!(
        (iommu[0], u16_at(iommu, 2), u16_at(iommu, 6)),
        (3, 16, 0x08)
    );
    let ranges: Vec<_> = viot[first + 16..]
        .chunks_exact(24)
        .map(|node| {
            assert_eq!((node[0], u16_at(node, 2)), (1, 24));
            let output = usize::from(u16_at(node, 16));
            assert_eq!(output, first, "translated by the virtio-iommu");
            (u32_at(node, 4), u16_at(node, 12), u16_at(node, 14))
        })
        .collect();
    assert_eq!(ranges, [(0x00, 0x00, 0x07), (0x10, 0x10, 0xF7)]);
}

#[test]
fn an_smmu_is_not_described_by_these_tables() {
    let model = NodeModel::Smmuv3 {
        smmu: Smmu {
            regs: Range::new(0, 0x2_0000),
            gsis: SmmuGsis {
                eventq: 0,
                priq: 1,
                cmdq_sync: 2,
                gerror: 3,
            },
        },
        ats: false,
        coherent: true,
    };
    let iommu = IommuNode {
        model,
        endpoints: vec![0..=0xFFFF],
    };
    let tables = Tables::of(&Platform {
        iommu: Some(iommu),
        ..with_pci()
    });
    assert!(tables.find(b"VIOT").is_none());
}

#[test]
fn tables_that_do_not_fit_are_an_error() {
    let error = tables(&platform(), Range::new(BASE, 256)).unwrap_err();
    assert!(matches!(error, Error::Tables { max: 256, .. }), "{error}");
}

#[test]
fn a_device_beyond_the_io_ports_is_left_out() {
    let odd = LegacyDevice {
        regs: Range::new(0x1_0000, 8),
        ..layout::SERIAL
    };
    let tables = Tables::of(&Platform {
        serial: odd,
        ..platform()
    });
    assert!(
        !contains(tables.dsdt(), &eisa("PNP0501")),
        "a port beyond 16 bits is left out"
    );
}
