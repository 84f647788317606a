//! The layouts of IHI 0070: registers, structures, commands and records. The
//! modules have no behaviour.

pub(super) mod cd;
pub(super) mod command;
pub(super) mod event;
mod field;
pub(super) mod pri;
mod registers;
pub(super) mod ste;

pub(super) use field::{Field, Raw};
pub(super) use registers::{
    MSI_ADDRESS, cr0, cr2, gbpa, gerror, idr0, idr1, idr3, idr5, irq_ctrl, queue, reg, strtab,
};
