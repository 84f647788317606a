//! Processor state, firmware tables and boot protocol of the guest.
//!
//! Data in, data out: this crate reads a plain [`Platform`] description and a kernel file, and
//! writes into guest memory what a Linux kernel requires (ACPI tables or a device tree, boot
//! parameters, the kernel itself). It computes the start registers of a vCPU. It opens no device,
//! issues no ioctl and contains no device model.
//!
//! [`layout`], [`boot`] and [`cpu`] are those of the architecture that the crate is built for, with
//! the same names on both. All code that does not need the other architecture's KVM types is
//! compiled, and tested, on both.

#![warn(unreachable_pub, clippy::missing_errors_doc)]

pub mod aarch64;
pub mod kernel;
pub mod platform;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod x86_64;

pub use platform::{
    Cache, CacheKind, Initrd, IommuNode, LegacyDevice, NodeModel, PciHost, Platform, PowerPorts,
    Range, Smmu, SmmuGsis, Space,
};

/// Error of a machine's memory layout or of its boot data.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The layout does not support this size of guest RAM.
    #[error(
        "guest memory of {size} bytes: must be a multiple of 4 KiB from {} MiB to {} MiB",
        .min >> 20, .max >> 20
    )]
    RamSize {
        /// Requested size, in bytes.
        size: u64,
        /// Lower bound, in bytes, inclusive.
        min: u64,
        /// Upper bound, in bytes, inclusive.
        max: u64,
    },
    /// The kernel file cannot be loaded.
    #[error("the kernel cannot be loaded")]
    Kernel(#[source] kernel::Error),
    /// The initial ramdisk cannot be loaded.
    #[error("the initial ramdisk cannot be loaded")]
    Initrd(#[source] kernel::Error),
    /// The command line exceeds the kernel's limit.
    #[error("kernel command line of {len} bytes: the kernel takes at most {max}")]
    Cmdline {
        /// Its length in bytes.
        len: usize,
        /// Upper bound of the kernel, in bytes.
        max: usize,
    },
    /// The firmware tables exceed their range.
    #[error("firmware tables of {len} bytes: there is room for {max}")]
    Tables {
        /// Their length in bytes.
        len: usize,
        /// Size of the range, in bytes.
        max: u64,
    },
    /// The device tree could not be written.
    #[error("cannot write the device tree")]
    Fdt(#[from] vm_fdt::Error),
    /// Guest memory has no RAM where the layout says it has.
    #[error("cannot write boot data to guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

#[cfg(target_arch = "aarch64")]
pub use aarch64::{boot, cpu, layout};
#[cfg(target_arch = "x86_64")]
pub use x86_64::{boot, cpu, layout};

impl Error {
    /// Refuses a RAM size that is no multiple of a page or not within the layout's bounds; `min`
    /// and `max` are inclusive.
    fn check_ram_size(size: u64, min: u64, max: u64) -> Result<(), Self> {
        if !(min..=max).contains(&size) || !size.is_multiple_of(4096) {
            return Err(Self::RamSize { size, min, max });
        }
        Ok(())
    }

    /// Refuses a command line of more than `max` bytes.
    fn check_cmdline(cmdline: &str, max: usize) -> Result<(), Self> {
        let len = cmdline.len();
        if len > max {
            return Err(Self::Cmdline { len, max });
        }
        Ok(())
    }
}

/// Formats an error and its source, for the loaders' tests.
#[cfg(test)]
fn with_reason(error: &Error) -> String {
    let reason = std::error::Error::source(error);
    reason.map_or_else(|| error.to_string(), |reason| format!("{error}: {reason}"))
}
