//! What a driver has posted on a split queue (virtio 1.2 §2.7), read from the
//! outside: for translating buffers before the kernel misses them, and for
//! finding out why it stopped.

use std::cell::Cell;

use iommu::{
    Access, Fault, FaultReason, GuestRam, Iova, IovaRange, Mapping, StreamId, Translating,
};
use vm_memory::{Bytes as _, GuestAddress};

/// Most descriptors that are looked at in one walk.
const MAX_STEPS: usize = 1024;
const DESCRIPTOR: u64 = 16;
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A bound on work of which the guest chooses the amount: descriptors that are
/// read, entries that are looked up.
pub struct Steps(Cell<usize>);

impl Steps {
    /// So many steps.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self(Cell::new(count))
    }

    /// Takes a step. `false` when none is left.
    pub fn spend(&self) -> bool {
        let left = self.0.get().checked_sub(1);
        self.0.set(left.unwrap_or(0));
        left.is_some()
    }

    /// Whether none is left.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.get() == 0
    }
}

/// Where a queue's rings are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Entries.
    pub size: u16,
    /// The descriptor table.
    pub desc: Iova,
    /// The available ring.
    pub avail: Iova,
    /// The used ring.
    pub used: Iova,
}

impl Layout {
    /// The three rings and how the device accesses them, or `None` when one
    /// runs beyond the address space. The used ring comes first: the kernel
    /// wants it earliest.
    #[must_use]
    pub fn parts(&self) -> Option<[Buffer; 3]> {
        let size = u64::from(self.size);
        let part = |first, bytes, access| {
            let iova = IovaRange::from_len(first, bytes).ok()?;
            Some(Buffer { iova, access })
        };
        Some([
            part(self.used, 6 + 8 * size, Access::Write)?,
            part(self.desc, DESCRIPTOR * size, Access::Read)?,
            part(self.avail, 6 + 2 * size, Access::Read)?,
        ])
    }
}

/// A piece of memory that the device is to access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where.
    pub iova: IovaRange,
    /// How.
    pub access: Access,
}

/// Why a queue cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreadable {
    /// Its rings are not mapped.
    Fault(Fault),
    /// The driver broke the rules of the ring.
    Malformed(&'static str),
}

/// The memory of a stream, read while its gate is held and leaving no trace.
pub struct Memory<'a> {
    inside: &'a Translating<'a>,
    ram: &'a GuestRam,
    last: Cell<Option<Mapping>>,
}

impl<'a> Memory<'a> {
    /// The memory that `inside` translates to.
    #[must_use]
    pub fn new(inside: &'a Translating<'a>, ram: &'a GuestRam) -> Self {
        Self {
            inside,
            ram,
            last: Cell::new(None),
        }
    }

    fn read(&self, iova: Iova, bytes: &mut [u8]) -> Result<(), Unreadable> {
        let (mut at, mut rest) = (iova, bytes);
        while !rest.is_empty() {
            let mapping = self.mapping(at)?;
            let gpa = mapping.gpa_of(at).ok_or_else(|| outside(at))?;
            let left = (mapping.iova.last().0 - at.0).saturating_add(1);
            let count = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at_mut(count);
            self.ram
                .read_slice(now, GuestAddress(gpa.0))
                .map_err(|_| outside(at))?;
            at = Iova(at.0.wrapping_add(count as u64));
            rest = later;
        }
        Ok(())
    }

    fn mapping(&self, iova: Iova) -> Result<Mapping, Unreadable> {
        if let Some(last) = self.last.get().filter(|last| last.iova.contains(iova)) {
            return Ok(last);
        }
        let found = self.inside.lookup(iova, Access::Read);
        let found = found.map_err(Unreadable::Fault)?;
        self.last.set(Some(found));
        Ok(found)
    }

