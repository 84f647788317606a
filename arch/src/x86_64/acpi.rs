//! ACPI tables of a hardware-reduced machine (ACPI 6.5 §4.1, §5.2).

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::viot::{PciDevice, PciRange, VIOT, VirtIoPciIommu};
use acpi_tables::xsdt::XSDT;

use crate::Error;
use crate::platform::{IommuNode, NodeModel, PciHost, Platform, PowerPorts, Range};
use crate::x86_64::{dsdt, layout};

const OEM_ID: [u8; 6] = *b"PORTCL";
const OEM_TABLE_ID: [u8; 8] = *b"PORTCLIS";
const OEM_REVISION: u32 = 1;

/// Bits of IAPC_BOOT_ARCH (ACPI 6.5 §5.2.9.3).
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
const BOOT_ARCH_NO_ASPM: u16 = 1 << 4;

/// APIC IDs from here on need an x2APIC entry (255 is the broadcast ID).
const FIRST_X2APIC_ID: u32 = 255;
const IOAPIC_ID: u8 = 0;

/// An empty table with this crate's identification.
fn table(signature: [u8; 4], revision: u8) -> Sdt {
    // 36 bytes: the common header, ACPI 6.5 §5.2.6.
    Sdt::new(signature, 36, revision, OEM_ID, OEM_TABLE_ID, OEM_REVISION)
}

/// Builds all tables of `platform` for the address `room.base`. The RSDP comes
/// first; every table starts on a 16-byte boundary.
///
/// # Errors
/// The tables are larger than `room`.
pub fn tables(platform: &Platform, room: Range) -> Result<Vec<u8>, Error> {
    let mut blob = Blob {
        base: room.base,
        bytes: vec![0; Rsdp::len()],
    };
    let mut dsdt = table(*b"DSDT", 2);
    dsdt.append_slice(&dsdt::definition_block(platform));
    let dsdt = blob.place(&dsdt);
    let mut entries = vec![blob.place(&fadt(dsdt)), blob.place(&madt(platform.cpus))];
    if let Some(pci) = &platform.pci {
        entries.push(blob.place(&mcfg(pci)));
        if let Some(viot) = platform.iommu.as_ref().and_then(viot) {
            entries.push(blob.place(&viot));
        }
    }
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    for entry in entries {
        xsdt.add_entry(entry);
    }
    let xsdt = blob.place(&xsdt);
    let mut rsdp = Vec::new();
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    blob.bytes[..rsdp.len()].copy_from_slice(&rsdp);

    let len = blob.bytes.len();
    if len as u64 > room.size {
        return Err(Error::Tables {
            len,
            max: room.size,
        });
    }
    Ok(blob.bytes)
}

/// Tables one after another, and the guest physical address of the first byte.
struct Blob {
    base: u64,
    bytes: Vec<u8>,
}

impl Blob {
    /// Appends a table and returns its guest physical address.
    fn place(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = self.base + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

/// Fixed ACPI description table: hardware-reduced, with no legacy device to
/// probe.
fn fadt(dsdt: u64) -> impl Aml {
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless)
        .flag(Flags::ResetRegSup)
        .flag(Flags::HwReducedAcpi);
    if let Some(ports) = layout::POWER {
        let register = |port: u16| {
            GAS::new(
                AddressSpace::SystemIo,
                8,
                0,
                AccessSize::ByteAccess,
                u64::from(port),
            )
        };
        fadt.reset_reg = register(ports.reset);
        fadt.reset_value = PowerPorts::RESET_VALUE;
        fadt.sleep_control_reg = register(ports.sleep_control);
        fadt.sleep_status_reg = register(ports.sleep_status);
    }
    // Bit 1 clear: no 8042, so Linux does not look for a keyboard.
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_ASPM).into();
    fadt.finalize()
}

/// Interrupt controllers (ACPI 6.5 §5.2.12). Flags zero: no 8259 is wired.
fn madt(cpus: u32) -> Sdt {
    const ENABLED: u32 = 1;
    let mut madt = table(*b"APIC", 5);
    let lapic = u32::try_from(layout::LAPIC.base).unwrap_or(u32::MAX);
    let ioapic = u32::try_from(layout::IOAPIC.base).unwrap_or(u32::MAX);
    madt.append(lapic);
    madt.append(0u32);
    for id in 0..cpus {
        match u8::try_from(id) {
            Ok(small) if id < FIRST_X2APIC_ID => {
                madt.append_slice(&[0, 8, small, small]);
                madt.append(ENABLED);
            }
            _ => {
                madt.append_slice(&[9, 16, 0, 0]);
                madt.append(id);
                madt.append(ENABLED);
                madt.append(id);
            }
        }
    }
    madt.append_slice(&[1, 12, IOAPIC_ID, 0]);
    madt.append(ioapic);
    madt.append(0u32);
    // LINT1 is the NMI on every processor, as the boot code programs it.
    madt.append_slice(&[4, 6, 0xFF, 0, 0, 1]);
    if cpus > FIRST_X2APIC_ID {
        madt.append_slice(&[0xA, 12, 0, 0, 0xFF, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0]);
    }
    madt
}

fn mcfg(pci: &PciHost) -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    mcfg.add_ecam(pci.ecam.base, 0, 0, pci.last_bus);
    mcfg
}

/// Virtual I/O translation table: the functions behind the virtio-iommu (ACPI
/// 6.5 §5.2.34). `None` for an IOMMU that this table cannot describe.
fn viot(node: &IommuNode) -> Option<impl Aml + use<>> {
    let NodeModel::VirtioPci { bdf } = node.model else {
        return None;
    };
    let mut viot = VIOT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    let handle = viot.add_virtio_pci_iommu(VirtIoPciIommu::new(function(bdf)));
    for range in &node.endpoints {
        viot.add_pci_range(PciRange::new(
            function(*range.start()),
            function(*range.end()),
            &handle,
        ));
    }
    Some(viot)
}

fn function(bdf: u16) -> PciDevice {
    let [low, bus] = bdf.to_le_bytes();
    PciDevice::new(0, bus, low >> 3, low & 7)
}

#[cfg(test)]
mod tests;
