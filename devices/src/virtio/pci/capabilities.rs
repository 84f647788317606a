//! Layout of the BAR, identification of the function, and its capabilities
//! (virtio 1.2 §4.1.2, §4.1.4).

use virtio_bindings::virtio_ids::{
    VIRTIO_ID_BLOCK, VIRTIO_ID_IOMMU, VIRTIO_ID_NET, VIRTIO_ID_VSOCK,
};
use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromZeros, Immutable, IntoBytes};

use crate::pci::{ConfigSpace, Ids};

/// Bytes of BAR 0, which holds all of the structures.
pub const BAR_SIZE: u64 = 0x8000;
/// Offsets of the structures in BAR 0.
pub(super) const COMMON: u32 = 0x0000;
const ISR: u32 = 0x1000;
pub(super) const DEVICE: u32 = 0x2000;
pub(super) const NOTIFY: u32 = 0x3000;
pub(super) const TABLE: u32 = 0x4000;
pub(super) const PENDING: u32 = 0x5000;
/// Bytes of each structure.
pub(super) const STRUCTURE: u32 = 0x1000;
/// Bytes between the notification addresses of two queues.
pub(super) const NOTIFY_MULTIPLIER: u32 = 4;

const VENDOR: u16 = 0x1af4;
const MODERN_DEVICES: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 0x09;
const PCIE_CAPABILITY: u8 = 0x10;
/// Offset of the device control register in the PCI Express capability, and
/// its bit that resets the function (PCIe 6.0 §7.5.3.4).
const DEVICE_CONTROL: u16 = 8;
const INITIATE_RESET: u32 = 1 << 15;
const ATS_CAPABILITY: u16 = 0x0f;
/// Bit 31 of ATS's only double word: Enable, in its control register
/// (PCIe 6.0 §10.5.1.3).
const ATS_ENABLE: u32 = 1 << 31;

/// `cfg_type` of a capability (§4.1.4).
const COMMON_CFG: u8 = 1;
const NOTIFY_CFG: u8 = 2;
const ISR_CFG: u8 = 3;
const DEVICE_CFG: u8 = 4;
const PCI_CFG: u8 = 5;

/// `struct virtio_pci_cap` without its PCI header, followed in some
/// capabilities by the notification multiplier or the data of an access.
#[derive(IntoBytes, FromZeros, Immutable)]
#[repr(C)]
struct VirtioPciCap {
    cap_len: u8,
    cfg_type: u8,
    bar: u8,
    id: u8,
    padding: [u8; 2],
    offset: U32,
    length: U32,
    extra: U32,
}

/// The PCI Express capability without its PCI header (PCIe 6.0 §7.5.3), up to the
/// device control register.
#[derive(IntoBytes, FromZeros, Immutable)]
#[repr(C)]
struct PcieCap {
    capabilities: U16,
    device_capabilities: U32,
    device_control: U16,
    rest: [u8; 50],
}

/// Offsets of the capabilities in configuration space.
pub(super) struct Capabilities {
    access: u16,
    express: u16,
    /// Offset of the double word with the control register of ATS; `None`
    /// without ATS.
    ats: Option<u16>,
}

