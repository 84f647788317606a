//! Command-line form of the configuration types: `--disk path=FILE,readonly=on`.

use super::check::{check_id, check_path};
use super::devices::{MAX_SERIAL_MIB, check_tap};
use super::keys::{self, Key, Omitted, Value};
use super::machine::{MEMORY_MIB, cpus_fix, memory_fix};
use super::suggest::{closest, either};
use super::{
    CacheType, ConfigError, Drive, Iommu, IommuModel, MAX_QUEUES, MacAddress, NetworkInterface,
    Serial, Vsock,
};
use ::devices::error::Chain;
use ::iommu::smmuv3::Stages;
use arch::layout;
use std::str::FromStr;

/// Error of an argument: one line that names the key and the fix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ArgumentError(String);

impl From<ConfigError> for ArgumentError {
    fn from(error: ConfigError) -> Self {
        Self(Chain(&error).to_string())
    }
}

/// A type with an argument of `key=value` pairs.
pub trait Argument: Sized + 'static {
    /// Keys of the argument; a value without `=` belongs to the first one.
    const KEYS: &'static [Key<Self>];

    /// Help text, one line for each key.
    #[must_use]
    fn help() -> String {
        keys::help(Self::KEYS)
    }

    /// Stores the pairs of `text` in place of the values in `self`.
    ///
    /// # Errors
    /// An unknown, repeated or missing key, or a value that it does not accept.
    fn with(mut self, text: &str) -> Result<Self, ArgumentError> {
        keys::parse(text, Self::KEYS, &mut self).map_err(ArgumentError)?;
        Ok(self)
    }
}

const IOMMU_SWITCH: &str = "behind the machine's IOMMU";

/// Upper bound on queues: [`MAX_QUEUES`].
const QUEUES: u32 = MAX_QUEUES as u32;

/// Converts a number that the range of its key keeps within 16 bits.
fn narrow(number: u32) -> u16 {
    u16::try_from(number).unwrap_or(u16::MAX)
}

const CACHE_TYPES: [CacheType; 2] = [CacheType::Unsafe, CacheType::Writeback];

/// Without `id=` the drive is nameless until
/// [`VmConfig::name_devices`](super::VmConfig::name_devices).
impl Argument for Drive {
    const KEYS: &'static [Key<Self>] = &[
        Key {
            name: "path",
            value: Value::Text("FILE", |drive, path| {
                check_path("path", &path)?;
                drive.path_on_host = path;
                Ok(())
            }),
            omitted: Omitted::Refused,
            meaning: "raw image or block device",
        },
        Key {
            name: "id",
            value: Value::Text("ID", |drive, id| {
                check_id("id", &id)?;
                drive.drive_id = id;
                Ok(())
            }),
            omitted: Omitted::Means("disk0, disk1, ..."),
            meaning: "name in the API",
        },
        Key {
            name: "readonly",
            value: Value::Switch(|drive, on| drive.is_read_only = on),
            omitted: Omitted::Is("off"),
            meaning: "never written",
        },
        Key {
            name: "root",
            value: Value::Switch(|drive, on| drive.is_root_device = on),
            omitted: Omitted::Is("off"),
            meaning: "adds root= to the kernel command line; for one disk at most",
        },
        Key {
            name: "cache",
            value: Value::Choice(&["unsafe", "writeback"], |drive, index| {
                drive.cache_type = CACHE_TYPES[index];
            }),
            omitted: Omitted::Is("unsafe"),
            meaning: "with writeback the guest can flush to the host's storage",
        },
        Key {
            name: "queues",
            value: Value::Number(1, QUEUES, |drive, queues| {
                drive.num_queues = narrow(queues);
            }),
            omitted: Omitted::Is("1"),
            meaning: "request queues",
        },
        Key {
            name: "iommu",
            value: Value::Switch(|drive, on| drive.iommu = on),
            omitted: Omitted::Is("on"),
            meaning: IOMMU_SWITCH,
        },
    ];
}

