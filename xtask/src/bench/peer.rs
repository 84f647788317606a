//! The distribution's QEMU as a peer: a monitor beside portcullis in the emulated host.

use anyhow::Result;

use crate::arch::Arch;
use crate::cpio::Archive;
use crate::packages;
use crate::userland::{self, Sysroot};

/// Firmware of an x86_64 machine without options; an aarch64 one boots without firmware.
const FIRMWARE: [&str; 5] = [
    "usr/share/seabios/bios-256k.bin",
    "usr/share/qemu/kvmvapic.bin",
    "usr/share/qemu/linuxboot_dma.bin",
    "usr/share/qemu/pvh.bin",
    "usr/share/qemu/qboot.rom",
];

/// Adds QEMU to the emulated host below /peer: its own loader `ld.so`, `lib`, `share`, `qemu`.
pub fn add(archive: &mut Archive, arch: Arch) -> Result<()> {
    let root = packages_for(arch)?;
    let program = format!("usr/bin/qemu-system-{arch}");
    archive.copy("peer/qemu", &root.path(&program))?;
    archive.copy("peer/ld.so", &root.path(arch.loader()))?;
    for (name, from) in root.libraries(&[&program])? {
        archive.copy(&format!("peer/lib/{name}"), &from)?;
    }
    if arch == Arch::X86_64 {
        for file in FIRMWARE {
            let name = file.rsplit_once('/').map_or(file, |(_, name)| name);
            archive.copy(&format!("peer/share/{name}"), &root.path(file))?;
        }
    }
    Ok(())
}

fn packages_for(arch: Arch) -> Result<Sysroot> {
    if arch == Arch::native() {
        return userland::host_tools();
    }
    let name = match arch {
        Arch::X86_64 => "qemu-system-x86",
        Arch::Aarch64 => "qemu-system-arm",
    };
    Sysroot::of_packages(packages::TOOLS, arch, "peer", &[name])
}
