//! The device tree (Devicetree Specification v0.4 and Linux's bindings).

use vm_fdt::FdtWriter;

use crate::Error;
use crate::aarch64::{cache, cpu, layout};
use crate::platform::{Initrd, IommuNode, LegacyDevice, NodeModel, PciHost, Platform, Range};

const GIC: u32 = 1;
const ITS: u32 = 2;
const CLOCK: u32 = 3;
const IOMMU: u32 = 4;

/// Interrupt specifier cells of the GICv3 binding.
const SPI: u32 = 0;
const PPI: u32 = 1;
const EDGE_RISING: u32 = 1;
const LEVEL_HIGH: u32 = 4;

/// `ranges` space codes of the PCI binding (IEEE 1275 §2.2.1.1).
const PCI_MEM32: u32 = 0x0200_0000;
const PCI_MEM64_PREFETCHABLE: u32 = 0x4300_0000;

/// Builds the flattened device tree of `platform`.
///
/// # Errors
/// A name or value cannot be encoded, such as a NUL in the command line.
pub fn tree(platform: &Platform, initrd: Option<Initrd>) -> Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let root = fdt.begin_node("")?;
    fdt.property_string("compatible", "linux,dummy-virt")?;
    fdt.property_string("model", "portcullis")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("interrupt-parent", GIC)?;
    chosen(&mut fdt, platform, initrd)?;
    cpus(&mut fdt, platform)?;
    for ram in &platform.ram {
        let node = fdt.begin_node(&format!("memory@{:x}", ram.base))?;
        fdt.property_string("device_type", "memory")?;
        reg(&mut fdt, &[*ram])?;
        fdt.end_node(node)?;
    }
    gic(&mut fdt, platform.cpus)?;
    timer(&mut fdt)?;
    psci(&mut fdt)?;
    clock(&mut fdt)?;
    serial(&mut fdt, &platform.serial)?;
    rtc(&mut fdt, &platform.rtc)?;
    if let Some(node) = &platform.iommu {
        smmu(&mut fdt, node)?;
    }
    if let Some(pci) = &platform.pci {
        pci_host(&mut fdt, pci, platform.iommu.as_ref())?;
    }
    fdt.end_node(root)?;
    Ok(fdt.finish()?)
}

fn reg(fdt: &mut FdtWriter, ranges: &[Range]) -> Result<(), Error> {
    let cells: Vec<u64> = ranges
        .iter()
        .flat_map(|range| [range.base, range.size])
        .collect();
    Ok(fdt.property_array_u64("reg", &cells)?)
}

fn strings(fdt: &mut FdtWriter, name: &str, values: &[&str]) -> Result<(), Error> {
    let values = values.iter().map(|&value| value.to_owned()).collect();
    Ok(fdt.property_string_list(name, values)?)
}

fn chosen(fdt: &mut FdtWriter, platform: &Platform, initrd: Option<Initrd>) -> Result<(), Error> {
    let node = fdt.begin_node("chosen")?;
    fdt.property_string("bootargs", &platform.cmdline)?;
    let serial = platform.serial.regs.base;
    fdt.property_string("stdout-path", &format!("/serial@{serial:x}"))?;
    if let Some(initrd) = initrd {
        fdt.property_u64("linux,initrd-start", initrd.base)?;
        fdt.property_u64("linux,initrd-end", initrd.base + initrd.size)?;
    }
    fdt.property("rng-seed", &platform.seed)?;
    Ok(fdt.end_node(node)?)
}

