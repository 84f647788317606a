//! The layouts of IHI 0070: registers, structures, commands and records.
//! Nothing else.

pub mod cd;
pub mod command;
pub mod event;
mod field;
pub mod pri;
mod registers;
pub mod ste;

pub use field::{Field, Raw};
pub use registers::{
    MSI_ADDRESS, cr0, cr2, gbpa, gerror, idr0, idr1, idr3, idr5, irq_ctrl, queue, reg, strtab,
};
