//! Requests, parsed from a copy of the driver's bytes.

use super::spec::{Status, request};
use crate::{Gpa, Iova, StreamId};

/// A well-formed request: every reserved field was zero.
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

    fn reserved<const N: usize>(&mut self) -> Result<(), Status> {
        let zero = self.array::<N>()? == [0; N];
        if zero { Ok(()) } else { Err(Status::Inval) }
    }
}

/// How many bytes the device writes behind a request of this type, the tail
/// included.
pub fn reply_size(kind: u8, probe_size: usize) -> usize {
    if kind == request::PROBE {
        probe_size + request::TAIL_SIZE
    } else {
        request::TAIL_SIZE
    }
}

impl Request {
    /// Parses what the driver wrote, from the head to the tail or the
    /// properties.
    ///
    /// # Errors
    /// `UNSUPP` for a type that does not exist, `INVAL` for a request that is
    /// too short or has a reserved field that is not zero.
    pub fn parse(bytes: &[u8]) -> Result<Self, Status> {
        let mut fields = Fields(bytes);
        let [kind, reserved @ ..] = fields.array::<4>()?;
        if !(request::ATTACH..=request::PROBE).contains(&kind) {
            return Err(Status::Unsupp);
        }
        if reserved != [0; 3] {
            return Err(Status::Inval);
        }
        match kind {
            request::ATTACH => {
                let parsed = Self::Attach {
                    domain: fields.u32()?,
                    endpoint: StreamId(fields.u32()?),
                    flags: fields.u32()?,
                };
                fields.reserved::<4>().map(|()| parsed)
            }
            request::DETACH => {
                let parsed = Self::Detach {
                    domain: fields.u32()?,
                    endpoint: StreamId(fields.u32()?),
                };
                fields.reserved::<8>().map(|()| parsed)
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
                fields.reserved::<4>().map(|()| parsed)
            }
            _ => {
                let endpoint = StreamId(fields.u32()?);
                fields.reserved::<64>().map(|()| Self::Probe { endpoint })
            }
        }
    }
}
