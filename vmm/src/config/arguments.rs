//! The command line's spelling of the same types: `--disk path=FILE,readonly=on` and the like.
//!
//! A value is a list of `key=value` separated by commas; a comma inside a value is doubled.

use super::{
    CacheType, ConfigError, Drive, Iommu, IommuModel, NetworkInterface, Stage, Vsock, machine,
};
use devices::error::Chain;
use std::str::FromStr;

/// Why an argument cannot be read: one line that names the key and the fix.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ArgumentError(String);

impl From<ConfigError> for ArgumentError {
    fn from(error: ConfigError) -> Self {
        Self(Chain(&error).to_string())
    }
}

/// The `key=value` pairs of one argument, handed out by key so that what is left is unknown.
struct Options {
    pairs: Vec<(String, String)>,
}

impl Options {
    fn parse(text: &str) -> Result<Self, ArgumentError> {
        let mut pairs: Vec<(String, String)> = Vec::new();
        for item in split_commas(text) {
            let (key, value) = item
                .split_once('=')
                .ok_or_else(|| ArgumentError(format!("\"{item}\" is not of the form key=value")))?;
            if pairs.iter().any(|(known, _)| known == key) {
                return Err(ArgumentError(format!("{key} is given twice")));
            }
            pairs.push((key.to_owned(), value.to_owned()));
        }
        Ok(Self { pairs })
    }

    fn take(&mut self, key: &str) -> Option<String> {
        let index = self.pairs.iter().position(|(known, _)| known == key)?;
        Some(self.pairs.swap_remove(index).1)
    }

    fn require(&mut self, key: &str) -> Result<String, ArgumentError> {
        self.take(key)
            .ok_or_else(|| ArgumentError(format!("{key}= is missing")))
    }

    fn switch(&mut self, key: &str, default: bool) -> Result<bool, ArgumentError> {
        match self.take(key).as_deref() {
            None => Ok(default),
            Some("on") => Ok(true),
            Some("off") => Ok(false),
            Some(other) => Err(ArgumentError(format!(
                "{key}={other}: use {key}=on or {key}=off"
            ))),
        }
    }

    fn number<T: FromStr>(&mut self, key: &str) -> Result<Option<T>, ArgumentError> {
        let Some(text) = self.take(key) else {
            return Ok(None);
        };
        let number = text.parse().map_err(|_| {
            ArgumentError(format!("{key}={text}: not a number, or out of its range"))
        })?;
        Ok(Some(number))
    }

    /// Refuses what nobody asked for, naming what could have been meant.
    fn finish(self, known: &str) -> Result<(), ArgumentError> {
        match self.pairs.first() {
            None => Ok(()),
            Some((key, _)) => Err(ArgumentError(format!("unknown key {key}; use {known}"))),
        }
    }
}

/// Splits at single commas; a doubled comma stands for one comma.
fn split_commas(text: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        let doubled = character == ',' && characters.next_if_eq(&',').is_some();
        if character == ',' && !doubled {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(character);
        }
    }
    items
}

/// `path=FILE[,id=ID][,readonly=on|off][,root=on|off][,cache=unsafe|writeback][,iommu=on|off]
/// [,queues=N]`. Without `id=` the drive is nameless until
/// [`VmConfig::name_devices`](super::VmConfig::name_devices).
impl FromStr for Drive {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut options = Options::parse(text)?;
        let cache_type = match options.take("cache").as_deref() {
            None | Some("unsafe") => CacheType::Unsafe,
            Some("writeback") => CacheType::Writeback,
            Some(other) => {
                return Err(ArgumentError(format!(
                    "cache={other}: use cache=unsafe or cache=writeback"
                )));
            }
        };
        let drive = Self {
            path_on_host: options.require("path")?,
            drive_id: options.take("id").unwrap_or_default(),
            is_read_only: options.switch("readonly", false)?,
            is_root_device: options.switch("root", false)?,
            cache_type,
            iommu: options.switch("iommu", true)?,
            num_queues: options.number("queues")?.unwrap_or(1),
            ..Self::default()
        };
        options.finish("path, id, readonly, root, cache, iommu or queues")?;
        Ok(drive)
    }
}