impl Capabilities {
    /// Adds the capabilities of the transport, of PCI Express, and of ATS if it is
    /// offered.
    pub(super) fn add(config: &mut ConfigSpace, ats: bool) -> Self {
        for (cfg_type, offset, extra) in [
            (COMMON_CFG, COMMON, None),
            (NOTIFY_CFG, NOTIFY, Some(NOTIFY_MULTIPLIER)),
            (ISR_CFG, ISR, None),
            (DEVICE_CFG, DEVICE, None),
        ] {
            let len = if extra.is_some() { 20 } else { 16 };
            let cap = VirtioPciCap {
                cap_len: len,
                cfg_type,
                offset: offset.into(),
                length: STRUCTURE.into(),
                extra: extra.unwrap_or(0).into(),
                ..VirtioPciCap::new_zeroed()
            };
            let (body, _) = cap.as_bytes().split_at(usize::from(len - 2));
            config.add_capability(VENDOR_CAPABILITY, body, &vec![0; body.len()]);
        }
        let access = VirtioPciCap {
            cap_len: 20,
            cfg_type: PCI_CFG,
            length: STRUCTURE.into(),
            ..VirtioPciCap::new_zeroed()
        };
        // The data is not stored.
        let writable = VirtioPciCap {
            bar: u8::MAX,
            offset: U32::MAX_VALUE,
            length: U32::MAX_VALUE,
            ..VirtioPciCap::new_zeroed()
        };
        let access =
            config.add_capability(VENDOR_CAPABILITY, access.as_bytes(), writable.as_bytes());
        // Version 2, a root complex integrated endpoint, role-based errors,
        // function-level reset.
        let express = PcieCap {
            capabilities: 0x0092.into(),
            device_capabilities: 0x1000_8000.into(),
            ..PcieCap::new_zeroed()
        };
        let writable = PcieCap {
            device_control: U16::MAX_VALUE,
            ..PcieCap::new_zeroed()
        };
        let express =
            config.add_capability(PCIE_CAPABILITY, express.as_bytes(), writable.as_bytes());
        // Page-aligned requests, an invalidate queue of 32 (encoded as 0)
        // (PCIe 6.0 §10.5.1).
        let body = [(1 << 5, ATS_ENABLE | 0x1f << 16)];
        let ats = ats.then(|| config.add_extended_capability(ATS_CAPABILITY, 1, &body) + 4);
        Self {
            access,
            express,
            ats,
        }
    }

    /// Whether the driver initiates a function-level reset.
    pub(super) fn initiates_reset(&self, config: &ConfigSpace) -> bool {
        config.word(self.express + DEVICE_CONTROL) & INITIATE_RESET != 0
    }

    /// The ATS enable bit; `None` when ATS is not offered.
    pub(super) fn ats_enabled(&self, config: &ConfigSpace) -> Option<bool> {
        Some(config.word(self.ats?) & ATS_ENABLE != 0)
    }

    /// The window of the configuration access capability (§4.1.4.9): an access
    /// to its data is an access to the BAR. Returns offset and length in the
    /// BAR.
    pub(super) fn access_window(
        &self,
        config: &ConfigSpace,
        offset: u16,
        len: usize,
    ) -> Option<(u64, usize)> {
        let data = self.access + 16;
        let inside = offset >= data && usize::from(offset) + len <= usize::from(data) + 4;
        self.window(config).filter(|_| inside)
    }

    /// Whether a read of the window's data reads the BAR.
    pub(super) fn window_is_open(&self, config: &ConfigSpace) -> bool {
        self.window(config).is_some()
    }

    fn window(&self, config: &ConfigSpace) -> Option<(u64, usize)> {
        let bar = config.word(self.access + 4) & 0xff;
        let at = u64::from(config.word(self.access + 8));
        let len = config.word(self.access + 12);
        let valid = bar == 0 && matches!(len, 1 | 2 | 4) && at < BAR_SIZE;
        valid.then_some((at, len as usize))
    }
}

/// The identification registers of a device's function.
pub(super) fn ids(device_type: u32) -> Ids {
    let class = match device_type {
        VIRTIO_ID_NET => 0x02_0000,
        VIRTIO_ID_BLOCK => 0x01_8000,
        VIRTIO_ID_IOMMU => 0x08_0600,
        VIRTIO_ID_VSOCK => 0x02_8000,
        _ => 0x08_8000,
    };
    Ids {
        vendor: VENDOR,
        device: MODERN_DEVICES + u16::try_from(device_type).unwrap_or(0),
        class,
        revision: 1,
        subsystem_vendor: VENDOR,
        subsystem: 0x40,
    }
}
