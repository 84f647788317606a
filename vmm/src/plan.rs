//! Converts a configuration into the machine to build.
//!
//! [`VmConfig`] is the user's configuration, from command line, file or API.
//! [`MachinePlan`] is the machine that will be built: every default filled in,
//! every address assigned. Only [`MachinePlan::resolve`] converts, and can
//! fail.

use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use arch::layout;

use crate::config::{
    CacheType, ConfigError, Drive, HugePages, Iommu, IommuModel, MacAddress, MemBacking, Serial,
    VmConfig,
};

/// Default command line: log and login on the serial port; a kernel panic
/// resets at once instead of hanging.
#[cfg(target_arch = "x86_64")]
const DEFAULT_CMDLINE: &str = "console=ttyS0 8250.nr_uarts=1 panic=-1";
#[cfg(target_arch = "aarch64")]
const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1";

/// Bounds of [`MachinePlan::max_mappings`].
const MIN_MAPPINGS: usize = 1 << 16;
const MAX_MAPPINGS: usize = 1 << 21;

/// Plan of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MachinePlan {
    /// Virtual processors, all present at boot.
    pub vcpus: u8,
    /// Guest memory, ascending and disjoint.
    pub memory: Vec<arch::Range>,
    /// Kind of the mapping that is guest memory.
    pub mem_backing: MemBacking,
    /// Page size of guest memory.
    pub huge_pages: HugePages,
    /// Kernel, initial ramdisk and command line.
    pub boot: Boot,
    /// Output of the serial console.
    pub console: Console,
    /// The IOMMU in front of the PCI functions.
    pub iommu: Iommu,
    /// Functions on the PCI bus; without any there is no bus.
    pub functions: Vec<FunctionPlan>,
}

/// A function on the PCI bus.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FunctionPlan {
    /// The device number on bus 0.
    pub slot: u8,
    /// Name in the configuration.
    pub id: String,
    /// Whether it is behind the IOMMU.
    pub iommu: bool,
    /// Type of the device, with its settings.
    pub device: DevicePlan,
}

/// Type of a PCI function's device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DevicePlan {
    /// The virtio-iommu itself.
    VirtioIommu,
    /// A disk.
    Block {
        /// Path of the image.
        path: PathBuf,
        /// The guest can only read.
        read_only: bool,
        /// Request queues.
        queues: u16,
        /// The guest can flush.
        flush: bool,
    },
    /// A network interface.
    Net {
        /// Name of the tap on the host.
        tap: String,
        /// The guest's Ethernet address.
        mac: MacAddress,
        /// MTU offered to the guest (VIRTIO_NET_F_MTU), in bytes.
        mtu: Option<u16>,
        /// Queue pairs.
        pairs: u16,
    },
    /// The socket device.
    Vsock {
        /// The guest's context identifier.
        cid: u32,
    },
    /// A source of entropy.
    Entropy,
}

/// Kernel, initial ramdisk and command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Boot {
    /// File of the kernel.
    pub kernel: PathBuf,
    /// File of the initial ramdisk.
    pub initrd: Option<PathBuf>,
    /// The whole command line for the guest.
    pub cmdline: String,
}

/// Input and output of the serial console.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Console {
    /// Standard output, with the keyboard on standard input.
    Stdio,
    /// A file or FIFO, and no keyboard.
    File {
        /// Path of the file.
        path: PathBuf,
        /// Upper bound on the size of the file, in bytes.
        max_bytes: Option<u64>,
    },
}

impl MachinePlan {
    /// Plans the machine. Touches neither files nor the host.
    ///
    /// # Errors
    /// The first value that cannot be built, by its name in the configuration.
    pub fn resolve(config: &VmConfig) -> Result<Self, ConfigError> {
        let source = config.validate_for_start()?;
        let machine = &config.machine_config;
        if machine.huge_pages == HugePages::TwoMib && !machine.mem_size_mib.is_multiple_of(2) {
            let problem = "use an even number with pages of 2 MiB";
            return Err(ConfigError::new("machine-config.mem_size_mib", problem));
        }
        Ok(Self {
            vcpus: machine.vcpu_count,
            memory: memory_ranges(machine.mem_size_mib)?,
            mem_backing: machine.mem_backing,
            huge_pages: machine.huge_pages,
            boot: Boot {
                kernel: PathBuf::from(&source.kernel_image_path),
                initrd: source.initrd_path.as_ref().map(PathBuf::from),
                cmdline: cmdline(source.command_line(), &config.drives),
            },
            iommu: config.iommu.clone(),
            functions: functions(config)?,
            console: console(config.serial.as_ref())?,
        })
    }

    /// Upper bound on the mappings of a virtio-iommu: two for each 4 KiB of
    /// RAM, since a driver maps halves of a page separately, and a page for
    /// several devices. The least value covers the queues and buffers of all
    /// devices of a small machine; the greatest costs 174 MiB.
    #[must_use]
    pub fn max_mappings(&self) -> usize {
        let ram = self.memory.iter().map(|range| range.size);
        let pages = ram.sum::<u64>() >> 12;
        let bound = usize::try_from(pages.saturating_mul(2)).unwrap_or(usize::MAX);
        bound.clamp(MIN_MAPPINGS, MAX_MAPPINGS)
    }
}

