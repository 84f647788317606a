//! Requests, parsed from a copy of the driver's bytes.

use super::spec::{PROBE_SIZE, Status, feature, request};
use crate::{Gpa, Iova, StreamId};

/// Bytes of the properties and the tail of a PROBE request.
pub const PROBE_REPLY_SIZE: usize = PROBE_SIZE as usize + request::TAIL_SIZE;

/// A request that has every field of its type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// §5.13.6.3
    Attach {
        /// The domain to attach to, created when it does not exist.
        domain: u32,
        /// Who is attached.
        endpoint: StreamId,
        /// [`request::ATTACH_BYPASS`], perhaps more.
        flags: u32,
    },
    /// §5.13.6.4
    Detach {
        /// The domain to detach from.
        domain: u32,
        /// Who is detached.
        endpoint: StreamId,
    },
    /// §5.13.6.5
    Map {
        /// Where it is mapped.
        domain: u32,
        /// First address.
        first: Iova,
        /// Last address, inclusive.
        last: Iova,
        /// Where the first address lies.
        gpa: Gpa,
        /// `MAP_READ`, `MAP_WRITE`, `MAP_MMIO`, perhaps more.
        flags: u32,
    },
    /// §5.13.6.6
    Unmap {
        /// Where it is unmapped.
        domain: u32,
        /// First address.
        first: Iova,
        /// Last address, inclusive.
        last: Iova,
    },
    /// §5.13.6.7
    Probe {
        /// Whose properties are asked for.
        endpoint: StreamId,
    },
}

/// Reads little-endian fields off the front of a slice.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], Status> {
        let (field, rest) = self.0.split_first_chunk().ok_or(Status::Inval)?;
        self.0 = rest;
        Ok(*field)
    }

    fn u32(&mut self) -> Result<u32, Status> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, Status> {
        self.array().map(u64::from_le_bytes)
    }

    /// A reserved field that the driver must leave zero.
    fn zero<const N: usize>(&mut self) -> Result<(), Status> {
        let zero = self.array::<N>()? == [0; N];
        if zero { Ok(()) } else { Err(Status::Inval) }
    }
}

/// The feature that a request of this type needs, 0 for none; `None` where
/// there is no such type.
pub fn needed_feature(kind: u8) -> Option<u64> {
    match kind {
        request::ATTACH | request::DETACH => Some(0),
        request::MAP | request::UNMAP => Some(feature::MAP_UNMAP),
        request::PROBE => Some(feature::PROBE),
        _ => None,
    }
}

/// Bytes that the device writes of a device-writable part of `room` bytes: the
/// properties of a PROBE request, and the tail at their end. `None`: the tail
/// has no room, so that nothing can be written.
pub fn reply_size(kind: u8, room: usize) -> Option<usize> {
    if room < request::TAIL_SIZE {
        None
    } else if kind == request::PROBE {
        Some(room.min(PROBE_REPLY_SIZE))
    } else {
        Some(request::TAIL_SIZE)
    }
}

impl Request {
    /// Parses the device-readable part. `reserved` of the head, of DETACH and
    /// of PROBE is ignored (§5.13.6.2, §5.13.6.4.2, §5.13.6.7.2).
    ///
    /// # Errors
    /// `INVAL` for a request that is too short for its type, or an ATTACH or
    /// UNMAP whose `reserved` is not zero; `UNSUPP` for an unknown type.
    pub fn parse(bytes: &[u8]) -> Result<Self, Status> {
        let mut fields = Fields(bytes);
        let [kind, ..] = fields.array::<4>()?;
        match kind {
            request::ATTACH => {
                let parsed = Self::Attach {
                    domain: fields.u32()?,
                    endpoint: StreamId(fields.u32()?),
                    flags: fields.u32()?,
                };
                fields.zero::<4>().map(|()| parsed)
            }
            request::DETACH => {
                let parsed = Self::Detach {
                    domain: fields.u32()?,
                    endpoint: StreamId(fields.u32()?),
                };
                fields.array::<8>().map(|_| parsed)
            }
            request::MAP => Ok(Self::Map {
                domain: fields.u32()?,
                first: Iova(fields.u64()?),
                last: Iova(fields.u64()?),
                gpa: Gpa(fields.u64()?),
                flags: fields.u32()?,
            }),
            request::UNMAP => {
                let parsed = Self::Unmap {
                    domain: fields.u32()?,
                    first: Iova(fields.u64()?),
                    last: Iova(fields.u64()?),
                };
                fields.zero::<4>().map(|()| parsed)
            }
            request::PROBE => {
                let endpoint = StreamId(fields.u32()?);
                fields.array::<64>().map(|_| Self::Probe { endpoint })
            }
            _ => Err(Status::Unsupp),
        }
    }
}