fn cpus(fdt: &mut FdtWriter, platform: &Platform) -> Result<(), Error> {
    let cpus = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 0)?;
    for index in 0..platform.cpus {
        let mpidr = cpu::mpidr(index);
        let node = fdt.begin_node(&format!("cpu@{mpidr:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_string("compatible", "arm,armv8")?;
        fdt.property_string("enable-method", "psci")?;
        fdt.property_u64("reg", mpidr)?;
        cache::of_cpu(fdt, &platform.caches, index)?;
        fdt.end_node(node)?;
    }
    Ok(fdt.end_node(cpus)?)
}

fn gic(fdt: &mut FdtWriter, cpus: u32) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("interrupt-controller@{:x}", layout::GICD.base))?;
    fdt.property_string("compatible", "arm,gic-v3")?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 3)?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_null("ranges")?;
    fdt.property_phandle(GIC)?;
    let redistributors = Range::new(layout::GICR.base, u64::from(cpus) * layout::GICR_STRIDE);
    reg(fdt, &[layout::GICD, redistributors])?;
    let its = fdt.begin_node(&format!("msi-controller@{:x}", layout::ITS.base))?;
    fdt.property_string("compatible", "arm,gic-v3-its")?;
    fdt.property_null("msi-controller")?;
    fdt.property_u32("#msi-cells", 1)?;
    fdt.property_phandle(ITS)?;
    reg(fdt, &[layout::ITS])?;
    fdt.end_node(its)?;
    Ok(fdt.end_node(node)?)
}

fn timer(fdt: &mut FdtWriter) -> Result<(), Error> {
    const PPIS: [u32; 4] = [13, 14, 11, 10]; // secure, non-secure, virtual, hypervisor
    let node = fdt.begin_node("timer")?;
    fdt.property_string("compatible", "arm,armv8-timer")?;
    fdt.property_null("always-on")?;
    let cells: Vec<u32> = PPIS
        .iter()
        .flat_map(|&ppi| [PPI, ppi, LEVEL_HIGH])
        .collect();
    fdt.property_array_u32("interrupts", &cells)?;
    Ok(fdt.end_node(node)?)
}

fn psci(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node("psci")?;
    strings(fdt, "compatible", &["arm,psci-1.0", "arm,psci-0.2"])?;
    fdt.property_string("method", "hvc")?;
    Ok(fdt.end_node(node)?)
}

fn clock(fdt: &mut FdtWriter) -> Result<(), Error> {
    let node = fdt.begin_node("apb-pclk")?;
    fdt.property_string("compatible", "fixed-clock")?;
    fdt.property_u32("#clock-cells", 0)?;
    fdt.property_u32("clock-frequency", 24_000_000)?;
    fdt.property_string("clock-output-names", "clk24mhz")?;
    fdt.property_phandle(CLOCK)?;
    Ok(fdt.end_node(node)?)
}

fn serial(fdt: &mut FdtWriter, device: &LegacyDevice) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("serial@{:x}", device.regs.base))?;
    fdt.property_string("compatible", "ns16550a")?;
    // The frequency of a PC's UART: 16 x 115,200.
    fdt.property_u32("clock-frequency", 1_843_200)?;
    fdt.property_array_u32("interrupts", &[SPI, device.gsi, EDGE_RISING])?;
    reg(fdt, &[device.regs])?;
    Ok(fdt.end_node(node)?)
}

fn rtc(fdt: &mut FdtWriter, device: &LegacyDevice) -> Result<(), Error> {
    let node = fdt.begin_node(&format!("rtc@{:x}", device.regs.base))?;
    strings(fdt, "compatible", &["arm,pl031", "arm,primecell"])?;
    fdt.property_u32("clocks", CLOCK)?;
    fdt.property_string("clock-names", "apb_pclk")?;
    fdt.property_array_u32("interrupts", &[SPI, device.gsi, EDGE_RISING])?;
    reg(fdt, &[device.regs])?;
    Ok(fdt.end_node(node)?)
}

