//! Reports of the IOMMU and its endpoints.

use super::error::ActionError;
use crate::config::IommuModel;
use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// A 64-bit address or mask. As text and in JSON it is `"0x…"`: a JSON number would lose bits
/// above 2^53 in many readers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hex(pub u64);

impl fmt::Display for Hex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

impl FromStr for Hex {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (digits, radix) = match text.strip_prefix("0x") {
            Some(digits) => (digits, 16),
            None => (text, 10),
        };
        // from_str_radix accepts a sign.
        let number = match digits.bytes().next() {
            Some(b'+' | b'-') | None => None,
            Some(_) => u64::from_str_radix(digits, radix).ok(),
        };
        number
            .map(Self)
            .ok_or("use a number of up to 64 bits, decimal or 0x and hexadecimal")
    }
}

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Hex {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

/// The IOMMU as a whole (`GET /iommu`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IommuInfo {
    /// Model of the IOMMU.
    pub model: IommuModel,
    /// Whether the guest has switched it on: `CR0.SMMUEN`, or `DRIVER_OK` of virtio-iommu.
    pub enabled: bool,
    /// Offered features, and which of them the guest uses.
    pub features: Vec<Feature>,
    /// The devices, in the order of their stream identifiers. Those that are not behind the
    /// IOMMU are listed too.
    pub endpoints: Vec<EndpointInfo>,
}

/// A feature of the IOMMU: a virtio feature bit, or a field of an SMMUv3 ID register.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Feature {
    /// The specification's name: `VIRTIO_IOMMU_F_BYPASS_CONFIG`, `IDR0.ATS`.
    pub name: String,
    /// Whether the guest acknowledged it. `null` where the specification has no negotiation.
    pub negotiated: Option<bool>,
}

/// Type of the device of an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DeviceKind {
    /// A drive.
    Block,
    /// A network interface.
    Net,
    /// The vsock device.
    Vsock,
    /// The entropy device.
    Entropy,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Current translation state of an endpoint.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EndpointState {
    /// The endpoint is not behind the IOMMU.
    Direct,
    /// Accesses pass untranslated.
    #[default]
    Bypass,
    /// Accesses are translated.
    Translated,
    /// Every access faults.
    Blocked,
}

impl fmt::Display for EndpointState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// The ATS capability of an endpoint (PCIe 6.0 §10.5.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ats {
    /// The device has the capability.
    pub offered: bool,
    /// The guest enabled it.
    pub enabled: bool,
}

/// Invalidations that an endpoint's back end is registered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegistrationKind {
    /// The guest's own invalidations of the device IOTLB.
    DevIotlb,
    /// Every unmap or TLB invalidation that concerns the stream.
    Unmap,
    /// Unmaps as for `Unmap`, and every new mapping.
    MapUnmap,
}

impl fmt::Display for RegistrationKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// Registration of an endpoint's back end with the notifier chain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// Invalidations that the back end receives.
    pub kind: RegistrationKind,
    /// Reason for the kind: `"virtio-iommu has no device IOTLB"`.
    pub reason: String,
}

/// Counters of one endpoint since its creation: 64 bits, which do not wrap in practice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct EndpointCounters {
    /// Translations requested of the IOMMU.
    pub translations: u64,
    /// Of those, answered from a cache.
    pub hits: u64,
    /// Misses that the back end's IOTLB reported.
    pub misses: u64,
    /// Translations sent to the back end, prefills included.
    pub updates: u64,
    /// Of those, sent before the back end missed them.
    pub prefills: u64,
    /// Invalidations sent to the back end.
    pub invalidations_sent: u64,
    /// Invalidations not sent, because the back end had no entry in their range.
    pub invalidations_saved: u64,
    /// Faults by the specification's name of their type.
    pub faults: BTreeMap<String, u64>,
    /// Queues that are stalled now, waiting for a mapping that does not exist. A gauge, not a
    /// counter.
    pub stalled_queues: u32,
}

