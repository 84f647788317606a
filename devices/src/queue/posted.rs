//! Reads the available buffers of a queue that the kernel serves: for
//! translating them before the kernel misses them, and for finding the cause of
//! an error.

use std::cell::Cell;

use iommu::{
    Access, Fault, FaultReason, GuestRam, Iova, IovaRange, Mapping, StreamId, Translating,
};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{ByteValued as _, Bytes as _, GuestAddress};

/// Upper bound on descriptors that are read in one walk.
const MAX_STEPS: usize = 1024;
/// Bytes of a descriptor.
const DESCRIPTOR: u64 = 16;

/// Budget for work whose amount the guest chooses: descriptors that are read,
/// entries that are looked up.
pub struct Steps(Cell<usize>);

impl Steps {
    /// A budget of `count` steps.
    #[must_use]
    pub fn new(count: usize) -> Self {
        Self(Cell::new(count))
    }

    /// Spends a step. `false` when none is left.
    pub fn spend(&self) -> bool {
        let left = self.0.get().checked_sub(1);
        self.0.set(left.unwrap_or(0));
        left.is_some()
    }

    /// Whether no step is left.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.get() == 0
    }
}

/// Size and I/O virtual addresses of a queue's rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Entries of each ring.
    pub size: u16,
    /// The descriptor table.
    pub desc: Iova,
    /// The available ring.
    pub avail: Iova,
    /// The used ring.
    pub used: Iova,
}

impl Layout {
    /// The three rings with the device's accesses, or `None` when one exceeds
    /// the address space. The used ring is first, because the kernel accesses
    /// it first.
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

/// Memory that the device accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// I/O virtual addresses, both ends inclusive.
    pub iova: IovaRange,
    /// Direction of the device's access.
    pub access: Access,
}

/// Error of reading a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RingReadError {
    /// A ring is not mapped to RAM.
    Fault(Fault),
    /// The driver broke a rule of the ring, named by the text.
    Malformed(&'static str),
}

/// Reads the memory of a stream while its gate is held, without recording
/// events.
pub struct Memory<'a> {
    inside: &'a Translating<'a>,
    ram: &'a GuestRam,
    last: Cell<Option<Mapping>>,
}

impl<'a> Memory<'a> {
    /// The memory of the stream whose gate `inside` holds.
    #[must_use]
    pub fn new(inside: &'a Translating<'a>, ram: &'a GuestRam) -> Self {
        Self {
            inside,
            ram,
            last: Cell::new(None),
        }
    }

    fn read(&self, iova: Iova, bytes: &mut [u8]) -> Result<(), RingReadError> {
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

    fn mapping(&self, iova: Iova) -> Result<Mapping, RingReadError> {
        if let Some(last) = self.last.get().filter(|last| last.iova.contains(iova)) {
            return Ok(last);
        }
        let found = self.inside.lookup(iova, Access::Read);
        let found = found.map_err(RingReadError::Fault)?;
        self.last.set(Some(found));
        Ok(found)
    }

    fn u16_at(&self, base: Iova, offset: u64) -> Result<u16, RingReadError> {
        let mut bytes = [0; 2];
        self.read(offset_from(base, offset)?, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    /// Index of the used ring: the number of used buffers modulo 2^16.
    ///
    /// # Errors
    /// [`RingReadError`], if the used ring cannot be read.
    pub fn used(&self, layout: &Layout) -> Result<u16, RingReadError> {
        self.u16_at(layout.used, 2)
    }

    fn descriptor(&self, table: Iova, index: u64) -> Result<Descriptor, RingReadError> {
        let mut descriptor = Descriptor::default();
        let at = offset_from(table, DESCRIPTOR * index)?;
        self.read(at, descriptor.as_mut_slice())?;
        Ok(descriptor)
    }
}

fn outside(iova: Iova) -> RingReadError {
    RingReadError::Fault(Fault {
        stream: StreamId::default(),
        iova,
        access: Access::Read,
        reason: FaultReason::NotRam,
    })
}

fn offset_from(base: Iova, offset: u64) -> Result<Iova, RingReadError> {
    base.checked_add(offset).ok_or_else(|| outside(base))
}

/// The buffer of a descriptor; `None` when its length is 0. A buffer that
/// exceeds the address space is cut at its end.
fn buffer(descriptor: &Descriptor) -> Option<Buffer> {
    let extent = u64::from(descriptor.len()).checked_sub(1)?;
    let first = Iova(descriptor.addr().0);
    let last = Iova(first.0.saturating_add(extent));
    Some(Buffer {
        iova: IovaRange::new(first, last).ok()?,
        access: if descriptor.is_write_only() {
            Access::Write
        } else {
            Access::Read
        },
    })
}

/// The available buffers that are not used yet, in the order in which an
/// in-order device uses them. Bounded by `MAX_STEPS` descriptors and one step
/// for each.
///
/// # Errors
/// [`RingReadError`]; no buffers are returned then.
pub fn posted(
    memory: &Memory<'_>,
    layout: &Layout,
    steps: &Steps,
) -> Result<Vec<Buffer>, RingReadError> {
    let available = memory.u16_at(layout.avail, 2)?;
    let used = memory.used(layout)?;
    let count = available.wrapping_sub(used);
    if count > layout.size {
        return Err(RingReadError::Malformed(
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

/// A walk over chains, of at most [`MAX_STEPS`] descriptors and the steps left.
struct Walk<'m> {
    memory: &'m Memory<'m>,
    steps: &'m Steps,
    /// Number of descriptors that were read.
    walked: usize,
    buffers: Vec<Buffer>,
}

impl Walk<'_> {
    fn is_long(&self) -> bool {
        self.walked >= MAX_STEPS || self.steps.is_over()
    }

    fn chain(&mut self, table: &Table, head: u64) -> Result<(), RingReadError> {
        let mut index = head;
        let mut writable = false;
        for _ in 0..table.entries {
            if index >= table.entries {
                return Err(RingReadError::Malformed(
                    "a descriptor lies outside its table",
                ));
            }
            self.walked += 1;
            self.steps.spend();
            let descriptor = self.memory.descriptor(table.first, index)?;
            if descriptor.refers_to_indirect_table() {
                self.refer(table, &descriptor)?;
            } else {
                if writable && !descriptor.is_write_only() {
                    return Err(RingReadError::Malformed("a chain reads after it writes"));
                }
                writable = descriptor.is_write_only();
                self.buffers.extend(buffer(&descriptor));
            }
            if !descriptor.has_next() || self.is_long() {
                return Ok(());
            }
            index = u64::from(descriptor.next());
        }
        Err(RingReadError::Malformed(
            "a chain of descriptors has no end",
        ))
    }

    /// Walks the indirect table that a descriptor refers to (§2.7.5.3).
    fn refer(&mut self, from: &Table, to: &Descriptor) -> Result<(), RingReadError> {
        let len = u64::from(to.len());
        if from.indirect {
            return Err(RingReadError::Malformed(
                "an indirect table refers to another",
            ));
        }
        if len == 0 || len % DESCRIPTOR != 0 {
            return Err(RingReadError::Malformed(
                "an indirect table has an odd length",
            ));
        }
        let access = Access::Read;
        let itself = buffer(to).map(|buffer| Buffer { access, ..buffer });
        self.buffers.extend(itself);
        let table = Table {
            first: Iova(to.addr().0),
            entries: len / DESCRIPTOR,
            indirect: true,
        };
        match self.chain(&table, 0) {
            // The fault is reported when the kernel misses the table.
            Err(RingReadError::Fault(_)) => Ok(()),
            done => done,
        }
    }
}

#[cfg(test)]
mod tests;
