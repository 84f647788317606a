//! Accesses, permissions and mappings.

use std::fmt;
use std::ops::BitOr;

use serde::{Deserialize, Serialize};

use crate::addr::{Gpa, Iova, IovaRange};

/// What one access does to memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Access {
    /// The device reads guest memory.
    Read,
    /// The device writes guest memory.
    Write,
}

/// What a mapping permits: any of reading and writing.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Perm(u8);

impl Perm {
    /// Nothing.
    pub const NONE: Self = Self(0);
    /// Reading only.
    pub const READ: Self = Self(1);
    /// Writing only.
    pub const WRITE: Self = Self(2);
    /// Reading and writing.
    pub const READ_WRITE: Self = Self(3);

    /// Whether `access` is permitted.
    #[must_use]
    pub const fn allows(self, access: Access) -> bool {
        match access {
            Access::Read => self.0 & 1 != 0,
            Access::Write => self.0 & 2 != 0,
        }
    }

    /// What both permit.
    #[must_use]
    pub const fn and(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }
}

impl BitOr for Perm {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for Perm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let read = if self.allows(Access::Read) { 'r' } else { '-' };
        let write = if self.allows(Access::Write) { 'w' } else { '-' };
        write!(f, "{read}{write}")
    }
}

/// A run of I/O virtual addresses that lies in one piece in guest-physical
/// memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// The addresses a device uses; both ends inclusive.
    pub iova: IovaRange,
    /// Where the first of them lies. The others follow; the run does not wrap
    /// around 2^64.
    pub gpa: Gpa,
    /// What a device may do there.
    pub perm: Perm,
}

impl Mapping {
    /// Where `iova` lies, or `None` outside the run.
    #[must_use]
    pub const fn gpa_of(&self, iova: Iova) -> Option<Gpa> {
        if self.iova.contains(iova) {
            self.gpa.checked_add(iova.0 - self.iova.first().0)
        } else {
            None
        }
    }

    /// The part of the mapping that lies in `range`.
    #[must_use]
    pub fn clipped(&self, range: IovaRange) -> Option<Self> {
        let iova = self.iova.intersection(range)?;
        let gpa = self.gpa_of(iova.first())?;
        Some(Self { iova, gpa, ..*self })
    }
}