impl EndpointCounters {
    /// Sum of the faults of all types.
    #[must_use]
    pub fn all_faults(&self) -> u64 {
        self.faults
            .values()
            .fold(0, |sum, count| sum.saturating_add(*count))
    }
}

/// One device and its translation (`GET /iommu/endpoints/{id}`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointInfo {
    /// The device's name in the configuration: a `drive_id`, an `iface_id`, `vsock` or
    /// `entropy`.
    pub id: String,
    /// Type of the device.
    pub device: DeviceKind,
    /// Its PCI address in the guest: `00:03.0`.
    pub pci_address: String,
    /// Its stream identifier (SMMUv3), or endpoint identifier (virtio-iommu).
    pub stream_id: u32,
    /// Current translation state of its accesses.
    pub state: EndpointState,
    /// The virtio-iommu domain it is attached to.
    pub domain: Option<u32>,
    /// The ASID of its SMMUv3 stage 1 context.
    pub asid: Option<u16>,
    /// The VMID of its SMMUv3 stage 2.
    pub vmid: Option<u16>,
    /// Its ATS capability; `null` if the IOMMU offers none.
    pub ats: Option<Ats>,
    /// Registration of its back end; `null` for a device without one.
    pub registration: Option<Registration>,
    /// Counters since its creation.
    pub counters: EndpointCounters,
}

impl IommuInfo {
    /// Finds an endpoint by its `id`, its PCI address, or its stream identifier as `0x` and
    /// hexadecimal digits, tried in that order. A drive and a network interface may have the same
    /// `id`; then only the other two names are unique.
    ///
    /// # Errors
    /// No endpoint has this name, or more than one has.
    pub fn find(&self, name: &str) -> Result<&EndpointInfo, ActionError> {
        let endpoints = || self.endpoints.iter();
        let mut named = endpoints().filter(|endpoint| endpoint.id == name);
        if let Some(first) = named.next() {
            return match named.next() {
                None => Ok(first),
                Some(second) => Err(ActionError::NotFound(format!(
                    "more than one device is called {name}; use its PCI address, {} or {}",
                    first.pci_address, second.pci_address
                ))),
            };
        }
        let stream_id = name
            .strip_prefix("0x")
            .and_then(|digits| u32::from_str_radix(digits, 16).ok());
        endpoints()
            .find(|endpoint| endpoint.pci_address == name)
            .or_else(|| endpoints().find(|endpoint| Some(endpoint.stream_id) == stream_id))
            .ok_or_else(|| {
                let known: Vec<_> = endpoints().map(|endpoint| endpoint.id.as_str()).collect();
                ActionError::NotFound(if known.is_empty() {
                    format!("there is no endpoint {name:?}: the machine has none yet")
                } else {
                    format!(
                        "there is no endpoint {name:?}; there are: {}",
                        known.join(", ")
                    )
                })
            })
    }
}

/// Accesses that a mapping permits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Permissions {
    /// The device may read.
    pub read: bool,
    /// The device may write.
    pub write: bool,
}

/// A range of IOVAs and its target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    /// First IOVA.
    pub start: Hex,
    /// Last IOVA, inclusive.
    pub end: Hex,
    /// Guest physical address that `start` maps to.
    pub target: Hex,
    /// Accesses that the device may make.
    pub permissions: Permissions,
    /// The range is for MSIs and not for memory (virtio-iommu `MAP_F_MMIO`).
    #[serde(default)]
    pub mmio: bool,
}

/// Some of an endpoint's mappings, in rising order of IOVA
/// (`GET /iommu/endpoints/{id}/mappings`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappingsPage {
    /// The mappings. Adjacent ones may be shown as one.
    pub mappings: Vec<Mapping>,
    /// `after` of the next page; `None` on the last page. A page can be empty and have a next one.
    pub next: Option<Hex>,
}