impl FromStr for Drive {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::default().with(text)
    }
}

/// Without `id=` the interface is nameless until
/// [`VmConfig::name_devices`](super::VmConfig::name_devices).
impl Argument for NetworkInterface {
    const KEYS: &'static [Key<Self>] = &[
        Key {
            name: "tap",
            value: Value::Text("NAME", |interface, tap| {
                check_tap("tap", &tap)?;
                interface.host_dev_name = tap;
                Ok(())
            }),
            omitted: Omitted::Refused,
            meaning: "tap device on the host; made if there is none",
        },
        Key {
            name: "id",
            value: Value::Text("ID", |interface, id| {
                check_id("id", &id)?;
                interface.iface_id = id;
                Ok(())
            }),
            omitted: Omitted::Means("net0, net1, ..."),
            meaning: "name in the API",
        },
        Key {
            name: "mac",
            value: Value::Text("MAC", |interface, mac| {
                mac.parse::<MacAddress>()
                    .map_err(|problem| ConfigError::new("mac", problem))?;
                interface.guest_mac = Some(mac);
                Ok(())
            }),
            omitted: Omitted::Means("made from the host's machine-id and the tap's name"),
            meaning: "the guest's Ethernet address",
        },
        Key {
            name: "mtu",
            value: Value::Number(68, 65535, |interface, mtu| {
                interface.mtu = Some(narrow(mtu));
            }),
            omitted: Omitted::Means("none is offered"),
            meaning: "MTU offered to the guest",
        },
        Key {
            name: "queues",
            value: Value::Number(1, QUEUES, |interface, queues| {
                interface.num_queues = narrow(queues);
            }),
            omitted: Omitted::Is("1"),
            meaning: "queue pairs",
        },
        Key {
            name: "iommu",
            value: Value::Switch(|interface, on| interface.iommu = on),
            omitted: Omitted::Is("on"),
            meaning: IOMMU_SWITCH,
        },
    ];
}

impl FromStr for NetworkInterface {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::default().with(text)
    }
}

impl Argument for Vsock {
    const KEYS: &'static [Key<Self>] = &[
        Key {
            name: "cid",
            value: Value::Number(3, u32::MAX - 1, |vsock, cid| vsock.guest_cid = cid),
            omitted: Omitted::Refused,
            meaning: "the guest's context identifier",
        },
        Key {
            name: "iommu",
            value: Value::Switch(|vsock, on| vsock.iommu = on),
            omitted: Omitted::Is("on"),
            meaning: IOMMU_SWITCH,
        },
    ];
}

impl Argument for Serial {
    const KEYS: &'static [Key<Self>] = &[
        Key {
            name: "path",
            value: Value::Text("FILE", |serial, path| {
                check_path("path", &path)?;
                serial.serial_out_path = Some(path);
                Ok(())
            }),
            omitted: Omitted::Refused,
            meaning: "file or FIFO to append the output to",
        },
        Key {
            name: "max-mib",
            value: Value::Number(1, MAX_SERIAL_MIB, |serial, mib| {
                serial.serial_out_max_mib = Some(mib);
            }),
            omitted: Omitted::Means("no limit"),
            meaning: "most MiB of the file; more output is dropped",
        },
    ];
}

impl FromStr for Serial {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let serial = Self::default().with(text)?;
        serial.validate()?;
        Ok(serial)
    }
}

impl FromStr for Vsock {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let vsock = Self {
            guest_cid: 0,
            uds_path: super::Unsupported::default(),
            vsock_id: None,
            iommu: true,
        };
        let vsock = vsock.with(text)?;
        vsock.validate()?;
        Ok(vsock)
    }
}

const MODELS: [IommuModel; 3] = [
    IommuModel::None,
    IommuModel::VirtioIommu,
    IommuModel::Smmuv3,
];

