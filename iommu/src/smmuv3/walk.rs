//! Walks of VMSAv8-64 translation tables (Arm ARM DDI 0487 §D8; IHI 0070
//! §3.3, §3.13 and §7.3.22 for the order of faults).

use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::{Bytes as _, GuestMemoryBackend as _, VolatileMemory as _};

use super::address::{Address, Ipa, Va};
use super::cd::TtbRegion;
use super::descriptor::{
    ACCESSED, Above, AccessFlag, CONTIGUOUS, Format, Granule, Kind, NOT_GLOBAL, SOFTWARE,
    TABLE_READ_ONLY, TABLE_UNPRIVILEGED_OFF, Table,
};
use super::ste::Stage2;
use crate::addr::Gpa;
use crate::mapping::{Access, Perm};
use crate::ram::GuestRam;

/// Retries of a descriptor update that the guest interferes with.
const MAX_RETRIES: u32 = 16;
/// Descriptors in the aligned 4 KiB around one, where neighbours are read.
const WINDOW: u64 = 512;

/// Parameters of a walk.
#[derive(Clone, Copy, Debug)]
pub(super) struct WalkRequest {
    /// Direction of the access.
    pub access: Access,
    /// Whether flags in descriptors may be updated. If not, an access that
    /// needs an update faults.
    pub update: bool,
    /// Whether to extend the result by neighbours that continue the mapping.
    pub run: bool,
    /// Whether to compute [`WalkFault::beyond`].
    pub gap: bool,
}

/// Result of a walk: a run of input addresses with one translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Leaf<I, O> {
    /// First input address, inclusive.
    pub first: I,
    /// Last input address, inclusive.
    pub last: I,
    /// Output address of `first`.
    pub output: O,
    /// Accesses that are permitted.
    pub perm: Perm,
    /// Valid for every ASID (nG clear).
    pub global: bool,
    /// Size of the page, block or contiguous group at which the walk ended, as
    /// a shift. One invalidation by address removes all of it.
    pub shift: u32,
    /// The page or block is part of a contiguous group.
    pub grouped: bool,
    /// Stage 2 maps it as Device memory.
    pub device: bool,
}

impl<I: Address, O: Address> Leaf<I, O> {
    /// Output address of `input`, which must be in the run.
    pub(super) fn output_of(&self, input: I) -> O {
        let offset = input.bits().wrapping_sub(self.first.bits());
        O::new(self.output.bits().wrapping_add(offset))
    }

    /// The same run in other address spaces.
    fn cast<J: Address, P: Address>(self) -> Leaf<J, P> {
        Leaf {
            first: J::new(self.first.bits()),
            last: J::new(self.last.bits()),
            output: P::new(self.output.bits()),
            perm: self.perm,
            global: self.global,
            shift: self.shift,
            grouped: self.grouped,
            device: self.device,
        }
    }
}

