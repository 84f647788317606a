//! Walks of VMSAv8-64 translation tables (Arm ARM DDI 0487 §D8; IHI 0070
//! §3.3, §3.13 and §7.3.22 for the order of faults).

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes as _, GuestAddress, GuestMemoryBackend as _, VolatileMemory as _};

use super::descriptor::{
    ACCESSED, Above, AccessFlag, CONTIGUOUS, Format, Granule, Kind, NOT_GLOBAL, SOFTWARE,
    TABLE_READ_ONLY, TABLE_UNPRIVILEGED_OFF, Table,
};
use crate::mapping::{Access, Perm};
use crate::ram::GuestRam;

/// How often an update of a descriptor is tried again when the guest changes
/// it at the same time.
const MAX_RETRIES: u32 = 16;
/// Neighbours are read in the 4 KiB around a descriptor: 512 descriptors.
const WINDOW: u64 = 512;

/// Parameters of a walk.
#[derive(Clone, Copy, Debug)]
pub(super) struct WalkRequest {
    /// The access.
    pub access: Access,
    /// Whether flags in descriptors may be updated. Otherwise an access that
    /// would need it faults.
    pub update: bool,
    /// Whether to look for neighbours that continue the page or block.
    pub run: bool,
    /// Whether to look for the end of a gap, for [`WalkFault::beyond`].
    pub gap: bool,
}

/// Result of a walk: a run of input addresses with one translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leaf {
    /// First input address.
    pub first: u64,
    /// Last input address, inclusive.
    pub last: u64,
    /// Output address of the first.
    pub output: u64,
    /// Accesses that are permitted.
    pub perm: Perm,
    /// Valid for every ASID (nG clear).
    pub global: bool,
    /// Bits of an offset in the page, block or contiguous group that the walk
    /// ended at: what one invalidation by address takes away.
    pub shift: u32,
    /// It is part of a contiguous group.
    pub grouped: bool,
    /// Stage 2 maps it as Device memory.
    pub device: bool,
}

impl Leaf {
    /// Output address of `input`, which lies in the run.
    pub(super) const fn output_of(&self, input: u64) -> u64 {
        self.output.wrapping_add(input.wrapping_sub(self.first))
    }
}

/// Cause of a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Cause {
    /// `F_TRANSLATION`
    Translation,
    /// `F_ADDR_SIZE`
    AddressSize,
    /// `F_ACCESS`
    AccessFlag,
    /// `F_PERMISSION`
    Permission,
    /// `F_WALK_EABT`
    External,
}

/// Purpose of the access that faulted: CLASS of an event (§7.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    /// Fetching a context descriptor.
    Cd = 0,
    /// Reading or updating a stage 1 table.
    Table = 1,
    /// The input address.
    Input = 2,
}

/// A walk that faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct WalkFault {
    /// Cause.
    pub cause: Cause,
    /// At stage 2.
    pub stage2: bool,
    /// Purpose of the access.
    pub class: Class,
    /// Input address of stage 2; of no meaning at stage 1.
    pub ipa: u64,
    /// Physical address of the descriptor that could not be read; only for
    /// [`Cause::External`].
    pub fetch: u64,
    /// The access that faults updates a stage 1 descriptor.
    pub table_write: bool,
    /// Bits of the span around the input address that faults alike; 64 when
    /// the address lies outside of what the table covers.
    pub span: u32,
    /// Input addresses behind the span that fault alike, as far as a 4 KiB
    /// window of invalid descriptors shows; 0 without [`WalkRequest::gap`].
    pub beyond: u64,
}

/// Reads a descriptor, or `None` outside of RAM.
fn read(ram: &GuestRam, address: u64) -> Option<u64> {
    ram.load(GuestAddress(address), Ordering::Acquire)
        .ok()
        .map(u64::from_le)
}

/// Replaces the descriptor `old` by `new`; `None` outside of RAM, else whether
/// it was still `old` (§3.13: the update is atomic).
fn exchange(ram: &GuestRam, address: u64, old: u64, new: u64) -> Option<bool> {
    let slice = ram.get_slice(GuestAddress(address), 8).ok()?;
    let descriptor = slice.get_atomic_ref::<AtomicU64>(0).ok()?;
    let changed = descriptor.compare_exchange(
        old.to_le(),
        new.to_le(),
        Ordering::AcqRel,
        Ordering::Acquire,
    );
    Some(changed.is_ok())
}

