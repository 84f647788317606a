//! What a driver posted, checked (virtio 1.2 §2.7).
//!
//! `virtio_queue` ends a chain early, without a word, when it loops, leaves its
//! table, nests indirect tables or leaves memory. A device must not take such a
//! chain for a request: the driver is broken and the device needs a reset.

use iommu::DmaView;
use virtio_queue::{Error, Queue, QueueOwnedT as _};
use vm_memory::GuestAddress;

/// A part of a request. The address is I/O virtual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Where it starts.
    pub at: GuestAddress,
    /// Bytes, possibly none. They may be anywhere: only an access tells.
    pub len: u32,
}

/// A whole chain of descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// What names the chain in the used ring.
    pub head: u16,
    /// What the device reads.
    pub given: Vec<Buffer>,
    /// What the device writes.
    pub room: Vec<Buffer>,
}

impl Chain {
    /// Takes the next chain from `queue`, if the driver posted one. It has at
    /// most `longest` descriptors, those of an indirect table included, and the
    /// sum of their lengths is below 2^32.
    ///
    /// A chain must not be longer than the queue (§2.7.5.3.1), so the largest
    /// queue that a device offers is a sufficient bound for a device without a
    /// narrower one. No more than `longest` + 1 descriptors are read.
    ///
    /// # Errors
    /// What the driver did wrong.
    pub fn take(
        queue: &mut Queue,
        view: &DmaView<'_>,
        longest: u16,
    ) -> Result<Option<Self>, &'static str> {
        let mut available = queue.iter(view).map_err(|error| match error {
            Error::InvalidAvailRingIndex => "more chains are available than the ring has room for",
            _ => RINGS_OUTSIDE,
        })?;
        let Some(mut chain) = available.next() else {
            return match view.take_fault() {
                Some(_) => Err(RINGS_OUTSIDE),
                None => Ok(None),
            };
        };
        let mut taken = Self {
            head: chain.head_index(),
            given: Vec::new(),
            room: Vec::new(),
        };
        let mut whole = false;
        for descriptor in &mut chain {
            let buffer = Buffer {
                at: descriptor.addr(),
                len: descriptor.len(),
            };
            if taken.given.len() + taken.room.len() == usize::from(longest) {
                return Err("a chain has more descriptors than the device offers to take");
            }
            if descriptor.is_write_only() {
                taken.room.push(buffer);
            } else if taken.room.is_empty() {
                taken.given.push(buffer);
            } else {
                return Err("a chain has a buffer to read behind one to write");
            }
            whole = !descriptor.has_next();
        }
        if view.take_fault().is_some() {
            return Err("a descriptor is not in memory");
        }
        if whole {
            Ok(Some(taken))
        } else {
            Err("a chain of descriptors leaves its table or has no end")
        }
    }
}

/// The rings themselves cannot be reached.
pub const RINGS_OUTSIDE: &str = "its rings are not in memory";

#[cfg(test)]
mod tests;
