//! The differentiated system description table: the devices of the machine.

use acpi_tables::Aml;
use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed,
    Name, Package, ResourceTemplate, Scope,
};

use crate::platform::{LegacyDevice, PciHost, Platform, PowerPorts};

/// AML of the DSDT of `platform`, without the table's header (ACPI 6.5 §5.2.11.1).
pub(crate) fn definition_block(platform: &Platform) -> Vec<u8> {
    let mut code = Vec::new();
    Name::new(
        "_S5_".into(),
        &Package::new(vec![&PowerPorts::S5, &0u8, &0u8, &0u8]),
    )
    .to_aml_bytes(&mut code);
    isa_device(&mut code, "COM1", "PNP0501", &platform.serial, true);
    isa_device(&mut code, "RTC_", "PNP0B00", &platform.rtc, false);
    if let Some(pci) = &platform.pci {
        pci_root(&mut code, pci);
        ecam_reservation(&mut code, pci);
    }
    code
}

/// A device with a few I/O ports. The RTC's interrupt is left out: no device model raises it, and
/// Linux then offers a clock without alarms.
fn isa_device(code: &mut Vec<u8>, name: &str, hid: &str, device: &LegacyDevice, wired: bool) {
    let (Ok(base), Ok(len)) = (
        u16::try_from(device.regs.base),
        u8::try_from(device.regs.size),
    ) else {
        return;
    };
    let ports = IO::new(base, base, 0, len);
    let line = Interrupt::new(true, true, false, false, device.gsi);
    let mut resources: Vec<&dyn Aml> = vec![&ports];
    if wired {
        resources.push(&line);
    }
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            name.into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new(hid)),
                &Name::new("_UID".into(), &0u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            ],
        )],
    )
    .to_aml_bytes(code);
}

/// A PCI Express root without interrupt pins: no `_PRT`, and no `_OSC`, because no firmware uses a
/// feature itself.
fn pci_root(code: &mut Vec<u8>, pci: &PciHost) {
    let buses = AddressSpace::new_bus_number(0u16, u16::from(pci.last_bus));
    let low = memory_window(pci.mmio32.base, pci.mmio32.last());
    let high = AddressSpace::new_memory(
        AddressSpaceCacheable::PreFetchable,
        true,
        pci.mmio64.base,
        pci.mmio64.last(),
        None,
    );
    let mut resources: Vec<&dyn Aml> = vec![&buses];
    if let Some(low) = &low {
        resources.push(low);
    }
    resources.push(&high);
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "PCI0".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                &Name::new("_SEG".into(), &aml::ZERO),
                &Name::new("_UID".into(), &aml::ZERO),
                &Name::new("_BBN".into(), &aml::ZERO),
                &Name::new("_CRS".into(), &ResourceTemplate::new(resources)),
            ],
        )],
    )
    .to_aml_bytes(code);
}

fn memory_window(first: u64, last: u64) -> Option<AddressSpace<u32>> {
    let (first, last) = (u32::try_from(first).ok()?, u32::try_from(last).ok()?);
    Some(AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        first,
        last,
        None,
    ))
}

/// Linux uses the MCFG's region only when a motherboard resource claims it.
fn ecam_reservation(code: &mut Vec<u8>, pci: &PciHost) {
    let (Ok(base), Ok(size)) = (u32::try_from(pci.ecam.base), u32::try_from(pci.ecam.size)) else {
        return;
    };
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "MBRD".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                &Name::new("_UID".into(), &aml::ZERO),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&Memory32Fixed::new(true, base, size)]),
                ),
            ],
        )],
    )
    .to_aml_bytes(code);
}
