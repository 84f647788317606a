//! x86_64: PVH and 64-bit boot protocol, ACPI, CPUID and registers.

pub mod acpi;
#[cfg(target_arch = "x86_64")]
pub mod boot;
#[cfg(target_arch = "x86_64")]
pub mod cpu;
mod dsdt;
pub mod layout;
