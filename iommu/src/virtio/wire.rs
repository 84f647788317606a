//! Layouts in memory: requests, the device configuration, properties and fault
//! reports (virtio 1.2 §5.13.4, §5.13.6).

use super::spec::{self, PROBE_SIZE, Status, feature, property, request};
use crate::addr::{Gpa, Iova, IovaRange, StreamId};
use crate::mapping::Access;

/// Bytes of the properties and the tail of a PROBE request.
pub(super) const PROBE_REPLY_SIZE: usize = PROBE_SIZE as usize + request::TAIL_SIZE;

/// A parsed request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// ATTACH (§5.13.6.3).
    Attach {
        /// The domain to attach to, created when it does not exist.
        domain: u32,
        /// Endpoint to attach.
        endpoint: StreamId,
        /// [`request::ATTACH_BYPASS`], and perhaps unknown flags.
        flags: u32,
    },
    /// DETACH (§5.13.6.4).
    Detach {
        /// The domain to detach from.
        domain: u32,
        /// Endpoint to detach.
        endpoint: StreamId,
    },
    /// MAP (§5.13.6.5).
    Map {
        /// Domain of the mapping.
        domain: u32,
        /// First address, inclusive.
        first: Iova,
        /// Last address, inclusive.
        last: Iova,
        /// Guest-physical address of `first`.
        gpa: Gpa,
        /// `MAP_READ`, `MAP_WRITE`, `MAP_MMIO`, and perhaps unknown flags.
        flags: u32,
    },
    /// UNMAP (§5.13.6.6).
    Unmap {
        /// Domain of the mappings.
        domain: u32,
        /// First address.
        first: Iova,
        /// Last address, inclusive.
        last: Iova,
    },
    /// PROBE (§5.13.6.7).
    Probe {
        /// Endpoint with the properties.
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

/// Feature bit that a request of this type needs, 0 for none; `None` for an
/// unknown type.
pub(super) fn needed_feature(kind: u8) -> Option<u64> {
    match kind {
        request::ATTACH | request::DETACH => Some(0),
        request::MAP | request::UNMAP => Some(feature::MAP_UNMAP),
        request::PROBE => Some(feature::PROBE),
        _ => None,
    }
}

/// Bytes that the device writes to a device-writable part of `room` bytes: the
/// properties of a PROBE request, then the tail. `None`: the tail does not fit,
/// so nothing can be written.
pub(super) fn reply_size(kind: u8, room: usize) -> Option<usize> {
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

/// Copies `fields` to the front of `bytes`.
fn write(bytes: &mut [u8], fields: impl Iterator<Item = u8>) {
    for (byte, value) in bytes.iter_mut().zip(fields) {
        *byte = value;
    }
}

/// Encodes the device configuration (§5.13.4): addresses of `input_range` in
/// pages of `1 << page_shift` bytes, and every domain ID.
pub(super) fn config_space(
    input_range: IovaRange,
    page_shift: u32,
    bypass: bool,
) -> [u8; spec::CONFIG_SIZE] {
    let page_size_mask = u64::MAX << page_shift;
    let (domain_first, domain_last) = (0_u32, u32::MAX);
    let fields = page_size_mask
        .to_le_bytes()
        .into_iter()
        .chain(input_range.first().0.to_le_bytes())
        .chain(input_range.last().0.to_le_bytes())
        .chain(domain_first.to_le_bytes())
        .chain(domain_last.to_le_bytes())
        .chain(PROBE_SIZE.to_le_bytes())
        .chain([u8::from(bypass), 0, 0, 0]);
    let mut bytes = [0; spec::CONFIG_SIZE];
    write(&mut bytes, fields);
    bytes
}

/// Writes the RESV_MEM property of the MSI window to the front of `properties`
/// (§5.13.6.7).
pub(super) fn write_msi_window(properties: &mut [u8], window: IovaRange) {
    let fields = property::RESV_MEM
        .to_le_bytes()
        .into_iter()
        .chain(property::RESV_MEM_SIZE.to_le_bytes())
        .chain([property::RESV_MEM_MSI, 0, 0, 0])
        .chain(window.first().0.to_le_bytes())
        .chain(window.last().0.to_le_bytes());
    write(properties, fields);
}

/// A fault report for the event queue (§5.13.6.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultReport {
    /// [`spec::fault::REASON_DOMAIN`] or [`spec::fault::REASON_MAPPING`].
    pub reason: u8,
    /// Endpoint of the access.
    pub endpoint: StreamId,
    /// Direction of the access.
    pub access: Access,
    /// Address of the access.
    pub address: Iova,
}

impl FaultReport {
    /// Encodes the report.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; spec::fault::SIZE] {
        let access = match self.access {
            Access::Read => spec::fault::READ,
            Access::Write => spec::fault::WRITE,
        };
        let mut bytes = [0; spec::fault::SIZE];
        let fields = u32::from(self.reason)
            .to_le_bytes()
            .into_iter()
            .chain((access | spec::fault::ADDRESS).to_le_bytes())
            .chain(self.endpoint.0.to_le_bytes())
            .chain([0; 4])
            .chain(self.address.0.to_le_bytes());
        write(&mut bytes, fields);
        bytes
    }
}

/// Writes fault reports to the event queue. Called with the stream's gate held
/// and no lock of the model: it must not translate.
pub trait FaultSink: Send + Sync {
    /// Writes the report, or drops it when no buffer is available.
    fn report(&self, report: &FaultReport);
}