/// Writes the SMMUv3 node; a virtio-iommu is a child of the host bridge.
fn smmu(fdt: &mut FdtWriter, iommu: &IommuNode) -> Result<(), Error> {
    let NodeModel::Smmuv3 { smmu, coherent, .. } = &iommu.model else {
        return Ok(());
    };
    let node = fdt.begin_node(&format!("iommu@{:x}", smmu.regs.base))?;
    fdt.property_string("compatible", "arm,smmu-v3")?;
    reg(fdt, &[smmu.regs])?;
    let gsis = [
        smmu.gsis.eventq,
        smmu.gsis.gerror,
        smmu.gsis.priq,
        smmu.gsis.cmdq_sync,
    ];
    let cells: Vec<u32> = gsis
        .iter()
        .flat_map(|&gsi| [SPI, gsi, EDGE_RISING])
        .collect();
    fdt.property_array_u32("interrupts", &cells)?;
    strings(
        fdt,
        "interrupt-names",
        &["eventq", "gerror", "priq", "cmdq-sync"],
    )?;
    fdt.property_u32("#iommu-cells", 1)?;
    if *coherent {
        fdt.property_null("dma-coherent")?;
    }
    fdt.property_phandle(IOMMU)?;
    Ok(fdt.end_node(node)?)
}

fn pci_host(fdt: &mut FdtWriter, pci: &PciHost, iommu: Option<&IommuNode>) -> Result<(), Error> {
    const ALL_FUNCTIONS: u32 = 0x1_0000;
    let node = fdt.begin_node(&format!("pcie@{:x}", pci.ecam.base))?;
    fdt.property_string("compatible", "pci-host-ecam-generic")?;
    fdt.property_string("device_type", "pci")?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_array_u32("bus-range", &[0, u32::from(pci.last_bus)])?;
    reg(fdt, &[pci.ecam])?;
    let windows = [
        (PCI_MEM32, pci.mmio32),
        (PCI_MEM64_PREFETCHABLE, pci.mmio64),
    ];
    let ranges: Vec<u32> = windows
        .iter()
        .flat_map(|(space, window)| {
            let [base, size] = [cells(window.base), cells(window.size)];
            [*space, base[0], base[1], base[0], base[1], size[0], size[1]]
        })
        .collect();
    fdt.property_array_u32("ranges", &ranges)?;
    // The ITS DeviceID is the requester ID.
    fdt.property_array_u32("msi-map", &[0, ITS, 0, ALL_FUNCTIONS])?;
    fdt.property_null("dma-coherent")?;
    if let Some(iommu) = iommu {
        let map: Vec<u32> = iommu
            .endpoints
            .iter()
            .flat_map(|range| {
                let (first, last) = (u32::from(*range.start()), u32::from(*range.end()));
                [first, IOMMU, first, last - first + 1]
            })
            .collect();
        fdt.property_array_u32("iommu-map", &map)?;
        match iommu.model {
            NodeModel::Smmuv3 { ats: true, .. } => fdt.property_null("ats-supported")?,
            NodeModel::Smmuv3 { .. } => {}
            NodeModel::VirtioPci { bdf } => virtio_iommu(fdt, bdf)?,
        }
    }
    Ok(fdt.end_node(node)?)
}

/// Linux `Documentation/devicetree/bindings/virtio/pci-iommu.yaml`.
fn virtio_iommu(fdt: &mut FdtWriter, bdf: u16) -> Result<(), Error> {
    let (device, function) = ((bdf >> 3) & 0x1F, bdf & 7);
    let node = fdt.begin_node(&format!("iommu@{device:x},{function:x}"))?;
    fdt.property_string("compatible", "virtio,pci-iommu")?;
    fdt.property_array_u32("reg", &[u32::from(bdf) << 8, 0, 0, 0, 0])?;
    fdt.property_u32("#iommu-cells", 1)?;
    fdt.property_phandle(IOMMU)?;
    Ok(fdt.end_node(node)?)
}

/// A 64-bit value as two cells, high first.
fn cells(value: u64) -> [u32; 2] {
    let [a, b, c, d, e, f, g, h] = value.to_be_bytes();
    [
        u32::from_be_bytes([a, b, c, d]),
        u32::from_be_bytes([e, f, g, h]),
    ]
}

#[cfg(test)]
mod tests;
