//! aarch64: `Image` boot protocol, device tree and registers.

pub mod boot;
pub mod cache;
pub mod cpu;
pub mod fdt;
pub mod layout;