fn console(serial: Option<&Serial>) -> Result<Console, ConfigError> {
    let Some(serial) = serial else {
        return Ok(Console::Stdio);
    };
    match (&serial.serial_out_path, serial.serial_out_max_mib) {
        (Some(path), max_mib) => Ok(Console::File {
            path: path.into(),
            max_bytes: max_mib.map(|mib| u64::from(mib) << 20),
        }),
        (None, None) => Ok(Console::Stdio),
        (None, Some(_)) => {
            let problem = "limits a file; give serial_out_path, or leave it out";
            Err(ConfigError::new("serial.serial_out_max_mib", problem))
        }
    }
}

fn memory_ranges(mib: u64) -> Result<Vec<arch::Range>, ConfigError> {
    let size = mib.checked_mul(1 << 20);
    size.and_then(|size| layout::ram_ranges(size).ok())
        .ok_or_else(|| {
            let problem = format!("{mib} MiB cannot be laid out");
            ConfigError::new("machine-config.mem_size_mib", problem)
        })
}

/// The command line, with `root=` for the drive that is the root device.
fn cmdline(given: Option<String>, drives: &[Drive]) -> String {
    let mut cmdline = given.unwrap_or_else(|| DEFAULT_CMDLINE.to_owned());
    // A drive after vdz is vdaa; a bus has no slot for one.
    let names = ('a'..='z').map(String::from);
    let names = names.chain(('a'..='z').map(|letter| format!("a{letter}")));
    let root = drives
        .iter()
        .zip(names)
        .find(|(drive, _)| drive.is_root_device);
    if let Some((drive, letters)) = root {
        let device = match &drive.partuuid {
            Some(partuuid) => format!("PARTUUID={partuuid}"),
            // Linux names virtio disks in the order of their slots.
            None => format!("/dev/vd{letters}"),
        };
        let mode = if drive.is_read_only { "ro" } else { "rw" };
        cmdline.push_str(&format!(" root={device} {mode}"));
    }
    cmdline
}

/// Assigns a slot to every function: the IOMMU has the first, so that its
/// driver can probe before the others need it.
fn functions(config: &VmConfig) -> Result<Vec<FunctionPlan>, ConfigError> {
    let mut devices = Vec::new();
    if config.iommu.model == IommuModel::VirtioIommu {
        devices.push(("iommu".to_owned(), false, DevicePlan::VirtioIommu));
    }
    for drive in &config.drives {
        let device = DevicePlan::Block {
            path: PathBuf::from(&drive.path_on_host),
            read_only: drive.is_read_only,
            queues: drive.num_queues,
            flush: drive.cache_type == CacheType::Writeback,
        };
        devices.push((drive.drive_id.clone(), drive.iommu, device));
    }
    for interface in &config.network_interfaces {
        let device = DevicePlan::Net {
            tap: interface.host_dev_name.clone(),
            mac: match interface.mac()? {
                Some(mac) => mac,
                None => derived_mac(&host_id(), &interface.host_dev_name),
            },
            mtu: interface.mtu,
            pairs: interface.num_queues,
        };
        devices.push((interface.iface_id.clone(), interface.iommu, device));
    }
    if let Some(vsock) = &config.vsock {
        let cid = vsock.guest_cid;
        devices.push(("vsock".to_owned(), vsock.iommu, DevicePlan::Vsock { cid }));
    }
    if let Some(entropy) = &config.entropy {
        devices.push(("entropy".to_owned(), entropy.iommu, DevicePlan::Entropy));
    }
    let translated = config.iommu.model != IommuModel::None;
    let numbered = (1..).zip(devices);
    let functions = numbered.map(|(slot, (id, behind, device))| FunctionPlan {
        slot,
        id,
        iommu: behind && translated,
        device,
    });
    Ok(functions.collect())
}

/// Files that identify a host, in order of preference: two that are permanent,
/// and one that changes with each start of the host.
const HOST_IDS: [&str; 3] = [
    "/etc/machine-id",
    "/var/lib/dbus/machine-id",
    "/proc/sys/kernel/random/boot_id",
];

/// Upper bound on the bytes that are read of a host's identifier.
const HOST_ID_BYTES: u64 = 128;

/// Identifier of this host (machine-id(5)); empty without one.
fn host_id() -> String {
    let ids = HOST_IDS.iter().map(|path| read_line(Path::new(path)));
    ids.flatten()
        .find(|id| !id.is_empty() && id != "uninitialized")
        .unwrap_or_default()
}

fn read_line(path: &Path) -> Option<String> {
    let mut text = String::new();
    // Non-blocking: a FIFO must not block the control plane.
    let opened = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let read = opened.and_then(|file| file.take(HOST_ID_BYTES).read_to_string(&mut text));
    read.ok().map(|_| text.trim().to_owned())
}