/// One walk.
struct Walk<'a> {
    ram: &'a GuestRam,
    table: &'a Table,
    /// Stage 2 through which a stage 1 table is reached, and whether Device
    /// memory there faults (`S2PTW`).
    under: Option<(&'a Table, bool)>,
    input: u64,
    want: WalkRequest,
}

/// Walks `table` for `input`. A stage 1 table is itself reached through
/// `under`, in a nested configuration; its second part is `S2PTW`.
///
/// # Errors
/// The [`WalkFault`], with [`Class::Input`] for the faults of stage 2 that do not
/// come from `under`.
pub(super) fn walk(
    ram: &GuestRam,
    table: &Table,
    under: Option<(&Table, bool)>,
    input: u64,
    want: WalkRequest,
) -> Result<Leaf, WalkFault> {
    let walk = Walk {
        ram,
        table,
        under,
        input,
        want,
    };
    if input >> table.input_bits != 0 {
        return Err(walk.stop(Cause::Translation, 64));
    }
    walk.run()
}

/// Translates `ipa`, of a CD or a stage 1 descriptor, through stage 2.
///
/// # Errors
/// The [`WalkFault`] of stage 2, with `class`.
pub(super) fn through_stage2(
    ram: &GuestRam,
    (table, protect): (&Table, bool),
    ipa: u64,
    class: Class,
    want: WalkRequest,
) -> Result<u64, WalkFault> {
    let write = want.access == Access::Write;
    let leaf = walk(
        ram,
        table,
        None,
        ipa,
        WalkRequest {
            run: false,
            gap: false,
            ..want
        },
    );
    let stop = |stop: WalkFault| WalkFault {
        class,
        table_write: write,
        ..stop
    };
    let leaf = leaf.map_err(stop)?;
    if leaf.device && protect {
        return Err(stop(WalkFault {
            cause: Cause::Permission,
            stage2: true,
            class,
            ipa,
            fetch: 0,
            table_write: write,
            span: table.granule.bits(),
            beyond: 0,
        }));
    }
    Ok(leaf.output_of(ipa))
}

