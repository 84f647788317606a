//! Layouts in memory: requests, the device configuration, properties and fault
//! reports (virtio 1.2 §5.13.4, §5.13.6).

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::spec::{self, Features, PROBE_SIZE, Status, property, request};
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

/// `struct virtio_iommu_req_attach` after the head.
#[derive(FromBytes)]
#[repr(C)]
struct RawAttach {
    domain: U32,
    endpoint: U32,
    flags: U32,
    reserved: [u8; 4],
}

/// `struct virtio_iommu_req_detach` after the head.
#[derive(FromBytes)]
#[repr(C)]
struct RawDetach {
    domain: U32,
    endpoint: U32,
    _reserved: [u8; 8],
}

/// `struct virtio_iommu_req_map` after the head.
#[derive(FromBytes)]
#[repr(C)]
struct RawMap {
    domain: U32,
    virt_start: U64,
    virt_end: U64,
    phys_start: U64,
    flags: U32,
}

/// `struct virtio_iommu_req_unmap` after the head.
#[derive(FromBytes)]
#[repr(C)]
struct RawUnmap {
    domain: U32,
    virt_start: U64,
    virt_end: U64,
    reserved: [u8; 4],
}

/// `struct virtio_iommu_req_probe` after the head.
#[derive(FromBytes)]
#[repr(C)]
struct RawProbe {
    endpoint: U32,
    _reserved: [u8; 64],
}

/// `struct virtio_iommu_config`.
#[derive(IntoBytes)]
#[repr(C)]
struct RawConfig {
    page_size_mask: U64,
    input_range: [U64; 2],
    domain_range: [U32; 2],
    probe_size: U32,
    bypass: u8,
    reserved: [u8; 3],
}

/// `struct virtio_iommu_probe_resv_mem`, with the head of a property.
#[derive(IntoBytes, Immutable)]
#[repr(C)]
struct RawReservedMemory {
    kind: U16,
    length: U16,
    subtype: u8,
    reserved: [u8; 3],
    start: U64,
    end: U64,
}

/// `struct virtio_iommu_fault`.
#[derive(IntoBytes)]
#[repr(C)]
struct RawFault {
    reason: u8,
    reserved: [u8; 3],
    flags: U32,
    endpoint: U32,
    reserved2: [u8; 4],
    address: U64,
}

/// Reads the structure at the front of `bytes`.
fn read<T: FromBytes>(bytes: &[u8]) -> Result<T, Status> {
    let read = T::read_from_prefix(bytes).map_err(|_| Status::Inval);
    read.map(|(raw, _)| raw)
}

/// Checks a reserved field that the driver must leave zero.
fn zero(reserved: [u8; 4]) -> Result<(), Status> {
    if reserved == [0; 4] {
        Ok(())
    } else {
        Err(Status::Inval)
    }
}

/// Features that a request of this type needs; `None` for an unknown type.
pub(super) fn needed_feature(kind: u8) -> Option<Features> {
    match kind {
        request::ATTACH | request::DETACH => Some(Features::empty()),
        request::MAP | request::UNMAP => Some(Features::MAP_UNMAP),
        request::PROBE => Some(Features::PROBE),
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
        let Some(([kind, ..], body)) = bytes.split_first_chunk::<4>() else {
            return Err(Status::Inval);
        };
        match *kind {
            request::ATTACH => {
                let raw: RawAttach = read(body)?;
                zero(raw.reserved).map(|()| Self::Attach {
                    domain: raw.domain.get(),
                    endpoint: StreamId(raw.endpoint.get()),
                    flags: raw.flags.get(),
                })
            }
            request::DETACH => read(body).map(|raw: RawDetach| Self::Detach {
                domain: raw.domain.get(),
                endpoint: StreamId(raw.endpoint.get()),
            }),
            request::MAP => read(body).map(|raw: RawMap| Self::Map {
                domain: raw.domain.get(),
                first: Iova(raw.virt_start.get()),
                last: Iova(raw.virt_end.get()),
                gpa: Gpa(raw.phys_start.get()),
                flags: raw.flags.get(),
            }),
            request::UNMAP => {
                let raw: RawUnmap = read(body)?;
                zero(raw.reserved).map(|()| Self::Unmap {
                    domain: raw.domain.get(),
                    first: Iova(raw.virt_start.get()),
                    last: Iova(raw.virt_end.get()),
                })
            }
            request::PROBE => read(body).map(|raw: RawProbe| Self::Probe {
                endpoint: StreamId(raw.endpoint.get()),
            }),
            _ => Err(Status::Unsupp),
        }
    }
}

/// Encodes the device configuration (§5.13.4): addresses of `input_range` in
/// pages of `1 << page_shift` bytes, and every domain ID.
pub(super) fn config_space(
    input_range: IovaRange,
    page_shift: u32,
    bypass: bool,
) -> [u8; spec::CONFIG_SIZE] {
    zerocopy::transmute!(RawConfig {
        page_size_mask: (u64::MAX << page_shift).into(),
        input_range: [input_range.first(), input_range.last()].map(|iova| iova.0.into()),
        domain_range: [0, u32::MAX].map(U32::new),
        probe_size: PROBE_SIZE.into(),
        bypass: bypass.into(),
        reserved: [0; 3],
    })
}

/// Writes the RESV_MEM property of the MSI window to the front of `properties`,
/// which have room for it (§5.13.6.7).
pub(super) fn write_msi_window(properties: &mut [u8], window: IovaRange) {
    let raw = RawReservedMemory {
        kind: property::RESV_MEM.into(),
        length: property::RESV_MEM_SIZE.into(),
        subtype: property::RESV_MEM_MSI,
        reserved: [0; 3],
        start: window.first().0.into(),
        end: window.last().0.into(),
    };
    let _ = raw.write_to_prefix(properties);
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
        zerocopy::transmute!(RawFault {
            reason: self.reason,
            reserved: [0; 3],
            flags: (access | spec::fault::ADDRESS).into(),
            endpoint: self.endpoint.0.into(),
            reserved2: [0; 4],
            address: self.address.0.into(),
        })
    }
}

/// Writes fault reports to the event queue. Called with the stream's gate held
/// and no lock of the model: it must not translate.
pub trait FaultSink: Send + Sync {
    /// Writes the report, or drops it when no buffer is available.
    fn report(&self, report: &FaultReport);
}
