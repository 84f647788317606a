//! Translation tables and their descriptors (VMSAv8-64, Arm ARM DDI 0487 §D8.3).

use crate::mapping::Perm;

/// Translation granule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Granule {
    /// 4 KiB
    K4,
    /// 16 KiB
    K16,
    /// 64 KiB
    K64,
}

impl Granule {
    /// Number of offset bits of a page.
    pub(super) const fn bits(self) -> u32 {
        match self {
            Self::K4 => 12,
            Self::K16 => 14,
            Self::K64 => 16,
        }
    }

    /// Number of input address bits that one level resolves.
    pub(super) const fn stride(self) -> u32 {
        self.bits() - 3
    }

    /// Entries of a contiguous group at `level`, as a power of two.
    pub(super) const fn contiguous(self, level: u32) -> u32 {
        match (self, level) {
            (Self::K4, _) => 4,
            (Self::K16, 3) => 7,
            (Self::K16 | Self::K64, _) => 5,
        }
    }

    /// Size of the page or block of one entry at `level`, as a shift.
    pub(super) const fn shift(self, level: u32) -> u32 {
        self.bits() + (3 - level) * self.stride()
    }
}

/// Effect of a clear access flag.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AccessFlag {
    /// The access faults.
    Fault,
    /// None: it counts as set (`AFFD`).
    Ignore,
    /// The walk sets it (`HA`).
    Update,
}

/// Format of a table's permissions and attributes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Stage 1.
    Stage1 {
        /// AP\[1\] permits unprivileged accesses, the only ones that devices
        /// make. `false` in the EL2 regime, where AP\[1\] is ignored.
        unprivileged: bool,
        /// Table descriptors restrict the levels below them (without `HAD`).
        hierarchical: bool,
    },
    /// Stage 2.
    Stage2 {
        /// Memory attributes are in the format of `S2FWB`.
        forced_attributes: bool,
    },
}

/// A translation table and the parameters of its walks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Table {
    /// Size of a page and of a table.
    pub granule: Granule,
    /// Address of the starting-level table, aligned to its size.
    pub base: u64,
    /// Bits of an input address.
    pub input_bits: u32,
    /// Level at which a walk starts.
    pub start_level: u32,
    /// Bits of an output address, and of a table's address.
    pub output_bits: u32,
    /// Descriptors of 64 KiB tables hold bits 51:48 of an address.
    pub wide: bool,
    /// Effect of a clear access flag.
    pub access_flag: AccessFlag,
    /// The walk updates dirty state (`HD`).
    pub dirty: bool,
    /// Format of permissions and attributes.
    pub format: Format,
}

const VALID: u64 = 1 << 0;
const TABLE_OR_PAGE: u64 = 1 << 1;
const UNPRIVILEGED: u64 = 1 << 6;
const READ_ONLY: u64 = 1 << 7;
const S2_READ: u64 = 1 << 6;
const S2_WRITE: u64 = 1 << 7;
pub(super) const ACCESSED: u64 = 1 << 10;
pub(super) const NOT_GLOBAL: u64 = 1 << 11;
const DIRTY_MODIFIER: u64 = 1 << 51;
pub(super) const CONTIGUOUS: u64 = 1 << 52;
pub(super) const SOFTWARE: u64 = 0xf << 55;
pub(super) const TABLE_UNPRIVILEGED_OFF: u64 = 1 << 61;
pub(super) const TABLE_READ_ONLY: u64 = 1 << 62;

/// Kind of a descriptor.
pub(super) enum Kind {
    Invalid,
    Table,
    Leaf,
}

impl Table {
    /// Bytes of the starting-level table's alignment (DDI 0487 §D8.2.5): its
    /// size, at least 16, or 64 when addresses have 52 bits.
    pub(super) const fn alignment(&self) -> u64 {
        let entries = 1_u64 << (self.input_bits - self.granule.shift(self.start_level));
        let least = if self.output_bits > 48 { 64 } else { 16 };
        let size = entries * 8;
        if size > least { size } else { least }
    }

    pub(super) const fn kind(&self, descriptor: u64, level: u32) -> Kind {
        if descriptor & VALID == 0 {
            return Kind::Invalid;
        }
        let table_or_page = descriptor & TABLE_OR_PAGE != 0;
        if level == 3 {
            return if table_or_page {
                Kind::Leaf
            } else {
                Kind::Invalid
            };
        }
        if table_or_page {
            return Kind::Table;
        }
        let block = match self.granule {
            Granule::K4 => level == 1 || level == 2,
            Granule::K16 => level == 2,
            Granule::K64 => level == 2 || level == 1 && self.wide,
        };
        if block { Kind::Leaf } else { Kind::Invalid }
    }

    /// Output address of a descriptor, with the low `bits` bits clear.
    pub(super) const fn address(&self, descriptor: u64, bits: u32) -> u64 {
        let low = descriptor & 0x0000_ffff_ffff_ffff & !((1 << bits) - 1);
        if self.wide && matches!(self.granule, Granule::K64) {
            low | (descriptor >> 12 & 0xf) << 48
        } else {
            low
        }
    }

    pub(super) const fn in_range(&self, address: u64) -> bool {
        address >> self.output_bits == 0
    }

    pub(super) fn index(&self, input: u64, level: u32) -> u64 {
        let bits = if level == self.start_level {
            self.input_bits - self.granule.shift(level)
        } else {
            self.granule.stride()
        };
        input >> self.granule.shift(level) & ((1 << bits) - 1)
    }

    /// Accesses that a leaf permits (DDI 0487 §D8.4), and whether a write is
    /// permitted by an update to the dirty state.
    pub(super) fn permissions(&self, descriptor: u64, above: Above) -> (Perm, bool) {
        let clean = self.dirty && descriptor & DIRTY_MODIFIER != 0;
        match self.format {
            Format::Stage1 { unprivileged, .. } => {
                let reachable =
                    !unprivileged || descriptor & UNPRIVILEGED != 0 && above.unprivileged;
                if !reachable {
                    return (Perm::empty(), false);
                }
                let writable = descriptor & READ_ONLY == 0;
                if !above.writable || !writable && !clean {
                    (Perm::READ, false)
                } else if writable {
                    (Perm::READ_WRITE, false)
                } else {
                    (Perm::READ, true)
                }
            }
            Format::Stage2 { .. } => {
                let read = if descriptor & S2_READ != 0 {
                    Perm::READ
                } else {
                    Perm::empty()
                };
                if descriptor & S2_WRITE != 0 {
                    (read | Perm::WRITE, false)
                } else {
                    (read, clean)
                }
            }
        }
    }

    /// Stage 2: whether the memory is Device (DDI 0487 §D8.6).
    pub(super) fn is_device(&self, descriptor: u64) -> bool {
        match self.format {
            Format::Stage1 { .. } => false,
            Format::Stage2 {
                forced_attributes: false,
            } => descriptor >> 4 & 3 == 0,
            Format::Stage2 {
                forced_attributes: true,
            } => descriptor >> 4 & 1 == 0,
        }
    }

    /// `descriptor` in the dirty state.
    pub(super) const fn dirtied(&self, descriptor: u64) -> u64 {
        match self.format {
            Format::Stage1 { .. } => descriptor & !READ_ONLY,
            Format::Stage2 { .. } => descriptor | S2_WRITE,
        }
    }
}

/// Accesses that the table descriptors above a leaf permit.
#[derive(Clone, Copy)]
pub(super) struct Above {
    pub(super) writable: bool,
    pub(super) unprivileged: bool,
}