impl Leaf<Va, Ipa> {
    /// The translation without stage 2: the output is physical.
    pub(super) fn physical(self) -> Leaf<Va, Gpa> {
        self.cast()
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
    /// Kind of the fault, which decides its event.
    pub cause: Cause,
    /// The fault is of stage 2.
    pub stage2: bool,
    /// Purpose of the access.
    pub class: Class,
    /// Input address of stage 2; undefined for a fault of stage 1.
    pub ipa: Ipa,
    /// Address of the descriptor that could not be read; only for
    /// [`Cause::External`].
    pub fetch: Gpa,
    /// The access that faults updates a stage 1 descriptor.
    pub table_write: bool,
    /// Size of the aligned span around the input address with the same fault,
    /// as a shift; 64 for an address outside of the table's input range.
    pub span: u32,
    /// Number of input addresses above the span with the same fault, within a
    /// 4 KiB window of descriptors; 0 without [`WalkRequest::gap`].
    pub beyond: u64,
}

/// Reads a descriptor, or `None` outside of RAM.
fn read(ram: &GuestRam, address: Gpa) -> Option<u64> {
    ram.load(address.into(), Ordering::Acquire)
        .ok()
        .map(u64::from_le)
}

/// Replaces the descriptor `old` with `new` atomically (§3.13). Returns whether
/// it was still `old`, or `None` outside of RAM.
fn exchange(ram: &GuestRam, address: Gpa, old: u64, new: u64) -> Option<bool> {
    let slice = ram.get_slice(address.into(), 8).ok()?;
    let descriptor = slice.get_atomic_ref::<AtomicU64>(0).ok()?;
    let changed = descriptor.compare_exchange(
        old.to_le(),
        new.to_le(),
        Ordering::AcqRel,
        Ordering::Acquire,
    );
    Some(changed.is_ok())
}

/// State of one walk.
struct Walk<'a> {
    ram: &'a GuestRam,
    table: &'a Table,
    /// Stage 2, which translates the addresses of stage 1 descriptors.
    under: Option<&'a Stage2>,
    input: u64,
    request: WalkRequest,
}

/// Walks the stage 1 table of `region` for `input`. In a nested configuration,
/// stage 2 translates the addresses of its descriptors.
///
/// # Errors
/// The [`WalkFault`]
pub(super) fn walk_stage1(
    ram: &GuestRam,
    region: &TtbRegion,
    under: Option<&Stage2>,
    input: Va,
    request: WalkRequest,
) -> Result<Leaf<Va, Ipa>, WalkFault> {
    walk(ram, &region.table, under, input.0, request).map(Leaf::cast)
}

/// Walks the stage 2 table for `input`.
///
/// # Errors
/// The [`WalkFault`], with [`Class::Input`].
pub(super) fn walk_stage2(
    ram: &GuestRam,
    stage2: &Stage2,
    input: Ipa,
    request: WalkRequest,
) -> Result<Leaf<Ipa, Gpa>, WalkFault> {
    walk(ram, &stage2.table, None, input.0, request).map(Leaf::cast)
}

fn walk(
    ram: &GuestRam,
    table: &Table,
    under: Option<&Stage2>,
    input: u64,
    request: WalkRequest,
) -> Result<Leaf<u64, u64>, WalkFault> {
    let walk = Walk {
        ram,
        table,
        under,
        input,
        request,
    };
    if input >> table.input_bits != 0 {
        return Err(walk.fault(Cause::Translation, 64));
    }
    walk.run()
}

/// Translates `ipa`, of a CD or a stage 1 descriptor, through stage 2.
///
/// # Errors
/// The [`WalkFault`] of stage 2, with `class`.
pub(super) fn through_stage2(
    ram: &GuestRam,
    stage2: &Stage2,
    ipa: Ipa,
    class: Class,
    request: WalkRequest,
) -> Result<Gpa, WalkFault> {
    let write = request.access == Access::Write;
    let request = WalkRequest {
        run: false,
        gap: false,
        ..request
    };
    let with_class = |fault: WalkFault| WalkFault {
        class,
        table_write: write,
        ..fault
    };
    let leaf = walk_stage2(ram, stage2, ipa, request).map_err(with_class)?;
    if leaf.device && stage2.protect_walks {
        return Err(WalkFault {
            cause: Cause::Permission,
            stage2: true,
            class,
            ipa,
            fetch: Gpa(0),
            table_write: write,
            span: stage2.table.granule.bits(),
            beyond: 0,
        });
    }
    Ok(leaf.output_of(ipa))
}

