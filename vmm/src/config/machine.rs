//! Configuration of processors, memory and boot source.

use super::check::check_path;
use super::error::{ConfigError, require};
use super::json::{optional_whole, whole};
use super::kernel_arguments::{self, Unsuitable};
use arch::layout;
use serde::{Deserialize, Serialize};
use std::ops::RangeInclusive;

/// The fix for a number of vCPUs outside [`layout::MAX_CPUS`].
pub(super) fn cpus_fix() -> String {
    format!("use 1 to {}", layout::MAX_CPUS)
}

/// Guest memory in MiB, inclusive: the limits of the memory layout.
pub(super) const MEMORY_MIB: RangeInclusive<u64> =
    (layout::MIN_RAM >> 20)..=(layout::MAX_RAM >> 20);

/// The fix for a size outside [`MEMORY_MIB`].
pub(super) fn memory_fix() -> String {
    format!("use {} to {} MiB", MEMORY_MIB.start(), MEMORY_MIB.end())
}

/// Page size of guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum HugePages {
    /// Pages of the host's base size.
    #[default]
    None,
    /// Pages of 2 MiB from the host's pool (`vm.nr_hugepages`).
    #[serde(rename = "2M")]
    TwoMib,
    /// Any other word, such as `Transparent`: validation refuses it.
    #[serde(other)]
    Unsupported,
}

/// Kind of the mapping that is guest memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemBacking {
    /// Private anonymous memory.
    #[default]
    Anonymous,
    /// A memfd, which other processes can map.
    Memfd,
}

/// Processors and memory (`/machine-config`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs, 1 to 32, inclusive.
    #[serde(deserialize_with = "whole")]
    pub vcpu_count: u8,
    /// Guest memory in MiB, 64 to 261120, inclusive.
    #[serde(deserialize_with = "whole")]
    pub mem_size_mib: u64,
    /// Accepted as `false` only.
    #[serde(default)]
    pub smt: bool,
    /// Accepted as `false` only.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Accepted as `"None"` only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<String>,
    /// Page size of guest memory.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// Kind of the mapping that is guest memory. Not in Firecracker's API.
    #[serde(default)]
    pub mem_backing: MemBacking,
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 512,
            smt: false,
            track_dirty_pages: false,
            cpu_template: None,
            huge_pages: HugePages::None,
            mem_backing: MemBacking::Anonymous,
        }
    }
}

impl MachineConfig {
    /// Checks that the values are valid and that this monitor supports them.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        require(
            (1..=layout::MAX_CPUS).contains(&self.vcpu_count.into()),
            "vcpu_count",
            &cpus_fix(),
        )?;
        require(
            MEMORY_MIB.contains(&self.mem_size_mib),
            "mem_size_mib",
            &memory_fix(),
        )?;
        require(
            !self.smt,
            "smt",
            "guest processors are never siblings; set it to false",
        )?;
        require(
            !self.track_dirty_pages,
            "track_dirty_pages",
            "there are no snapshots to track for; set it to false",
        )?;
        let template = self.cpu_template.as_deref().unwrap_or("None");
        require(
            template == "None",
            "cpu_template",
            "CPU templates are not supported; leave it out or use \"None\"",
        )?;
        require(
            self.huge_pages != HugePages::Unsupported,
            "huge_pages",
            "use \"None\" or \"2M\"",
        )
    }
}

/// A change to some fields of [`MachineConfig`] (`PATCH /machine-config`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigUpdate {
    /// See [`MachineConfig::vcpu_count`].
    #[serde(default, deserialize_with = "optional_whole")]
    pub vcpu_count: Option<u8>,
    /// See [`MachineConfig::mem_size_mib`].
    #[serde(default, deserialize_with = "optional_whole")]
    pub mem_size_mib: Option<u64>,
    /// See [`MachineConfig::smt`].
    pub smt: Option<bool>,
    /// See [`MachineConfig::track_dirty_pages`].
    pub track_dirty_pages: Option<bool>,
    /// See [`MachineConfig::cpu_template`].
    pub cpu_template: Option<String>,
    /// See [`MachineConfig::huge_pages`].
    pub huge_pages: Option<HugePages>,
    /// See [`MachineConfig::mem_backing`].
    pub mem_backing: Option<MemBacking>,
}

impl MachineConfigUpdate {
    /// Returns `current` with the given fields replaced.
    #[must_use]
    pub(crate) fn applied_to(self, current: &MachineConfig) -> MachineConfig {
        MachineConfig {
            vcpu_count: self.vcpu_count.unwrap_or(current.vcpu_count),
            mem_size_mib: self.mem_size_mib.unwrap_or(current.mem_size_mib),
            smt: self.smt.unwrap_or(current.smt),
            track_dirty_pages: self.track_dirty_pages.unwrap_or(current.track_dirty_pages),
            cpu_template: self.cpu_template.or_else(|| current.cpu_template.clone()),
            huge_pages: self.huge_pages.unwrap_or(current.huge_pages),
            mem_backing: self.mem_backing.unwrap_or(current.mem_backing),
        }
    }
}

/// Kernel, initial ramdisk and command line (`/boot-source`).
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BootSource {
    /// The kernel: a bzImage or ELF on x86_64, an `Image` on aarch64.
    pub kernel_image_path: String,
    /// The initial ramdisk, if any.
    pub initrd_path: Option<String>,
    /// The kernel command line. If omitted, a default gives a distribution kernel a console.
    pub boot_args: Option<String>,
    /// `boot_args` comes from `--cmdline`: all of it reaches the kernel.
    #[serde(skip)]
    pub typed: bool,
}

impl BootSource {
    /// Checks the paths' form and the command line; opens nothing.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        check_path("kernel_image_path", &self.kernel_image_path)?;
        if let Some(initrd) = &self.initrd_path {
            check_path("initrd_path", initrd)?;
        }
        let Some(boot_args) = &self.boot_args else {
            return Ok(());
        };
        require(
            boot_args.len() <= layout::MAX_CMDLINE,
            "boot_args",
            "is longer than the 2047 bytes a kernel reads; shorten it",
        )?;
        require(
            boot_args
                .bytes()
                .all(|byte| byte.is_ascii_graphic() || byte == b' '),
            "boot_args",
            "use printable ASCII characters and spaces only",
        )
    }

    /// The command line for the guest, if one is configured: `boot_args` without the arguments that
    /// suit other machines. A typed command line keeps them. Each is logged.
    #[must_use]
    pub(crate) fn command_line(&self) -> Option<String> {
        let boot_args = self.boot_args.as_ref()?;
        let (kept, unsuitable) = kernel_arguments::split(std::env::consts::ARCH, boot_args);
        for Unsuitable { argument, effect } in unsuitable {
            if self.typed {
                log::warn!("--cmdline: {argument} {effect}");
            } else {
                log::warn!("boot_args: {argument} is left out: it {effect}");
            }
        }
        Some(if self.typed { boot_args.clone() } else { kept })
    }
}