/// Derives a locally administered address for the guest's end of a tap: unique
/// for each tap of a host and for each host, and the same at each start.
fn derived_mac(host: &str, tap: &str) -> MacAddress {
    // FNV-1a, so that the address does not depend on the toolchain. No text has
    // a byte 0xff.
    let bytes = host.bytes().chain([0xff]).chain(tap.bytes());
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let [a, b, c, d, e, ..] = hash.to_le_bytes();
    MacAddress::try_from([0x06, a, b, c, d, e]).expect("the first octet is even")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{BootSource, Drive};

    fn config() -> VmConfig {
        VmConfig {
            boot_source: Some(BootSource {
                kernel_image_path: "vmlinuz".into(),
                ..BootSource::default()
            }),
            ..VmConfig::default()
        }
    }

    #[test]
    fn an_omitted_command_line_gets_a_console() {
        let plan = MachinePlan::resolve(&config()).unwrap();
        assert!(plan.boot.cmdline.contains("console=ttyS0"));
        assert_eq!(plan.console, Console::Stdio);
        assert_eq!(plan.memory[0].size, 512 << 20);
    }

    #[test]
    fn a_given_command_line_is_used_unchanged() {
        let mut config = config();
        config.boot_source.as_mut().unwrap().boot_args = Some("quiet".into());
        let plan = MachinePlan::resolve(&config).unwrap();
        assert_eq!(plan.boot.cmdline, "quiet");
    }

    #[test]
    fn limit_of_the_console_is_for_a_file() {
        let mut config = config();
        let serial = |path: Option<&str>| Serial {
            serial_out_path: path.map(str::to_owned),
            serial_out_max_mib: Some(3),
            ..Serial::default()
        };
        config.serial = Some(serial(Some("c")));
        let file = Console::File {
            path: "c".into(),
            max_bytes: Some(3 << 20),
        };
        assert_eq!(MachinePlan::resolve(&config).unwrap().console, file);
        config.serial = Some(serial(None));
        let error = MachinePlan::resolve(&config).unwrap_err();
        assert_eq!(error.field, "serial.serial_out_max_mib");
    }

    #[test]
    fn memory_that_does_not_fit_the_layout_is_refused_by_name() {
        for mib in [1, 63, 1 << 20] {
            let mut config = config();
            config.machine_config.mem_size_mib = mib;
            let error = MachinePlan::resolve(&config).unwrap_err();
            assert_eq!(error.field, "machine-config.mem_size_mib", "{mib}");
        }
    }

    #[test]
    fn memory_beyond_4_gib_is_complete() {
        let mut config = config();
        config.machine_config.mem_size_mib = 6 << 10;
        let plan = MachinePlan::resolve(&config).unwrap();
        let total: u64 = plan.memory.iter().map(|range| range.size).sum();
        assert_eq!(total, 6 << 30);
    }

    #[test]
    fn mappings_are_bounded_by_ram() {
        for (mib, bound) in [
            (64, 1 << 16),
            (512, 1 << 18),
            (4096, 1 << 21),
            (8192, 1 << 21),
        ] {
            let mut config = config();
            config.machine_config.mem_size_mib = mib;
            let plan = MachinePlan::resolve(&config).unwrap();
            assert_eq!(plan.max_mappings(), bound, "{mib} MiB");
        }
    }

    #[test]
    fn a_derived_mac_is_unique_to_the_host_and_the_tap() {
        let made = |host: &str, tap: &str| derived_mac(host, tap).octets();
        assert_eq!(made("a", "tap0"), made("a", "tap0"));
        assert_ne!(made("a", "tap0"), made("a", "tap1"));
        assert_ne!(made("a", "tap0"), made("b", "tap0"));
        assert_ne!(made("at", "ap0"), made("a", "tap0"));
        assert_eq!(host_id(), host_id());
        assert!(read_line(Path::new("/dev/zero")).is_some_and(|line| line.len() <= 128));
        assert_eq!(read_line(Path::new("/nowhere")), None);
    }

    #[test]
    fn a_machine_without_a_kernel_is_refused() {
        let error = MachinePlan::resolve(&VmConfig::default()).unwrap_err();
        assert!(error.to_string().contains("--kernel"), "{error}");
    }

    #[test]
    fn functions_get_slots_behind_the_iommu() {
        let mut config = config();
        config.iommu.model = IommuModel::VirtioIommu;
        config.drives = vec![
            "path=disk,id=d".parse::<Drive>().unwrap(),
            Drive {
                drive_id: "e".into(),
                is_root_device: true,
                iommu: false,
                ..Drive::default()
            },
        ];
        config.drives[1].path_on_host = "other".into();
        let plan = MachinePlan::resolve(&config).unwrap();
        let functions: Vec<_> = plan
            .functions
            .iter()
            .map(|function| (function.slot, function.id.as_str(), function.iommu))
            .collect();
        assert_eq!(
            functions,
            [(1, "iommu", false), (2, "d", true), (3, "e", false)]
        );
        assert!(plan.boot.cmdline.ends_with(" root=/dev/vdb rw"));
    }
}