impl Walk<'_> {
    fn fault(&self, cause: Cause, span: u32) -> WalkFault {
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
            ipa: Ipa(if stage2 { self.input } else { 0 }),
            fetch: Gpa(0),
            table_write: false,
            span,
            beyond: 0,
        }
    }

    /// Physical address of the descriptor at `address`.
    fn locate(&self, address: u64, access: Access) -> Result<Gpa, WalkFault> {
        let Some(under) = self.under else {
            return Ok(Gpa(address));
        };
        let request = WalkRequest {
            access,
            ..self.request
        };
        through_stage2(self.ram, under, Ipa(address), Class::Table, request)
    }

    fn run(&self) -> Result<Leaf<u64, u64>, WalkFault> {
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
                        return Err(self.fault(Cause::AddressSize, shift));
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

    /// Number of descriptors of the same table below and above the one at
    /// `place`, in an aligned window of 4 KiB, which the walk may read without
    /// another translation.
    fn neighbours(&self, place: Gpa, level: u32) -> (u64, u64) {
        let table = self.table;
        let index = table.index(self.input, level);
        let entries = if level == table.start_level {
            1 << (table.input_bits - table.granule.shift(level))
        } else {
            1 << table.granule.stride()
        };
        let slot = place.0 / 8 % WINDOW;
        (slot.min(index), (WINDOW - slot).min(entries - index) - 1)
    }

    /// The fault of an invalid descriptor.
    fn invalid(&self, place: Gpa, level: u32) -> WalkFault {
        let shift = self.table.granule.shift(level);
        let fault = self.fault(Cause::Translation, shift);
        if !self.request.gap {
            return fault;
        }
        let (_, beyond) = self.neighbours(place, level);
        let is_invalid = |step: &u64| {
            let next = read(self.ram, Gpa(place.0 + step * 8));
            next.is_some_and(|next| matches!(self.table.kind(next, level), Kind::Invalid))
        };
        let further = (1..=beyond).take_while(is_invalid).count() as u64;
        WalkFault {
            beyond: further << shift,
            ..fault
        }
    }

    fn external(&self, place: Gpa, shift: u32) -> WalkFault {
        WalkFault {
            fetch: place,
            ..self.fault(Cause::External, shift)
        }
    }

    /// Checks the access at a leaf, in the order of §7.3.22. Returns the
    /// descriptor with the flags that the access sets.
    fn admit(&self, descriptor: u64, shift: u32, above: Above) -> Result<u64, WalkFault> {
        let table = self.table;
        if !table.in_range(table.address(descriptor, shift)) {
            return Err(self.fault(Cause::AddressSize, shift));
        }
        let mut updated = descriptor;
        if descriptor & ACCESSED == 0 {
            match table.access_flag {
                AccessFlag::Ignore => {}
                AccessFlag::Update if self.request.update => updated |= ACCESSED,
                _ => return Err(self.fault(Cause::AccessFlag, shift)),
            }
        }
        let (perm, clean) = table.permissions(descriptor, above);
        if !perm.allows(self.request.access) {
            if self.request.access == Access::Read || !clean || !self.request.update {
                return Err(self.fault(Cause::Permission, shift));
            }
            updated = table.dirtied(updated);
        }
        Ok(updated)
    }

    /// The page or block of `descriptor`, with the neighbours that continue it.
    fn leaf(&self, descriptor: u64, place: Gpa, level: u32, above: Above) -> Leaf<u64, u64> {
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
        if !self.request.run {
            return leaf;
        }
        let (below, beyond) = self.neighbours(place, level);
        for step in 1..=below {
            let Some(output) = leaf.output.checked_sub(size) else {
                break;
            };
            if !self.continues(descriptor, Gpa(place.0 - step * 8), level, output) {
                break;
            }
            leaf.first -= size;
            leaf.output = output;
        }
        for step in 1..=beyond {
            let output = leaf.output + (leaf.last - leaf.first) + 1;
            if !self.continues(descriptor, Gpa(place.0 + step * 8), level, output) {
                break;
            }
            leaf.last += size;
        }
        leaf
    }

    /// Whether the descriptor at `place` maps to `output` with the attributes
    /// of `descriptor`.
    fn continues(&self, descriptor: u64, place: Gpa, level: u32, output: u64) -> bool {
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
