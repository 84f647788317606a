//! Configuration of the devices.

use super::check::{check_id, check_path, check_queues, default_one, default_true};
use super::error::{ConfigError, require};
use super::json::{optional_whole, whole};
use super::unsupported::{RateLimiter, TokenBucket, Unsupported};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::str::FromStr;

/// Upper bound on the name of a host network device, in bytes: `IFNAMSIZ` less the NUL.
const MAX_IFNAME: usize = 15;

/// Upper bound on the size limit of the console's file, in MiB: 1 TiB.
pub(super) const MAX_SERIAL_MIB: u32 = 1 << 20;

/// MTUs in bytes, inclusive (virtio 1.2 §5.1.4.1): 68, which IPv4 requires of a host, to the
/// highest 16-bit number.
const MTU_RANGE: std::ops::RangeInclusive<u16> = 68..=65535;

/// Whether the guest can flush a drive's writes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// No flush is offered: after a host crash the file may miss writes the guest saw complete.
    #[default]
    Unsafe,
    /// Flush is offered and reaches the host's storage.
    Writeback,
}

/// System calls for a drive's file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// `preadv` and `pwritev`.
    #[default]
    Sync,
    /// Any other word, such as `Async` (io_uring): validation refuses it.
    #[serde(other)]
    Unsupported,
}

/// A block device backed by a raw image or a host block device (`/drives/{drive_id}`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name, unique among the drives.
    pub drive_id: String,
    /// Path of the image.
    pub path_on_host: String,
    /// Adds `root=` to the kernel command line. At most one drive can be the root device.
    #[serde(default)]
    pub is_root_device: bool,
    /// Read-only for the guest, and opened read-only.
    #[serde(default)]
    pub is_read_only: bool,
    /// For a root device: partition UUID for `root=PARTUUID=`, instead of the whole disk.
    pub partuuid: Option<String>,
    /// Cache mode, which decides whether the guest can flush.
    #[serde(default)]
    pub cache_type: CacheType,
    /// Accepted as `"Sync"` only.
    #[serde(default)]
    pub io_engine: IoEngine,
    /// Accepted without limits only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// A vhost-user back end. Not supported.
    #[serde(default, skip_serializing_if = "Unsupported::is_absent")]
    pub socket: Unsupported,
    /// Whether it is behind the machine's IOMMU.
    #[serde(default = "default_true")]
    pub iommu: bool,
    /// Request queues, 1 to 16, inclusive.
    #[serde(default = "default_one", deserialize_with = "whole")]
    pub num_queues: u16,
}

impl Default for Drive {
    fn default() -> Self {
        Self {
            drive_id: String::new(),
            path_on_host: String::new(),
            is_root_device: false,
            is_read_only: false,
            partuuid: None,
            cache_type: CacheType::Unsafe,
            io_engine: IoEngine::Sync,
            rate_limiter: None,
            socket: Unsupported::default(),
            iommu: true,
            num_queues: 1,
        }
    }
}

impl Drive {
    /// Checks the values; opens nothing.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        check_id("drive_id", &self.drive_id)?;
        self.socket.refuse(
            "socket",
            "vhost-user back ends are not supported; give path_on_host",
        )?;
        check_path("path_on_host", &self.path_on_host)?;
        if let Some(partuuid) = &self.partuuid {
            require(
                !partuuid.is_empty()
                    && partuuid
                        .bytes()
                        .all(|byte| byte.is_ascii_hexdigit() || byte == b'-'),
                "partuuid",
                "use hexadecimal digits and '-', as blkid prints PARTUUID",
            )?;
        }
        require(
            self.io_engine == IoEngine::Sync,
            "io_engine",
            "only \"Sync\" is supported",
        )?;
        RateLimiter::refuse_limits(self.rate_limiter.as_ref(), "rate_limiter")?;
        check_queues(self.num_queues)
    }
}

/// A unicast Ethernet address (the group bit is clear).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct MacAddress([u8; 6]);

impl MacAddress {
    /// The six octets, in order of transmission.
    #[must_use]
    pub fn octets(self) -> [u8; 6] {
        self.0
    }
}

impl TryFrom<[u8; 6]> for MacAddress {
    type Error = &'static str;

    fn try_from(octets: [u8; 6]) -> Result<Self, Self::Error> {
        if octets == [0; 6] {
            return Err("is all zeros; use six octets such as 06:00:ac:10:00:02");
        }
        if octets[0] & 1 == 1 {
            return Err("is a group address; its first octet must be even");
        }
        Ok(Self(octets))
    }
}

impl FromStr for MacAddress {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "use six octets such as 06:00:ac:10:00:02";
        let mut octets = [0; 6];
        let mut fields = text.split(':');
        for octet in &mut octets {
            let field = fields.next().ok_or(FORM)?;
            if field.len() != 2 || !field.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(FORM);
            }
            *octet = u8::from_str_radix(field, 16).map_err(|_| FORM)?;
        }
        if fields.next().is_some() {
            return Err(FORM);
        }
        Self::try_from(octets)
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "MacAddress({self})")
    }
}

/// Checks the name of a tap device.
pub(super) fn check_tap(field: &str, name: &str) -> Result<(), ConfigError> {
    require(
        !name.is_empty()
            && name.len() <= MAX_IFNAME
            && !name
                .bytes()
                .any(|byte| b"/:\0".contains(&byte) || byte.is_ascii_whitespace()),
        field,
        "give the name of a tap device, 1 to 15 bytes without '/', ':' or spaces",
    )?;
    require(
        !name.contains('%'),
        field,
        "is a template, with '%': give the name of one tap device",
    )
}

