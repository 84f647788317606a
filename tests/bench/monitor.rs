//! The measured monitors: portcullis, and the distribution's QEMU as a peer.

use std::path::Path;
use std::process::Command;

use super::support::host::Tap;
use super::support::{Guest, Machine, image, portcullis};

/// Memory of the machines, in MiB.
pub const GUEST_MIB: u32 = 512;
/// Ethernet address of the guest's network device.
pub const MAC: &str = "06:00:ac:10:00:02";
/// Directory of the peer in the emulated host.
const PEER: &str = "/peer";

/// A program that runs guests.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Monitor {
    Portcullis,
    Qemu,
}

impl Monitor {
    /// Name in figures.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portcullis => "portcullis",
            Self::Qemu => "QEMU",
        }
    }

    /// The file that is executed.
    pub fn program(self) -> String {
        match self {
            Self::Portcullis => portcullis().display().to_string(),
            Self::Qemu => format!("{PEER}/ld.so"),
        }
    }

    /// Starts a machine without devices, with `more` on the kernel's command line.
    pub fn launch_alone(self, more: &str) -> Guest {
        match self {
            Self::Portcullis => plain(more).launch(),
            Self::Qemu => Guest::launch_piped(qemu(alone(), more, "initramfs.cpio", &[])),
        }
    }

    /// Boots a machine with a network device behind `iommu` to its shell.
    pub fn boot_with_net(self, iommu: &str, more: &str, tap: &Tap) -> Guest {
        let machine = plain(more)
            .tools()
            .with("--iommu", iommu)
            .with("--net", format!("tap={},id=net0,mac={MAC}", tap.name));
        match self {
            Self::Portcullis => machine.boot(),
            Self::Qemu => machine.boot_by(|| {
                let devices = net_behind(iommu, tap);
                let board = with_pcie(iommu);
                Guest::launch_piped(qemu(&board, more, "initramfs-tools.cpio", &devices))
            }),
        }
    }
}

/// A machine of portcullis with the size of all measurements.
pub fn plain(more: &str) -> Machine {
    Machine::new()
        .cmdline(more)
        .with("--memory", format!("{GUEST_MIB}M"))
}

/// QEMU's smallest machine.
fn alone() -> &'static str {
    if cfg!(target_arch = "x86_64") {
        "microvm,x-option-roms=off,pit=off,pic=off,rtc=off,auto-kernel-cmdline=off"
    } else {
        "virt,gic-version=3"
    }
}

fn with_pcie(iommu: &str) -> String {
    if cfg!(target_arch = "x86_64") {
        return "q35,vmport=off,usb=off,sata=off,smbus=off,hpet=off".to_owned();
    }
    let smmu = if iommu.starts_with("smmuv3") {
        ",iommu=smmuv3"
    } else {
        ""
    };
    format!("virt,gic-version=3{smmu}")
}

/// The IOMMU, unless it is a part of the board, and a network device behind it.
fn net_behind(iommu: &str, tap: &Tap) -> Vec<String> {
    let platform = ["on", "off"][usize::from(iommu == "none")];
    let mut devices = vec![
        "-netdev".to_owned(),
        format!(
            "tap,id=net0,ifname={},script=no,downscript=no,vhost=on",
            tap.name
        ),
        "-device".to_owned(),
        format!(
            "virtio-net-pci,netdev=net0,mac={MAC},disable-legacy=on,iommu_platform={platform},romfile="
        ),
    ];
    if iommu == "virtio-iommu" {
        // Ahead of the devices behind it.
        devices.splice(0..0, ["-device", "virtio-iommu-pci"].map(str::to_owned));
    }
    devices
}

fn qemu(board: &str, more: &str, initramfs: &str, devices: &[String]) -> Command {
    let (kernel, console) = if cfg!(target_arch = "x86_64") {
        ("vmlinux-6.12", "ttyS0")
    } else {
        ("vmlinuz-6.12", "ttyAMA0")
    };
    let peer = Path::new(PEER);
    let mut command = Command::new(peer.join("ld.so"));
    command.arg("--library-path").arg(peer.join("lib"));
    command
        .arg(peer.join("qemu"))
        .arg("-L")
        .arg(peer.join("share"));
    command.args(["-accel", "kvm", "-cpu", "host", "-smp", "1", "-M", board]);
    command.args(["-m", &GUEST_MIB.to_string()]);
    command.args(["-nodefaults", "-display", "none", "-no-reboot"]);
    command.args(["-serial", "stdio", "-kernel", &image(kernel)]);
    command.args(["-initrd", &image(initramfs), "-append"]);
    command.arg(format!("console={console} quiet panic=-1 {more}"));
    command.args(devices);
    command
}
