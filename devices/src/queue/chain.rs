//! Checked chains of descriptors (virtio 1.2 §2.7).
//!
//! `virtio_queue` ends a chain early, without an error, at a loop, an index
//! beyond the table, a nested indirect table, or a descriptor outside of
//! memory. Such a chain is no request: the driver is broken and the device
//! needs a reset.

use iommu::DmaView;
use virtio_queue::{Error, Queue, QueueOwnedT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryError};

use crate::failure::DeviceError;

/// The rule of a queue that the driver broke, as text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueError(pub &'static str);

impl QueueError {
    /// The rings are not in memory.
    pub const RINGS_OUTSIDE: Self = Self("its rings are not in memory");

    /// The error of a device whose queue `queue` it is.
    #[must_use]
    pub const fn of(self, queue: u16) -> DeviceError {
        let Self(reason) = self;
        DeviceError::BadQueue { queue, reason }
    }
}

impl From<Error> for QueueError {
    fn from(error: Error) -> Self {
        match error {
            Error::InvalidAvailRingIndex => {
                Self("more chains are available than the ring has room for")
            }
            _ => Self::RINGS_OUTSIDE,
        }
    }
}

/// A descriptor's buffer. The address is I/O virtual.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffer {
    /// Address of the first byte.
    pub at: GuestAddress,
    /// Length in bytes, possibly 0. Only an access checks that they are in
    /// memory.
    pub len: u32,
}

/// A complete chain of descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Index of its first descriptor, which identifies it in the used ring.
    pub head: u16,
    /// Device-readable buffers (§2.6).
    pub readable: Vec<Buffer>,
    /// Device-writable buffers (§2.6).
    pub writable: Vec<Buffer>,
}

impl Chain {
    /// Takes the next available chain from `queue`; `None` when the ring is
    /// empty. The chain has at most `longest` descriptors, those of an indirect
    /// table included, and the sum of their lengths is below 2^32.
    ///
    /// A chain must not be longer than the queue (§2.7.5.3.1), so the largest
    /// queue that a device offers is a sufficient bound for a device without a
    /// narrower one. No more than `longest` + 1 descriptors are read.
    ///
    /// # Errors
    /// [`QueueError`]
    pub fn take(
        queue: &mut Queue,
        view: &DmaView<'_>,
        longest: u16,
    ) -> Result<Option<Self>, QueueError> {
        let mut available = queue.iter(view)?;
        let Some(mut chain) = available.next() else {
            return match view.take_fault() {
                Some(_) => Err(QueueError::RINGS_OUTSIDE),
                None => Ok(None),
            };
        };
        let mut taken = Self {
            head: chain.head_index(),
            readable: Vec::new(),
            writable: Vec::new(),
        };
        let mut whole = false;
        for descriptor in &mut chain {
            let buffer = Buffer {
                at: descriptor.addr(),
                len: descriptor.len(),
            };
            if taken.readable.len() + taken.writable.len() == usize::from(longest) {
                return Err(QueueError(
                    "a chain has more descriptors than the device offers to take",
                ));
            }
            if descriptor.is_write_only() {
                taken.writable.push(buffer);
            } else if taken.writable.is_empty() {
                taken.readable.push(buffer);
            } else {
                return Err(QueueError(
                    "a chain has a buffer to read behind one to write",
                ));
            }
            whole = !descriptor.has_next();
        }
        if view.take_fault().is_some() {
            return Err(QueueError("a descriptor is not in memory"));
        }
        if whole {
            Ok(Some(taken))
        } else {
            Err(QueueError(
                "a chain of descriptors leaves its table or has no end",
            ))
        }
    }
}

/// Sum of the buffers' lengths in bytes.
#[must_use]
pub fn total(buffers: &[Buffer]) -> u64 {
    buffers.iter().map(|buffer| u64::from(buffer.len)).sum()
}

/// Reads the buffers in order until `bytes` is full. Returns the number of bytes
/// read.
///
/// # Errors
/// A buffer is not in memory.
pub fn gather(
    view: &DmaView<'_>,
    buffers: &[Buffer],
    bytes: &mut [u8],
) -> Result<usize, GuestMemoryError> {
    let len = bytes.len();
    let mut rest = bytes;
    for buffer in buffers {
        let (now, later) = rest.split_at_mut(rest.len().min(buffer.len as usize));
        view.read_slice(now, buffer.at)?;
        rest = later;
    }
    Ok(len - rest.len())
}

/// Writes `bytes` to the buffers in order, until either ends. Returns the
/// number of bytes written.
///
/// # Errors
/// A buffer is not in memory.
pub fn scatter(
    view: &DmaView<'_>,
    buffers: &[Buffer],
    bytes: &[u8],
) -> Result<usize, GuestMemoryError> {
    let mut rest = bytes;
    for buffer in buffers {
        let (now, later) = rest.split_at(rest.len().min(buffer.len as usize));
        view.write_slice(now, buffer.at)?;
        rest = later;
    }
    Ok(bytes.len() - rest.len())
}

#[cfg(test)]
mod tests;
