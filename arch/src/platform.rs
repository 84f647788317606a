//! Description of a machine, from which the firmware tables are written.

use std::ops::RangeInclusive;

/// A range of guest physical addresses or I/O ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub base: u64,
    /// Length in bytes, never zero.
    pub size: u64,
}

impl Range {
    /// Creates the range of `size` bytes from `base`.
    pub const fn new(base: u64, size: u64) -> Self {
        Self { base, size }
    }

    /// The last byte of the range (inclusive).
    pub const fn last(&self) -> u64 {
        self.base + (self.size - 1)
    }

    /// The first byte past the range (exclusive).
    pub const fn end(&self) -> u64 {
        self.base + self.size
    }
}

/// Address space of a device's registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Space {
    /// x86 I/O ports.
    Pio,
    /// Guest physical addresses.
    Mmio,
}

/// A device at a fixed address with one wired interrupt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LegacyDevice {
    /// Address space of the registers.
    pub space: Space,
    /// Range of the registers.
    pub regs: Range,
    /// The interrupt: an IOAPIC pin on x86_64, an SPI number (INTID - 32) on
    /// aarch64. Edge-triggered on both.
    pub gsi: u32,
}

/// The x86 registers that end the machine: ACPI 6.5 §4.8.3.7 (sleep), §4.8.3.6
/// (reset), and the keyboard controller's command port. Each is one byte wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PowerPorts {
    /// SLEEP_CONTROL_REG: writing [`Self::POWER_OFF`] powers off.
    pub sleep_control: u16,
    /// SLEEP_STATUS_REG, the next port: reads as zero (`WAK_STS` clear), writes are ignored.
    pub sleep_status: u16,
    /// RESET_REG: writing [`Self::RESET_VALUE`] resets.
    pub reset: u16,
    /// Command port of a keyboard controller without a keyboard: writing
    /// [`Self::PULSE_RESET`] resets. Its status reads as zero: no key to read, and
    /// ready for a command. For a guest with `reboot=k`, as Firecracker's have.
    pub keyboard: u16,
}

impl PowerPorts {
    /// The `SLP_TYPx` value of the soft-off state, as the `\_S5` object says.
    pub const S5: u8 = 5;
    /// Mask and value of SLEEP_CONTROL_REG that power off: `SLP_EN` (bit 5) with
    /// [`Self::S5`] in `SLP_TYPx` (bits 2 to 4).
    pub const POWER_OFF: (u8, u8) = (1 << 5 | 0b111 << 2, 1 << 5 | Self::S5 << 2);
    /// Value of RESET_REG that resets; the FADT gives it to the guest.
    pub const RESET_VALUE: u8 = 1;
    /// Command of the keyboard controller that pulses the processor's reset line.
    pub const PULSE_RESET: u8 = 0xfe;
}

/// A PCI Express root with ECAM configuration space, MSI only (no INTx).
///
/// Messages go to the local APICs on x86_64 and to the GIC's ITS on aarch64,
/// where the DeviceID is the requester ID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PciHost {
    /// Enhanced configuration space: 1 MiB per bus, bus 0 first.
    pub ecam: Range,
    /// The highest bus number (inclusive); the lowest is 0.
    pub last_bus: u8,
    /// Non-prefetchable window below 4 GiB.
    pub mmio32: Range,
    /// Prefetchable window above 4 GiB.
    pub mmio64: Range,
}

/// SMMUv3's wired interrupts, as GSIs (IHI 0070 §3.18).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SmmuGsis {
    /// Event queue.
    pub eventq: u32,
    /// Page request queue.
    pub priq: u32,
    /// CMD_SYNC completion.
    pub cmdq_sync: u32,
    /// Global errors.
    pub gerror: u32,
}

/// Registers and interrupts of an SMMUv3.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Smmu {
    /// Register pages 0 and 1, 64 KiB each.
    pub regs: Range,
    /// Wired interrupts.
    pub gsis: SmmuGsis,
}

/// Model of the IOMMU and its connection to the guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum NodeModel {
    /// A virtio-iommu PCI function with this requester ID.
    VirtioPci {
        /// Requester ID of the IOMMU itself: bus << 8 | device << 3 | function.
        bdf: u16,
    },
    /// An SMMUv3 (aarch64 only).
    Smmuv3 {
        /// Registers and interrupts.
        smmu: Smmu,
        /// Offer ATS on the host bridge, for its functions.
        ats: bool,
        /// Table walks are cache coherent; agrees with `SMMU_IDR0.COHACC`.
        coherent: bool,
    },
}

/// An IOMMU and the functions behind it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IommuNode {
    /// Model of the IOMMU.
    pub model: NodeModel,
    /// Requester IDs that the IOMMU translates (inclusive ranges, ascending,
    /// disjoint). Endpoint ID and StreamID equal the requester ID. A
    /// virtio-iommu's own requester ID is never in here.
    pub endpoints: Vec<RangeInclusive<u16>>,
}

/// Range of the initial ramdisk in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Initrd {
    /// Guest physical address of the first byte.
    pub base: u64,
    /// Length in bytes.
    pub size: u64,
}

/// Contents of a cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CacheKind {
    /// Data only.
    Data,
    /// Instructions only.
    Instruction,
    /// Both.
    Unified,
}

/// A cache of a processor. A size of zero is unknown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cache {
    /// Level, from 1, which is nearest to the processor.
    pub level: u8,
    /// Contents of the cache.
    pub kind: CacheKind,
    /// Size in bytes.
    pub size: u32,
    /// Line size in bytes.
    pub line_size: u32,
    /// Number of sets.
    pub sets: u32,
    /// Number of processors, with consecutive numbers, that share one cache; at least 1.
    pub shared_by: u32,
}

/// A whole machine, as the firmware tables describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// Number of vCPUs, all enabled at boot.
    pub cpus: u32,
    /// The caches of each vCPU, by ascending level without a gap; empty if none is described.
    /// Device tree only.
    pub caches: Vec<Cache>,
    /// Guest RAM, ascending; from `layout::ram_ranges`.
    pub ram: Vec<Range>,
    /// Kernel command line, without a terminating NUL.
    pub cmdline: String,
    /// Random bytes for the guest's random number generator (device tree
    /// `rng-seed`, `SETUP_RNG_SEED` of the 64-bit x86 boot protocol; PVH has no
    /// place for them).
    pub seed: [u8; 32],
    /// 16550 UART.
    pub serial: LegacyDevice,
    /// Real-time clock: MC146818 on x86_64, PL031 on aarch64.
    pub rtc: LegacyDevice,
    /// PCI Express root; `None` in a machine without PCI functions.
    pub pci: Option<PciHost>,
    /// IOMMU in front of PCI functions; needs `pci`.
    pub iommu: Option<IommuNode>,
}