/// `tap=NAME[,id=ID][,mac=MAC][,iommu=on|off][,queues=N][,mtu=N]`. Without `id=` the interface
/// is nameless until [`VmConfig::name_devices`](super::VmConfig::name_devices).
impl FromStr for NetworkInterface {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut options = Options::parse(text)?;
        let interface = Self {
            host_dev_name: options.require("tap")?,
            iface_id: options.take("id").unwrap_or_default(),
            guest_mac: options.take("mac"),
            iommu: options.switch("iommu", true)?,
            num_queues: options.number("queues")?.unwrap_or(1),
            mtu: options.number("mtu")?,
            ..Self::default()
        };
        options.finish("tap, id, mac, iommu, queues or mtu")?;
        interface.mac()?;
        Ok(interface)
    }
}

/// `cid=N[,iommu=on|off]`.
impl FromStr for Vsock {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut options = Options::parse(text)?;
        let guest_cid = options
            .number("cid")?
            .ok_or_else(|| ArgumentError("cid= is missing".to_owned()))?;
        let vsock = Self {
            guest_cid,
            uds_path: super::Unsupported::default(),
            vsock_id: None,
            iommu: options.switch("iommu", true)?,
        };
        options.finish("cid or iommu")?;
        vsock.validate()?;
        Ok(vsock)
    }
}

impl FromStr for IommuModel {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::None, Self::VirtioIommu, Self::Smmuv3]
            .into_iter()
            .find(|model| model.to_string() == text)
            .ok_or_else(|| {
                ArgumentError(format!(
                    "model {text} is unknown; use none, virtio-iommu or smmuv3"
                ))
            })
    }
}

impl FromStr for Stage {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::One, Self::Two, Self::Nested]
            .into_iter()
            .find(|stage| stage.to_string() == text)
            .ok_or_else(|| ArgumentError(format!("stage={text}: use 1, 2 or nested")))
    }
}

/// `MODEL[,ats=on|off][,stage=1|2|nested][,prefill=on|off][,prefetch=on|off]`.
impl FromStr for Iommu {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (model, rest) = text.split_once(',').unwrap_or((text, ""));
        let mut options = if rest.is_empty() {
            Options { pairs: Vec::new() }
        } else {
            Options::parse(rest)?
        };
        let iommu = Self {
            model: model.parse()?,
            ats: options.switch("ats", false)?,
            stage: options
                .take("stage")
                .map_or(Ok(Stage::One), |text| text.parse())?,
            prefill: options.switch("prefill", true)?,
            prefetch: options.switch("prefetch", true)?,
        };
        options.finish("ats, stage, prefill or prefetch")?;
        iommu.validate()?;
        Ok(iommu)
    }
}

/// An amount of guest memory: `512M`, `2G`, or a plain number of MiB. A whole number of MiB,
/// at least one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize {
    mib: u64,
}

impl MemorySize {
    /// The amount in MiB.
    #[must_use]
    pub fn mib(self) -> u64 {
        self.mib
    }
}

impl FromStr for MemorySize {
    type Err = ArgumentError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = || {
            ArgumentError(format!(
                "\"{text}\" is not an amount of memory; use a number with M or G, such as 512M, up to 1024G"
            ))
        };
        let unit_at = text
            .find(|character: char| !character.is_ascii_digit())
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(unit_at);
        let mib_per_unit = match unit.to_ascii_lowercase().as_str() {
            "" | "m" | "mib" => 1,
            "g" | "gib" => 1 << 10,
            "t" | "tib" => 1 << 20,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        let mib = number.checked_mul(mib_per_unit).ok_or_else(wrong)?;
        if !(1..=machine::MAX_MEMORY_MIB).contains(&mib) {
            return Err(wrong());
        }
        Ok(Self { mib })
    }
}
