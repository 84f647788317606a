//! Configuration of a machine: the types of `--config`, `GET /vm/config` and every `PUT`.
//!
//! Names and shapes are Firecracker's where it has the resource. Its fields without a meaning here
//! (rate limiters, CPU templates, …) are accepted at their defaults only. Any other value is an
//! error that names the field, so that no limit is ignored silently.
//!
//! `validate` checks values only: it opens no file and touches no host device.

mod arguments;
mod check;
mod devices;
mod error;
mod iommu;
mod json;
mod kernel_arguments;
mod keys;
mod logging;
mod machine;
mod sandbox;
mod suggest;
mod unsupported;
mod user;

pub use arguments::{Argument, ArgumentError, CpuCount, MemorySize};
use check::MAX_QUEUES;
pub use devices::{
    CacheType, Drive, Entropy, IoEngine, MacAddress, NetworkInterface, Serial, Vsock,
};
pub use error::ConfigError;
pub use iommu::{Iommu, IommuModel};
pub use json::parse_json;
pub use keys::{Key, Omitted, Value};
pub use logging::{LogLevel, Logger, Metrics};
pub use machine::{BootSource, HugePages, MachineConfig, MachineConfigUpdate, MemBacking};
pub use sandbox::Sandbox;
pub use suggest::{closest, either};
pub use unsupported::{RateLimiter, TokenBucket, Unsupported};
pub use user::User;

use check::{check_path, element};
use error::require;

use ::devices::pci::SLOTS;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;

/// Configuration of a machine: the document of `--config FILE` and of `GET /vm/config`. Section
/// names are Firecracker's, with `iommu`, `serial`, `sandbox`, `allow-dirs` and `user` added.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct VmConfig {
    /// Kernel, initial ramdisk and command line. A machine cannot start without it.
    pub boot_source: Option<BootSource>,
    /// Processors and memory.
    pub machine_config: MachineConfig,
    /// The IOMMU in front of the PCI functions.
    pub iommu: Iommu,
    /// Block devices, in the order of their PCI functions.
    pub drives: Vec<Drive>,
    /// Network devices, in the order of their PCI functions.
    pub network_interfaces: Vec<NetworkInterface>,
    /// The vsock device, if any.
    pub vsock: Option<Vsock>,
    /// The entropy device, if any.
    pub entropy: Option<Entropy>,
    /// Output of the serial console.
    pub serial: Option<Serial>,
    /// Destination and level of the log.
    pub logger: Option<Logger>,
    /// Destination of the metrics.
    pub metrics: Option<Metrics>,
    /// Confinement of the process.
    pub sandbox: Sandbox,
    /// Directories in which a running machine may be told to open files, besides those of the
    /// configured log and metrics.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub allow_dirs: Vec<String>,
    /// User to change to once the host's files and devices are open.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub user: Option<User>,
    /// Not supported.
    #[serde(skip_serializing_if = "Unsupported::is_absent")]
    pub balloon: Unsupported,
    /// Not supported.
    #[serde(skip_serializing_if = "Unsupported::is_absent")]
    pub cpu_config: Unsupported,
    /// Not supported.
    #[serde(skip_serializing_if = "Unsupported::is_absent")]
    pub mmds_config: Unsupported,
    /// Not supported.
    #[serde(skip_serializing_if = "Unsupported::is_absent")]
    pub pmem: Unsupported,
    /// Not supported.
    #[serde(skip_serializing_if = "Unsupported::is_absent")]
    pub memory_hotplug: Unsupported,
}