impl FromStr for IommuModel {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let names = MODELS.map(|model| model.to_string());
        if let Some(at) = names.iter().position(|name| name == text) {
            return Ok(MODELS[at]);
        }
        let fix = match closest(text, names.iter().map(String::as_str)) {
            Some(near) => format!("did you mean {near}?"),
            None => format!("use {}", either(&names)),
        };
        Err(ArgumentError(format!("model {text} is unknown; {fix}")))
    }
}

const STAGES: [Stages; 3] = [Stages::One, Stages::Two, Stages::Nested];

/// The keys that follow the model: `MODEL[,key=value]…`.
impl Argument for Iommu {
    const KEYS: &'static [Key<Self>] = &[
        Key {
            name: "ats",
            value: Value::Switch(|iommu, on| iommu.ats = on),
            omitted: Omitted::Is("off"),
            meaning: "smmuv3: offers ATS",
        },
        Key {
            name: "stage",
            value: Value::Choice(&["1", "2", "nested"], |iommu, index| {
                iommu.stage = STAGES[index];
            }),
            omitted: Omitted::Is("1"),
            meaning: "smmuv3: translation stages offered",
        },
        Key {
            name: "prefill",
            value: Value::Switch(|iommu, on| iommu.prefill = on),
            omitted: Omitted::Is("on"),
            meaning: "virtio-iommu: sends mappings to vhost before it misses them",
        },
        Key {
            name: "prefetch",
            value: Value::Switch(|iommu, on| iommu.prefetch = on),
            omitted: Omitted::Is("on"),
            meaning: "answers a miss of vhost with buffers that are posted next",
        },
    ];
}

impl FromStr for Iommu {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (model, rest) = text.split_once(',').unwrap_or((text, ""));
        if model.is_empty() || model.contains('=') {
            let names = MODELS.map(|model| model.to_string());
            let fix = either(&names);
            let problem = format!("\"{model}\" is not a model; begin with {fix}");
            return Err(ArgumentError(problem));
        }
        let mut iommu = Self {
            model: model.parse()?,
            ..Self::default()
        };
        if text.contains(',') {
            iommu = iommu.with(rest)?;
        }
        iommu.validate()?;
        Ok(iommu)
    }
}

/// A number of vCPUs, 1 to 32, inclusive.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CpuCount(u8);

impl CpuCount {
    /// Number of vCPUs, 1 to 32.
    #[must_use]
    pub fn get(self) -> u8 {
        self.0
    }
}

impl FromStr for CpuCount {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let count: Option<u8> = text.parse().ok();
        count
            .filter(|count| (1..=layout::MAX_CPUS).contains(&u32::from(*count)))
            .map(Self)
            .ok_or_else(|| ArgumentError(cpus_fix()))
    }
}

/// A size of guest memory: `512M`, `2G`, or a plain number of MiB. A whole number of MiB within the
/// limits of the memory layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize {
    mib: u64,
}

impl MemorySize {
    /// Size in MiB.
    #[must_use]
    pub fn mib(self) -> u64 {
        self.mib
    }
}

impl FromStr for MemorySize {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form =
            || ArgumentError("use a number of MiB, or one with M, G or T, such as 2G".into());
        let unit_at = text
            .find(|character: char| !character.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        // Every unit is a power of 1024, in each spelling.
        let mib_per_unit: u64 = match unit.to_ascii_lowercase().as_str() {
            "" | "m" | "mb" | "mib" => 1,
            "g" | "gb" | "gib" => 1 << 10,
            "t" | "tb" | "tib" => 1 << 20,
            _ => return Err(form()),
        };
        if number.is_empty() {
            return Err(form());
        }
        // A number beyond 64 bits is above the upper bound too.
        let mib = number.parse().unwrap_or(u64::MAX);
        let mib = mib.saturating_mul(mib_per_unit);
        if !MEMORY_MIB.contains(&mib) {
            return Err(ArgumentError(memory_fix()));
        }
        Ok(Self { mib })
    }
}