/// A network device whose data path is the host kernel's vhost-net over a tap device
/// (`/network-interfaces/{iface_id}`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetworkInterface {
    /// Its name, unique among the interfaces.
    pub iface_id: String,
    /// Name of the tap device on the host. A missing one is created, where that is permitted, and
    /// removed at the end.
    pub host_dev_name: String,
    /// The guest's Ethernet address, as text. If omitted, it is
    /// derived from the tap's name and the host's machine-id.
    pub guest_mac: Option<String>,
    /// Accepted without limits only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rx_rate_limiter: Option<RateLimiter>,
    /// Accepted without limits only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tx_rate_limiter: Option<RateLimiter>,
    /// Whether it is behind the machine's IOMMU.
    #[serde(default = "default_true")]
    pub iommu: bool,
    /// Queue pairs, 1 to 16, inclusive. More than one needs a tap device created with
    /// `multi_queue`.
    #[serde(default = "default_one", deserialize_with = "whole")]
    pub num_queues: u16,
    /// MTU offered to the guest, in bytes; if omitted, none is offered.
    #[serde(
        default,
        deserialize_with = "optional_whole",
        skip_serializing_if = "Option::is_none"
    )]
    pub mtu: Option<u16>,
}

impl Default for NetworkInterface {
    fn default() -> Self {
        Self {
            iface_id: String::new(),
            host_dev_name: String::new(),
            guest_mac: None,
            rx_rate_limiter: None,
            tx_rate_limiter: None,
            iommu: true,
            num_queues: 1,
            mtu: None,
        }
    }
}

impl NetworkInterface {
    /// Parses the guest's Ethernet address; `None` if none is configured.
    pub(crate) fn mac(&self) -> Result<Option<MacAddress>, ConfigError> {
        let parse = |text: &String| {
            text.parse()
                .map_err(|problem: &str| ConfigError::new("guest_mac", problem))
        };
        self.guest_mac.as_ref().map(parse).transpose()
    }

    /// Checks the values; touches no host device.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        check_id("iface_id", &self.iface_id)?;
        check_tap("host_dev_name", &self.host_dev_name)?;
        self.mac()?;
        RateLimiter::refuse_limits(self.rx_rate_limiter.as_ref(), "rx_rate_limiter")?;
        RateLimiter::refuse_limits(self.tx_rate_limiter.as_ref(), "tx_rate_limiter")?;
        check_queues(self.num_queues)?;
        require(
            self.mtu.is_none_or(|mtu| MTU_RANGE.contains(&mtu)),
            "mtu",
            "use 68 to 65535",
        )
    }
}

/// A vsock device whose data path is the host kernel's vhost-vsock (`/vsock`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// The guest's context identifier, 3 to 4294967294, inclusive.
    #[serde(deserialize_with = "whole")]
    pub guest_cid: u32,
    /// Not supported: the host side is `AF_VSOCK`.
    #[serde(default, skip_serializing_if = "Unsupported::is_absent")]
    pub uds_path: Unsupported,
    /// Deprecated by Firecracker; accepted and without effect.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_id: Option<String>,
    /// Whether it is behind the machine's IOMMU.
    #[serde(default = "default_true")]
    pub iommu: bool,
}

impl Vsock {
    /// Checks the values; touches no host device.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        self.uds_path.refuse(
            "uds_path",
            "the host side is AF_VSOCK, not a Unix socket; remove it and connect to guest_cid",
        )?;
        require(
            (3..u32::MAX).contains(&self.guest_cid),
            "guest_cid",
            "use 3 to 4294967294; 0 to 2 and the last are reserved",
        )
    }
}

/// An entropy device (`/entropy`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Accepted without limits only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<RateLimiter>,
    /// Whether it is behind the machine's IOMMU.
    #[serde(default = "default_true")]
    pub iommu: bool,
}

impl Default for Entropy {
    fn default() -> Self {
        Self {
            rate_limiter: None,
            iommu: true,
        }
    }
}

impl Entropy {
    /// Checks that the rate limiter has no limit.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        RateLimiter::refuse_limits(self.rate_limiter.as_ref(), "rate_limiter")
    }
}

/// The serial console (`/serial`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file or FIFO that receives the output. If omitted, it is standard output, and standard
    /// input is the guest's keyboard.
    pub serial_out_path: Option<String>,
    /// Upper bound on the size of the file in MiB, 1 to 1048576, inclusive; its size at the start
    /// counts. Output beyond it is dropped. If omitted, there is no limit. Not in Firecracker's API.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial_out_max_mib: Option<u32>,
    /// Accepted without limits only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}

impl Serial {
    /// Checks the values; opens nothing.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        if let Some(path) = &self.serial_out_path {
            check_path("serial_out_path", path)?;
        }
        if let Some(mib) = self.serial_out_max_mib {
            let form = format!("use 1 to {MAX_SERIAL_MIB}");
            let valid = (1..=MAX_SERIAL_MIB).contains(&mib);
            require(valid, "serial_out_max_mib", &form)?;
        }
        require(
            !self.rate_limiter.as_ref().is_some_and(TokenBucket::limits),
            "rate_limiter",
            "rate limits are not supported; leave it out",
        )
    }
}
