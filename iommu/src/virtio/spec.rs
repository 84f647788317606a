//! Layouts and numbers of virtio 1.2 §5.13.

use bitflags::bitflags;

bitflags! {
    /// Feature bits of the device type (§5.13.3); the names are those after
    /// `VIRTIO_IOMMU_F_`.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Features: u64 {
        /// `input_range` of the configuration is valid.
        const INPUT_RANGE = 1 << 0;
        /// `domain_range` of the configuration is valid.
        const DOMAIN_RANGE = 1 << 1;
        /// MAP and UNMAP requests.
        const MAP_UNMAP = 1 << 2;
        /// PROBE requests.
        const PROBE = 1 << 4;
        /// The MMIO flag of MAP requests.
        const MMIO = 1 << 5;
        /// `bypass` of the configuration, and bypass domains.
        const BYPASS_CONFIG = 1 << 6;
    }
}

/// Request types (§5.13.6).
pub mod request {
    /// Attach an endpoint to a domain.
    pub const ATTACH: u8 = 1;
    /// Detach an endpoint from its domain.
    pub const DETACH: u8 = 2;
    /// Create a mapping in a domain.
    pub const MAP: u8 = 3;
    /// Remove mappings from a domain.
    pub const UNMAP: u8 = 4;
    /// Read the properties of an endpoint.
    pub const PROBE: u8 = 5;

    /// Flag of ATTACH: the domain is in bypass.
    pub const ATTACH_BYPASS: u32 = 1;
    /// Flag of MAP: the endpoint may read.
    pub const MAP_READ: u32 = 1 << 0;
    /// Flag of MAP: the endpoint may write.
    pub const MAP_WRITE: u32 = 1 << 1;
    /// Flag of MAP: the range is memory-mapped I/O.
    pub const MAP_MMIO: u32 = 1 << 2;

    /// Bytes of the device-readable part of ATTACH.
    pub const ATTACH_SIZE: usize = 20;
    /// Bytes of the device-readable part of DETACH.
    pub const DETACH_SIZE: usize = 20;
    /// Bytes of the device-readable part of MAP.
    pub const MAP_SIZE: usize = 36;
    /// Bytes of the device-readable part of UNMAP.
    pub const UNMAP_SIZE: usize = 28;
    /// Bytes of the device-readable part of PROBE.
    pub const PROBE_SIZE: usize = 72;
    /// Bytes of the tail, which the device writes.
    pub const TAIL_SIZE: usize = 4;
}

/// Status in the tail of a request (§5.13.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Status {
    /// The request succeeded.
    Ok = 0,
    /// The request is not supported.
    Unsupp = 2,
    /// A field has an invalid value.
    Inval = 4,
    /// An address or a domain is out of range.
    Range = 5,
    /// The endpoint or the domain does not exist.
    Noent = 6,
    /// No memory is left for the request.
    Nomem = 8,
}

/// Fault reports (§5.13.6.9).
pub mod fault {
    /// The endpoint is attached to no domain.
    pub const REASON_DOMAIN: u8 = 1;
    /// Its domain has no mapping there that permits the access.
    pub const REASON_MAPPING: u8 = 2;
    /// The access was a read.
    pub const READ: u32 = 1 << 0;
    /// The access was a write.
    pub const WRITE: u32 = 1 << 1;
    /// The address field is valid.
    pub const ADDRESS: u32 = 1 << 8;
    /// Bytes of a report.
    pub const SIZE: usize = 24;
}

/// Properties of an endpoint (§5.13.6.7).
pub mod property {
    /// A reserved region of I/O virtual addresses.
    pub const RESV_MEM: u16 = 1;
    /// Bytes that follow the header of a RESV_MEM property.
    pub const RESV_MEM_SIZE: u16 = 20;
    /// Subtype: the region may be neither mapped nor accessed.
    pub const RESV_MEM_RESERVED: u8 = 0;
    /// Subtype: the region is a doorbell of MSIs, which is not translated.
    pub const RESV_MEM_MSI: u8 = 1;
}

/// Bytes of the device configuration (§5.13.4).
pub const CONFIG_SIZE: usize = 40;
/// Offset of `bypass` in the configuration, in bytes.
pub const CONFIG_BYPASS: usize = 36;
/// Bytes for the properties of a PROBE request.
pub const PROBE_SIZE: u32 = 512;
