//! Accesses, permissions and mappings.

use std::fmt;

use bitflags::bitflags;
use serde::{Deserialize, Serialize};

use crate::addr::{Gpa, Iova, IovaRange};

/// Direction of an access to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// The device reads guest memory.
    Read,
    /// The device writes guest memory.
    Write,
}

/// Accesses that a mapping permits.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Perm(u8);

bitflags! {
    impl Perm: u8 {
        /// Reading only.
        const READ = 1;
        /// Writing only.
        const WRITE = 2;
        /// Reading and writing.
        const READ_WRITE = 3;
    }
}

impl Perm {
    /// Whether the permission includes `access`.
    #[must_use]
    pub const fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => self.contains(Self::READ),
            Access::Write => self.contains(Self::WRITE),
        }
    }
}

impl fmt::Debug for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let read = if self.allows(Access::Read) { 'r' } else { '-' };
        let write = if self.allows(Access::Write) { 'w' } else { '-' };
        write!(f, "{read}{write}")
    }
}

/// A range of I/O virtual addresses with one contiguous guest-physical target.
///
/// ```
/// use iommu::{Gpa, Iova, IovaRange, Mapping, Perm};
///
/// let mapping = Mapping {
///     iova: IovaRange::block(Iova(0x1000), 12),
///     gpa: Gpa(0x8000),
///     perm: Perm::READ,
/// };
/// assert_eq!(mapping.gpa_of(Iova(0x1010)), Some(Gpa(0x8010)));
/// assert_eq!(mapping.gpa_of(Iova(0x2000)), None);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// I/O virtual addresses, both ends inclusive.
    pub iova: IovaRange,
    /// Target of the first address. The target does not wrap around 2^64.
    pub gpa: Gpa,
    /// Accesses that are permitted.
    pub perm: Perm,
}

impl Mapping {
    /// Guest-physical address of `iova`, or `None` outside the mapping.
    #[must_use]
    pub const fn gpa_of(&self, iova: Iova) -> Option<Gpa> {
        if self.iova.contains(iova) {
            self.gpa.checked_add(iova.0 - self.iova.first().0)
        } else {
            None
        }
    }

    /// The part of the mapping in `range`, or `None` when they do not overlap.
    #[must_use]
    pub fn clipped(&self, range: IovaRange) -> Option<Self> {
        let iova = self.iova.intersection(range)?;
        let gpa = self.gpa_of(iova.first())?;
        Some(Self { iova, gpa, ..*self })
    }
}
