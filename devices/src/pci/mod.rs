//! PCI Express: one root complex with one bus, and the parts of a function.
//!
//! Stream IDs, ATS and the translation of MSIs need PCI, so every device that
//! accesses guest memory is a PCI function.

mod bar;
mod config;
mod image;
mod msi;
mod msix;
mod root;

pub(crate) use bar::halves;
pub use bar::{BarError, BarKind, BarMove, Bars};
pub use config::{ConfigSpace, Ids};
pub use image::{ConfigImage, ConfigWritten};
pub use msi::{MsiRetranslator, MsiTarget, Requester};
pub use msix::Msix;
pub use root::{PciFunction, PciRoot, PlaceError, SLOTS};