    fn u16_at(&self, base: Iova, offset: u64) -> Result<u16, Unreadable> {
        let mut bytes = [0; 2];
        self.read(offset_from(base, offset)?, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// How many buffers the device has given back, modulo 2^16.
    ///
    /// # Errors
    /// [`Unreadable`], if the used ring cannot be read.
    pub fn used(&self, layout: &Layout) -> Result<u16, Unreadable> {
        self.u16_at(layout.used, 2)
    }

    fn descriptor(&self, table: Iova, index: u64) -> Result<Descriptor, Unreadable> {
        let mut bytes = [0; 16];
        self.read(offset_from(table, DESCRIPTOR * index)?, &mut bytes)?;
        let [
            a0,
            a1,
            a2,
            a3,
            a4,
            a5,
            a6,
            a7,
            l0,
            l1,
            l2,
            l3,
            f0,
            f1,
            n0,
            n1,
        ] = bytes;
        Ok(Descriptor {
            address: Iova(u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7])),
            len: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }
}

fn outside(iova: Iova) -> Unreadable {
    Unreadable::Fault(Fault {
        stream: StreamId::default(),
        iova,
        access: Access::Read,
        reason: FaultReason::NotRam,
    })
}

fn offset_from(base: Iova, offset: u64) -> Result<Iova, Unreadable> {
    base.checked_add(offset).ok_or_else(|| outside(base))
}

struct Descriptor {
    address: Iova,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// What it describes; `None` when that is nothing. What would run beyond
    /// the address space ends there.
    fn buffer(&self) -> Option<Buffer> {
        let extent = u64::from(self.len).checked_sub(1)?;
        let last = Iova(self.address.0.saturating_add(extent));
        Some(Buffer {
            iova: IovaRange::new(self.address, last).ok()?,
            access: if self.has(WRITE) {
                Access::Write
            } else {
                Access::Read
            },
        })
    }
}

/// The buffers that the driver made available and has not got back, in the
/// order in which an in-order device takes them; a bounded number of them, and
/// one step for each descriptor.
///
/// # Errors
/// [`Unreadable`]; what was found before is lost.
pub fn posted(
    memory: &Memory<'_>,
    layout: &Layout,
    steps: &Steps,
) -> Result<Vec<Buffer>, Unreadable> {
    let available = memory.u16_at(layout.avail, 2)?;
    let used = memory.used(layout)?;
    let count = available.wrapping_sub(used);
    if count > layout.size {
        return Err(Unreadable::Malformed(
            "it has more buffers available than entries",
        ));
    }
    let mut walk = Walk {
        memory,
        steps,
        walked: 0,
        buffers: Vec::new(),
    };
    for turn in 0..count {
        let entry = used.wrapping_add(turn) & (layout.size.wrapping_sub(1));
        let head = memory.u16_at(layout.avail, 4 + 2 * u64::from(entry))?;
        let table = Table {
            first: layout.desc,
            entries: u64::from(layout.size),
            indirect: false,
        };
        walk.chain(&table, u64::from(head))?;
        if walk.is_long() {
            break;
        }
    }
    Ok(walk.buffers)
}

/// A table of descriptors: the queue's own, or one that a descriptor refers to.
struct Table {
    first: Iova,
    entries: u64,
    indirect: bool,
}

/// A walk over chains, as long as the driver makes it and no longer than we
/// have time for.
struct Walk<'m> {
    memory: &'m Memory<'m>,
    steps: &'m Steps,
    /// Descriptors of this walk.
    walked: usize,
    buffers: Vec<Buffer>,
}

impl Walk<'_> {
    fn is_long(&self) -> bool {
        self.walked >= MAX_STEPS || self.steps.is_over()
    }

    fn chain(&mut self, table: &Table, head: u64) -> Result<(), Unreadable> {
        let mut index = head;
        let mut writable = false;
        for _ in 0..table.entries {
            if index >= table.entries {
                return Err(Unreadable::Malformed("a descriptor lies outside its table"));
            }
            self.walked += 1;
            self.steps.spend();
            let descriptor = self.memory.descriptor(table.first, index)?;
            if descriptor.has(INDIRECT) {
                self.refer(table, &descriptor)?;
            } else {
                if writable && !descriptor.has(WRITE) {
                    return Err(Unreadable::Malformed("a chain reads after it writes"));
                }
                writable = descriptor.has(WRITE);
                self.buffers.extend(descriptor.buffer());
            }
            if !descriptor.has(NEXT) || self.is_long() {
                return Ok(());
            }
            index = u64::from(descriptor.next);
        }
        Err(Unreadable::Malformed("a chain of descriptors has no end"))
    }

    /// Follows a descriptor to the table that it refers to (§2.7.5.3).
    fn refer(&mut self, from: &Table, to: &Descriptor) -> Result<(), Unreadable> {
        let len = u64::from(to.len);
        if from.indirect {
            return Err(Unreadable::Malformed("an indirect table refers to another"));
        }
        if len == 0 || len % DESCRIPTOR != 0 {
            return Err(Unreadable::Malformed("an indirect table has an odd length"));
        }
        let access = Access::Read;
        let itself = to.buffer().map(|buffer| Buffer { access, ..buffer });
        self.buffers.extend(itself);
        let table = Table {
            first: to.address,
            entries: len / DESCRIPTOR,
            indirect: true,
        };
        match self.chain(&table, 0) {
            // Whoever translates the table itself will see.
            Err(Unreadable::Fault(_)) => Ok(()),
            done => done,
        }
    }
}

#[cfg(test)]
mod tests;