impl Walk<'_> {
    fn stop(&self, cause: Cause, span: u32) -> WalkFault {
        let stage2 = matches!(self.table.format, Format::Stage2 { .. });
        let class = if !stage2 && cause == Cause::External {
            Class::Table
        } else {
            Class::Input
        };
        WalkFault {
            cause,
            stage2,
            class,
            ipa: if stage2 { self.input } else { 0 },
            fetch: 0,
            table_write: false,
            span,
            beyond: 0,
        }
    }

    /// Physical address of the descriptor at `address`.
    fn locate(&self, address: u64, access: Access) -> Result<u64, WalkFault> {
        let Some(under) = self.under else {
            return Ok(address);
        };
        let want = WalkRequest {
            access,
            ..self.want
        };
        through_stage2(self.ram, under, address, Class::Table, want)
    }

    fn run(&self) -> Result<Leaf, WalkFault> {
        let table = self.table;
        let mut above = Above {
            writable: true,
            unprivileged: true,
        };
        let mut base = table.base;
        let mut level = table.start_level;
        let mut retries = 0;
        loop {
            let shift = table.granule.shift(level);
            let address = base + table.index(self.input, level) * 8;
            let place = self.locate(address, Access::Read)?;
            let Some(descriptor) = read(self.ram, place) else {
                return Err(self.external(place, shift));
            };
            match table.kind(descriptor, level) {
                Kind::Invalid => return Err(self.invalid(place, level)),
                Kind::Table => {
                    base = table.address(descriptor, table.granule.bits());
                    if !table.in_range(base) {
                        return Err(self.stop(Cause::AddressSize, shift));
                    }
                    if matches!(
                        table.format,
                        Format::Stage1 {
                            hierarchical: true,
                            ..
                        }
                    ) {
                        above.writable &= descriptor & TABLE_READ_ONLY == 0;
                        above.unprivileged &= descriptor & TABLE_UNPRIVILEGED_OFF == 0;
                    }
                    level += 1;
                }
                Kind::Leaf => {
                    let updated = self.admit(descriptor, shift, above)?;
                    if updated != descriptor {
                        let place = self.locate(address, Access::Write)?;
                        match exchange(self.ram, place, descriptor, updated) {
                            Some(true) => {}
                            Some(false) if retries < MAX_RETRIES => {
                                retries += 1;
                                continue;
                            }
                            _ => return Err(self.external(place, shift)),
                        }
                    }
                    return Ok(self.leaf(updated, place, level, above));
                }
            }
        }
    }

    /// How many descriptors of the same table are below and beyond the one at
    /// `place`, in a window of 4 KiB: it never leaves the page that the table
    /// lies in.
    fn neighbours(&self, place: u64, level: u32) -> (u64, u64) {
        let table = self.table;
        let index = table.index(self.input, level);
        let entries = if level == table.start_level {
            1 << (table.input_bits - table.granule.shift(level))
        } else {
            1 << table.granule.stride()
        };
        let slot = place / 8 % WINDOW;
        (slot.min(index), (WINDOW - slot).min(entries - index) - 1)
    }

    /// The fault of an invalid descriptor.
    fn invalid(&self, place: u64, level: u32) -> WalkFault {
        let shift = self.table.granule.shift(level);
        let stop = self.stop(Cause::Translation, shift);
        if !self.want.gap {
            return stop;
        }
        let (_, beyond) = self.neighbours(place, level);
        let is_invalid = |step: &u64| {
            let next = read(self.ram, place + step * 8);
            next.is_some_and(|next| matches!(self.table.kind(next, level), Kind::Invalid))
        };
        let further = (1..=beyond).take_while(is_invalid).count() as u64;
        WalkFault {
            beyond: further << shift,
            ..stop
        }
    }

    fn external(&self, place: u64, shift: u32) -> WalkFault {
        WalkFault {
            fetch: place,
            ..self.stop(Cause::External, shift)
        }
    }

    /// Checks the access at a leaf, in the order of §7.3.22. Answers how the
    /// descriptor looks when the flags that the access sets are set.
    fn admit(&self, descriptor: u64, shift: u32, above: Above) -> Result<u64, WalkFault> {
        let table = self.table;
        if !table.in_range(table.address(descriptor, shift)) {
            return Err(self.stop(Cause::AddressSize, shift));
        }
        let mut updated = descriptor;
        if descriptor & ACCESSED == 0 {
            match table.access_flag {
                AccessFlag::Ignore => {}
                AccessFlag::Update if self.want.update => updated |= ACCESSED,
                _ => return Err(self.stop(Cause::AccessFlag, shift)),
            }
        }
        let (perm, clean) = table.permissions(descriptor, above);
        if !perm.allows(self.want.access) {
            if self.want.access == Access::Read || !clean || !self.want.update {
                return Err(self.stop(Cause::Permission, shift));
            }
            updated = table.dirtied(updated);
        }
        Ok(updated)
    }

    /// The page or block of `descriptor`, with the neighbours that continue it.
    fn leaf(&self, descriptor: u64, place: u64, level: u32, above: Above) -> Leaf {
        let table = self.table;
        let shift = table.granule.shift(level);
        let size = 1_u64 << shift;
        let (perm, _) = table.permissions(descriptor, above);
        let mut leaf = Leaf {
            first: self.input & !(size - 1),
            last: self.input | (size - 1),
            output: table.address(descriptor, shift),
            perm,
            global: descriptor & NOT_GLOBAL == 0,
            shift: if descriptor & CONTIGUOUS == 0 {
                shift
            } else {
                shift + table.granule.contiguous(level)
            },
            grouped: descriptor & CONTIGUOUS != 0,
            device: table.is_device(descriptor),
        };
        if !self.want.run {
            return leaf;
        }
        let (below, beyond) = self.neighbours(place, level);
        for step in 1..=below {
            let Some(output) = leaf.output.checked_sub(size) else {
                break;
            };
            if !self.continues(descriptor, place - step * 8, level, output) {
                break;
            }
            leaf.first -= size;
            leaf.output = output;
        }
        for step in 1..=beyond {
            let output = leaf.output + (leaf.last - leaf.first) + 1;
            if !self.continues(descriptor, place + step * 8, level, output) {
                break;
            }
            leaf.last += size;
        }
        leaf
    }

    /// Whether the descriptor at `place` maps to `output` as `descriptor` does.
    fn continues(&self, descriptor: u64, place: u64, level: u32, output: u64) -> bool {
        let table = self.table;
        let shift = table.granule.shift(level);
        let Some(other) = read(self.ram, place) else {
            return false;
        };
        let address = !((1 << 12) - 1) & 0x0000_ffff_ffff_ffff
            | if table.wide && matches!(table.granule, Granule::K64) {
                0xf << 12
            } else {
                0
            };
        let free = address | CONTIGUOUS | SOFTWARE;
        (other ^ descriptor) & !free == 0
            && table.in_range(output)
            && table.address(other, shift) == output
    }
}
