//! Guest physical address space of the aarch64 machine.
//!
//! ```text
//! 0x0800_0000  GIC: distributor, ITS, redistributors
//! 0x0900_0000  UART, RTC, SMMUv3
//! 0x1000_0000  32-bit PCI window
//! 0x3F00_0000  PCI configuration space
//! 0x4000_0000  RAM
//! 0x40_0000_0000  64-bit PCI window
//! ```

use crate::Error;
use crate::platform::{LegacyDevice, PowerPorts, Range, Smmu, SmmuGsis, Space};

/// GICv3 distributor.
pub const GICD: Range = Range::new(0x0800_0000, 0x1_0000);
/// Interrupt translation service: control and translation frames.
pub const ITS: Range = Range::new(0x0808_0000, 0x2_0000);
/// Address of message-signalled interrupts: the ITS's translation page, with
/// `GITS_TRANSLATER`.
pub const MSI_DOORBELLS: u64 = 0x0809_0000;
/// Address bits within [`MSI_DOORBELLS`].
pub const MSI_DOORBELL_BITS: u32 = 16;
/// GICv3 redistributors, [`GICR_STRIDE`] bytes a vCPU.
pub const GICR: Range = Range::new(0x080A_0000, 0x00F6_0000);
/// Size of one redistributor (RD_base and SGI_base frames).
pub const GICR_STRIDE: u64 = 0x2_0000;

/// 16550 UART.
pub const SERIAL: LegacyDevice = LegacyDevice {
    space: Space::Mmio,
    regs: Range::new(0x0900_0000, 0x1000),
    gsi: 0,
};
/// PL031 real-time clock.
pub const RTC: LegacyDevice = LegacyDevice {
    space: Space::Mmio,
    regs: Range::new(0x0901_0000, 0x1000),
    gsi: 1,
};
/// Power-off and reset go through PSCI.
pub const POWER: Option<PowerPorts> = None;
/// SMMUv3.
pub const SMMU: Option<Smmu> = Some(Smmu {
    regs: Range::new(0x0905_0000, 0x2_0000),
    gsis: SmmuGsis {
        eventq: 4,
        priq: 5,
        cmdq_sync: 6,
        gerror: 7,
    },
});

/// Non-prefetchable PCI window below RAM.
pub const PCI_MMIO32: Range = Range::new(0x1000_0000, 0x2F00_0000);
/// PCI configuration space, one bus.
pub const PCI_ECAM: Range = Range::new(0x3F00_0000, 0x10_0000);
/// Highest PCI bus number, inclusive.
pub const PCI_LAST_BUS: u8 = 0;
/// Prefetchable PCI window above RAM.
pub const PCI_MMIO64: Range = Range::new(0x40_0000_0000, 0x10_0000_0000);

/// Start of RAM.
pub const RAM_BASE: u64 = 0x4000_0000;

/// INTIDs the GIC implements: 32 private ones and the SPIs.
pub const GIC_INTIDS: u32 = 128;
/// Wired interrupts (SPIs) are GSIs below this; message-signalled ones start at
/// it.
pub const FIRST_MSI_GSI: u32 = GIC_INTIDS - 32;

/// Upper bound on vCPUs.
pub const MAX_CPUS: u32 = 32;
/// Upper bound on the kernel command line, in bytes without the final NUL
/// (`COMMAND_LINE_SIZE` of Linux).
pub const MAX_CMDLINE: usize = 2047;
/// Lower bound on guest RAM, in bytes, inclusive.
pub const MIN_RAM: u64 = 64 << 20;
/// Upper bound on guest RAM, in bytes, inclusive: it ends where the 64-bit PCI
/// window starts.
pub const MAX_RAM: u64 = PCI_MMIO64.base - RAM_BASE;

/// The device tree: 2 MiB at the start of RAM, which the kernel does not use.
pub const FDT: Range = Range::new(RAM_BASE, 0x20_0000);
/// Load address of the kernel image (2 MiB aligned), without its `text_offset`.
pub const KERNEL: u64 = FDT.end();

/// RAM of `size` bytes: one range, there is no hole.
///
/// # Errors
/// `size` is not a multiple of 4 KiB or not within [`MIN_RAM`] to [`MAX_RAM`].
pub fn ram_ranges(size: u64) -> Result<Vec<Range>, Error> {
    Error::check_ram_size(size, MIN_RAM, MAX_RAM)?;
    Ok(vec![Range::new(RAM_BASE, size)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_is_one_range_up_to_the_64_bit_window() {
        assert_eq!(
            ram_ranges(8 << 30).unwrap(),
            [Range::new(RAM_BASE, 8 << 30)]
        );
        assert_eq!(ram_ranges(MAX_RAM).unwrap()[0].end(), PCI_MMIO64.base);
        for size in [0, MIN_RAM - 4096, MIN_RAM + 1, MAX_RAM + 4096, u64::MAX] {
            assert!(ram_ranges(size).is_err(), "{size:#x}");
        }
    }

    #[test]
    fn devices_do_not_overlap() {
        let smmu = SMMU.unwrap().regs;
        let fixed = [
            GICD,
            ITS,
            GICR,
            SERIAL.regs,
            RTC.regs,
            smmu,
            PCI_MMIO32,
            PCI_ECAM,
            FDT,
        ];
        for pair in fixed.windows(2) {
            assert!(pair[0].end() <= pair[1].base, "{pair:x?}");
        }
        assert!(u64::from(MAX_CPUS) * GICR_STRIDE <= GICR.size);
    }
}