impl VmConfig {
    /// Reads and validates the JSON of `--config`.
    ///
    /// # Errors
    /// The text is not JSON, or a value is refused. One line, which names the field, or the line
    /// and column of the syntax error.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let config: Self = parse_json(text.as_bytes())?;
        config.validate()?;
        Ok(config)
    }

    /// Checks every section, and the sections against one another. A missing boot source is not an
    /// error here, because the API configures a machine in steps: see
    /// [`VmConfig::validate_for_start`].
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        self.refuse_unsupported_sections()?;
        check_sections([
            ("machine-config", Some(self.machine_config.validate())),
            ("iommu", Some(self.iommu.validate())),
            (
                "boot-source",
                self.boot_source.as_ref().map(BootSource::validate),
            ),
        ])?;
        for (index, drive) in self.drives.iter().enumerate() {
            let section = element("drives", index, &drive.drive_id);
            drive.validate().map_err(|error| error.within(&section))?;
        }
        for (index, interface) in self.network_interfaces.iter().enumerate() {
            let section = element("network-interfaces", index, &interface.iface_id);
            let checked = interface.validate();
            checked.map_err(|error| error.within(&section))?;
        }
        check_sections([
            ("vsock", self.vsock.as_ref().map(Vsock::validate)),
            ("entropy", self.entropy.as_ref().map(Entropy::validate)),
            ("serial", self.serial.as_ref().map(Serial::validate)),
            ("logger", self.logger.as_ref().map(Logger::validate)),
            ("metrics", self.metrics.as_ref().map(Metrics::validate)),
        ])?;
        for (index, path) in self.allow_dirs.iter().enumerate() {
            check_path(&format!("allow-dirs[{index}]"), path)?;
        }
        self.validate_together()
    }

    /// Validates every section, and requires a boot source.
    ///
    /// # Errors
    /// The first value that is refused, by its field.
    pub fn validate_for_start(&self) -> Result<&BootSource, ConfigError> {
        self.validate()?;
        self.boot_source.as_ref().ok_or_else(|| {
            ConfigError::new(
                "boot-source",
                "no kernel is configured; give --kernel FILE, a section boot-source or PUT /boot-source",
            )
        })
    }

    /// Names the drives and interfaces that came from the command line without an `id=`:
    /// `disk0`, `disk1`, … and `net0`, `net1`, …, skipping names already taken.
    pub fn name_devices(&mut self) {
        let taken = self.drives.iter().map(|drive| drive.drive_id.clone());
        let names = free_names("disk", taken.collect());
        let nameless = self.drives.iter_mut().map(|drive| &mut drive.drive_id);
        let nameless = nameless.filter(|id| id.is_empty());
        nameless.zip(names).for_each(|(id, name)| *id = name);
        let interfaces = &mut self.network_interfaces;
        let taken = interfaces
            .iter()
            .map(|interface| interface.iface_id.clone());
        let names = free_names("net", taken.collect());
        let nameless = interfaces
            .iter_mut()
            .map(|interface| &mut interface.iface_id);
        let nameless = nameless.filter(|id| id.is_empty());
        nameless.zip(names).for_each(|(id, name)| *id = name);
    }

    fn refuse_unsupported_sections(&self) -> Result<(), ConfigError> {
        let sections = [
            ("balloon", self.balloon),
            ("cpu-config", self.cpu_config),
            ("mmds-config", self.mmds_config),
            ("pmem", self.pmem),
            ("memory-hotplug", self.memory_hotplug),
        ];
        for (name, section) in sections {
            section.refuse(name, "is not supported; remove the section")?;
        }
        Ok(())
    }

    fn validate_together(&self) -> Result<(), ConfigError> {
        let mut ids = BTreeSet::new();
        let mut root = None;
        for drive in &self.drives {
            let field = format!("drives[{}]", drive.drive_id);
            require(
                ids.insert(&drive.drive_id),
                &format!("{field}.drive_id"),
                "two drives have this id; rename one",
            )?;
            if drive.is_root_device
                && let Some(first) = root.replace(&drive.drive_id)
            {
                return Err(ConfigError::new(
                    format!("{field}.is_root_device"),
                    format!("drive {first} is the root device already; set one of them to false"),
                ));
            }
        }
        let mut ids = BTreeSet::new();
        let mut taps = BTreeSet::new();
        for interface in &self.network_interfaces {
            let field = format!("network-interfaces[{}]", interface.iface_id);
            require(
                ids.insert(&interface.iface_id),
                &format!("{field}.iface_id"),
                "two interfaces have this id; rename one",
            )?;
            require(
                taps.insert(&interface.host_dev_name),
                &format!("{field}.host_dev_name"),
                "another interface uses this tap device; give each its own",
            )?;
        }
        let devices = self.drives.len()
            + self.network_interfaces.len()
            + usize::from(self.vsock.is_some())
            + usize::from(self.entropy.is_some())
            + usize::from(self.iommu.model == IommuModel::VirtioIommu);
        require(
            devices < usize::from(SLOTS),
            "drives, network-interfaces",
            &format!(
                "more devices than the {} the PCI bus has slots for; remove some",
                SLOTS - 1
            ),
        )
    }
}

/// Checks sections in their order; an absent one is `None`.
fn check_sections<const N: usize>(
    sections: [(&str, Option<Result<(), ConfigError>>); N],
) -> Result<(), ConfigError> {
    for (section, checked) in sections {
        let checked = checked.transpose();
        checked.map_err(|error| error.within(section))?;
    }
    Ok(())
}

/// Yields `disk0`, `disk1`, … without those already taken.
fn free_names(stem: &'static str, taken: BTreeSet<String>) -> impl Iterator<Item = String> {
    (0u32..)
        .map(move |index| format!("{stem}{index}"))
        .filter(move |name| !taken.contains(name))
}

#[cfg(test)]
mod tests;
