//! Guest physical address space and I/O ports of the x86_64 machine.
//!
//! ```text
//! 0x0000_0000  RAM (boot parameters and ACPI tables in the first MiB)
//! 0xC000_0000  32-bit hole: PCI windows, ECAM, IOAPIC, local APICs, KVM's TSS
//! 0x1_0000_0000  RAM, the rest
//! 0x40_0000_0000  64-bit PCI window
//! ```

use crate::Error;
use crate::platform::{LegacyDevice, PowerPorts, Range, Smmu, Space};

/// End of low RAM and start of the 32-bit hole.
pub const HOLE: Range = Range::new(0xC000_0000, 0x4000_0000);
/// Non-prefetchable PCI window below 4 GiB.
pub const PCI_MMIO32: Range = Range::new(0xC000_0000, 0x2000_0000);
/// PCI configuration space, one bus.
pub const PCI_ECAM: Range = Range::new(0xE000_0000, 0x10_0000);
/// Highest PCI bus number, inclusive.
pub const PCI_LAST_BUS: u8 = 0;
/// Prefetchable PCI window above RAM.
pub const PCI_MMIO64: Range = Range::new(0x40_0000_0000, 0x10_0000_0000);
/// I/O APIC registers.
pub const IOAPIC: Range = Range::new(0xFEC0_0000, 0x1000);
/// Local APIC registers.
pub const LAPIC: Range = Range::new(0xFEE0_0000, 0x1000);
/// Address of message-signalled interrupts (Intel SDM 3A §11.11.1).
pub const MSI_DOORBELLS: u64 = 0xFEE0_0000;
/// Address bits within [`MSI_DOORBELLS`].
pub const MSI_DOORBELL_BITS: u32 = 20;
/// One page KVM uses for real-mode page tables on Intel hosts.
pub const KVM_IDENTITY_MAP: u64 = 0xFFFB_C000;
/// Three pages KVM uses for a TSS on Intel hosts.
pub const KVM_TSS: u64 = 0xFFFB_D000;

/// COM1.
pub const SERIAL: LegacyDevice = LegacyDevice {
    space: Space::Pio,
    regs: Range::new(0x3F8, 8),
    gsi: 4,
};
/// MC146818 real-time clock.
pub const RTC: LegacyDevice = LegacyDevice {
    space: Space::Pio,
    regs: Range::new(0x70, 2),
    gsi: 8,
};
/// Sleep and reset registers, and the keyboard controller's command port.
pub const POWER: Option<PowerPorts> = Some(PowerPorts {
    sleep_control: 0x600,
    sleep_status: 0x601,
    reset: 0x602,
    keyboard: 0x64,
});
/// There is no SMMUv3 on this architecture.
pub const SMMU: Option<Smmu> = None;

/// Wired interrupts are GSIs below this; message-signalled ones start at it.
pub const FIRST_MSI_GSI: u32 = 24;

/// Upper bound on vCPUs.
pub const MAX_CPUS: u32 = 32;
/// Upper bound on the kernel command line, in bytes without the final NUL
/// (`COMMAND_LINE_SIZE` of Linux).
pub const MAX_CMDLINE: usize = 2047;
/// Lower bound on guest RAM, in bytes, inclusive.
pub const MIN_RAM: u64 = 64 << 20;
/// Upper bound on guest RAM, in bytes, inclusive: it ends where the 64-bit PCI
/// window starts.
pub const MAX_RAM: u64 = PCI_MMIO64.base - HOLE.size;

/// Initial GDT of the 64-bit entry.
pub const GDT: u64 = 0x500;
/// PVH start-of-day structure; its memory map and module list follow.
pub const PVH_INFO: u64 = 0x6000;
/// Boot parameters of the 64-bit boot protocol.
pub const ZERO_PAGE: u64 = 0x7000;
/// `struct setup_data` with the random seed.
pub const SETUP_DATA: u64 = 0x8000;
/// Four-level page tables of the 64-bit entry: PML4, PDPT, then one page
/// directory for each of the first four GiB.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: Range = Range::new(0x2_0000, 0x1_0000);
/// ACPI tables: the RSDP first, in the area that Linux scans for it.
pub const ACPI: Range = Range::new(0xE_0000, 0x1_F000);
/// The last page below 1 MiB, with the BIOS's entry after a reset.
pub const FIRMWARE: Range = Range::new(0xF_F000, 0x1000);
/// Real-mode reset vector, F000:FFF0.
pub const RESET_VECTOR: u64 = 0xF_FFF0;
/// Conventional memory ends here; above it up to 1 MiB is not RAM.
pub const EBDA: u64 = 0x9_FC00;
/// Extended memory: kernels load from here.
pub const HIMEM: u64 = 0x10_0000;

/// Splits `size` bytes of RAM around the 32-bit hole, in ascending order.
///
/// # Errors
/// `size` is not a multiple of 4 KiB or not within [`MIN_RAM`] to [`MAX_RAM`].
pub fn ram_ranges(size: u64) -> Result<Vec<Range>, Error> {
    Error::check_ram_size(size, MIN_RAM, MAX_RAM)?;
    if size <= HOLE.base {
        return Ok(vec![Range::new(0, size)]);
    }
    Ok(vec![
        Range::new(0, HOLE.base),
        Range::new(HOLE.end(), size - HOLE.base),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ram_beyond_the_hole_continues_at_4_gib() {
        assert_eq!(ram_ranges(128 << 20).unwrap(), [Range::new(0, 128 << 20)]);
        assert_eq!(ram_ranges(3 << 30).unwrap(), [Range::new(0, 3 << 30)]);
        assert_eq!(
            ram_ranges(5 << 30).unwrap(),
            [Range::new(0, 3 << 30), Range::new(4 << 30, 2 << 30)]
        );
        assert_eq!(ram_ranges(MAX_RAM).unwrap()[1].end(), PCI_MMIO64.base);
    }

    #[test]
    fn sizes_out_of_range_or_unaligned_are_refused() {
        for size in [0, MIN_RAM - 4096, MIN_RAM + 1, MAX_RAM + 4096, u64::MAX] {
            assert!(ram_ranges(size).is_err(), "{size:#x}");
        }
    }

    #[test]
    fn devices_in_the_hole_do_not_overlap() {
        let fixed = [
            PCI_MMIO32,
            PCI_ECAM,
            IOAPIC,
            LAPIC,
            Range::new(KVM_IDENTITY_MAP, 0x4000),
        ];
        for pair in fixed.windows(2) {
            assert!(pair[0].end() <= pair[1].base, "{pair:x?}");
        }
        assert!(HOLE.base <= fixed[0].base && fixed[4].end() <= HOLE.end());
    }
}
