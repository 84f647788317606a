//! Guest images: kernels of the distribution in several forms, and initramfs archives for them.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::arch::Arch;
use crate::cpio::Archive;
use crate::debian;
use crate::kernel::Kernel;
use crate::packages;
use crate::paths;
use crate::userland::{self, Sysroot};

/// Kernel series of the guests, and the meta packages of their newest version.
const SERIES: [(&str, &str); 2] = [
    ("6.12", "linux-image-6.12-cloud"),
    ("6.1", "linux-image-cloud"),
];

/// The meta package of the newest kernel.
const NEWEST: &str = "linux-image-cloud";

/// Modules of a guest; those in the first list are loaded at boot, in this order.
const BOOT_MODULES: [&str; 7] = [
    "virtio_iommu",
    "virtio_pci",
    "virtio_net",
    "virtio_blk",
    "virtio_rng",
    "vmw_vsock_virtio_transport",
    "ext4",
];
const MORE_MODULES: [&str; 5] = [
    "vfio_pci",
    "vfio_iommu_type1",
    "virtio_console",
    "erofs",
    "tun",
];

const INIT: &str = include_str!("../guest/init");
const INTRODUCE: &str = include_str!("../guest/introduce");

/// Programs in the larger of the two initramfs archives.
const TOOLS: [&str; 10] = [
    "bin/dash",
    "usr/bin/lspci",
    "usr/bin/setpci",
    "bin/ip",
    "usr/bin/socat",
    "usr/bin/iperf3",
    "sbin/ethtool",
    "sbin/mke2fs",
    "sbin/e2fsck",
    "sbin/tc",
];

/// The guest images of one architecture.
pub struct Images {
    /// Directory of the files; `docs/lab.md` names them.
    pub dir: PathBuf,
    /// An ext4 file system with the same files.
    pub disk: PathBuf,
}

/// Creates the guest images of `arch` unless they exist.
pub fn prepare(arch: Arch) -> Result<Images> {
    let base = paths::cache()?.join(format!("images-{arch}"));
    let newest = newest(arch);
    let recipe = format!(
        "5 {SERIES:?} {:?} {BOOT_MODULES:?} {MORE_MODULES:?} {TOOLS:?}\n{INIT}{INTRODUCE}{}",
        newest.as_ref().map(Kernel::release),
        debian::recipe()
    );
    paths::made_once(&base, &recipe, |base| {
        eprintln!("guest: preparing kernels and initramfs for {arch}");
        let dir = base.join("images");
        fs::create_dir_all(&dir)?;
        let programs = userland::guest_programs(arch)?;
        let tools = userland::host_tools()?;
        let mut archive = Archive::default();
        busybox(&mut archive, &programs)?;
        archive.file("init", 0o755, INIT.into());
        archive.file("etc/guest/introduce", 0o755, INTRODUCE.into());
        archive.file("etc/guest/modules", 0o644, BOOT_MODULES.join("\n").into());
        let modules = [&BOOT_MODULES[..], &MORE_MODULES].concat();
        if let Some(kernel) = &newest {
            // A separate archive: every guest with another kernel would unpack these modules too.
            let mut archive = archive.clone();
            kernel.add_modules(&mut archive, &modules)?;
            add_tools(&mut archive, &programs)?;
            archive.write(&dir.join("initramfs-newest.cpio"))?;
            fs::copy(&kernel.image, dir.join("vmlinuz-newest"))?;
        }
        for (series, meta) in SERIES {
            let meta = format!("{meta}-{}", arch.debian());
            let kernel = Kernel::fetch(packages::STABLE, &meta, arch)?;
            kernel.add_modules(&mut archive, &modules)?;
            kernel_forms(&kernel, arch, series, &dir, &tools)?;
        }
        archive.write(&dir.join("initramfs.cpio"))?;
        add_tools(&mut archive, &programs)?;
        archive.write(&dir.join("initramfs-tools.cpio"))?;
        let debian = debian::root_file_system(arch)?;
        fs::hard_link(debian, dir.join("debian.ext4"))?;
        file_system(&tools, &dir, &base.join("images.ext4"))
    })?;
    Ok(Images {
        dir: base.join("images"),
        disk: base.join("images.ext4"),
    })
}

/// The newest kernel of the distribution, if the package sources contain its backports.
fn newest(arch: Arch) -> Option<Kernel> {
    let meta = format!("{NEWEST}-{}", arch.debian());
    let kernel = Kernel::fetch(packages::BACKPORTS, &meta, arch);
    kernel
        .inspect_err(|error| eprintln!("guest: no newest kernel for {arch}: {error:#}"))
        .ok()
}

/// Adds the programs that only the larger archives contain.
fn add_tools(archive: &mut Archive, programs: &Sysroot) -> Result<()> {
    // Busybox's shell would run its own ip and lspci, regardless of PATH.
    archive.link("bin/sh", "/usr/bin/dash");
    programs.install(archive, &TOOLS)
}

/// Adds the base of every initramfs: busybox under all its names, and a console.
pub fn busybox(archive: &mut Archive, programs: &Sysroot) -> Result<()> {
    for directory in [
        "proc", "sys", "dev", "run", "tmp", "mnt", "root", "etc", "usr/sbin", "lib64",
    ] {
        archive.directory(directory);
    }
    archive.char_device("dev/console", 5, 1);
    archive.char_device("dev/null", 1, 3);
    archive.copy("bin/busybox", &programs.path("bin/busybox"))?;
    archive.link("bin/sh", "busybox");
    archive.file(
        "etc/passwd",
        0o644,
        b"root::0:0:root:/root:/bin/sh\n".into(),
    );
    archive.file("etc/group", 0o644, b"root:x:0:\n".into());
    Ok(())
}

/// Writes the package's kernel, and its other forms that a loader supports.
fn kernel_forms(
    kernel: &Kernel,
    arch: Arch,
    series: &str,
    dir: &Path,
    tools: &Sysroot,
) -> Result<()> {
    let image = fs::read(&kernel.image)?;
    fs::write(dir.join(format!("vmlinuz-{series}")), &image)?;
    match arch {
        Arch::X86_64 => {
            let vmlinux = decompress(bzimage_payload(&image)?, tools)?;
            ensure!(
                vmlinux.starts_with(b"\x7fELF"),
                "the payload of {series}'s bzImage is no ELF file"
            );
            fs::write(dir.join(format!("vmlinux-{series}")), vmlinux)?;
        }
        Arch::Aarch64 => {
            let raw = if is_arm64_image(&image) {
                image
            } else if image.get(4..8) == Some(b"zimg") {
                decompress(zboot_payload(&image)?, tools)?
            } else {
                decompress(&image, tools)?
            };
            ensure!(is_arm64_image(&raw), "kernel {series} is no arm64 Image");
            let packed = filter(Command::new("gzip").arg("-nc6"), &raw)?;
            fs::write(dir.join(format!("Image-{series}")), raw)?;
            fs::write(dir.join(format!("Image-{series}.zboot")), zboot(&packed)?)?;
            fs::write(dir.join(format!("Image-{series}.gz")), packed)?;
        }
    }
    Ok(())
}

/// Creates an ext4 file system with the files of `dir`, without root.
pub fn file_system(tools: &Sysroot, dir: &Path, image: &Path) -> Result<()> {
    let mut mebibytes: u64 = 16;
    for entry in fs::read_dir(dir)? {
        mebibytes += entry?.metadata()?.len().div_ceil(1 << 20);
    }
    let mut mke2fs = tools.command("sbin/mke2fs");
    mke2fs.args([
        "-q",
        "-F",
        "-t",
        "ext4",
        "-O",
        "^has_journal",
        "-m",
        "0",
        "-d",
    ]);
    mke2fs.arg(dir).arg(image).arg(format!("{mebibytes}M"));
    packages::checked(&mut mke2fs, "mke2fs")
}

fn u32_at(data: &[u8], offset: usize) -> Option<usize> {
    let bytes = data.get(offset..offset + 4)?.try_into().ok()?;
    usize::try_from(u32::from_le_bytes(bytes)).ok()
}

/// The compressed kernel in a bzImage (Documentation/arch/x86/boot.rst: `payload_offset`).
fn bzimage_payload(image: &[u8]) -> Result<&[u8]> {
    let find = || {
        let sectors = usize::from(*image.get(0x1f1)?);
        let start = (sectors + 1) * 512 + u32_at(image, 0x248)?;
        // The last four bytes are the unpacked size, not part of the stream.
        image.get(start..start + u32_at(image, 0x24c)?.checked_sub(4)?)
    };
    find().context("the kernel is no bzImage")
}

/// The compressed Image in an EFI zboot kernel (drivers/firmware/efi/libstub/zboot-header.S).
fn zboot_payload(image: &[u8]) -> Result<&[u8]> {
    let find = || {
        let start = u32_at(image, 8)?;
        image.get(start..start.checked_add(u32_at(image, 12)?)?)
    };
    find().context("the kernel is no EFI zboot image")
}

/// An EFI zboot kernel for a loader that is not firmware: without an EFI program.
fn zboot(gzip: &[u8]) -> Result<Vec<u8>> {
    let mut image = vec![0; 64];
    image[..2].copy_from_slice(b"MZ");
    image[4..8].copy_from_slice(b"zimg");
    image[8..12].copy_from_slice(&64u32.to_le_bytes());
    image[12..16].copy_from_slice(&u32::try_from(gzip.len())?.to_le_bytes());
    image[24..28].copy_from_slice(b"gzip");
    image.extend_from_slice(gzip);
    Ok(image)
}

/// Documentation/arch/arm64/booting.rst: the magic number at offset 56.
fn is_arm64_image(image: &[u8]) -> bool {
    image.get(56..60) == Some(b"ARM\x64")
}

fn decompress(data: &[u8], tools: &Sysroot) -> Result<Vec<u8>> {
    let program = match data {
        [0x1f, 0x8b, ..] => return filter(Command::new("gzip").arg("-dc"), data),
        [0xfd, b'7', b'z', ..] | [0x5d, 0, 0, ..] => "usr/bin/xz",
        [0x28, 0xb5, 0x2f, 0xfd, ..] => "usr/bin/zstd",
        [0x02, 0x21, 0x4c, 0x18, ..] => "usr/bin/lz4",
        _ => bail!("the kernel is compressed in an unknown way"),
    };
    filter(tools.command(program).arg("-dc"), data)
}

/// Runs a command with `data` on its standard input and returns its standard output.
fn filter(command: &mut Command, data: &[u8]) -> Result<Vec<u8>> {
    let name = command.get_program().display().to_string();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    let mut input = child.stdin.take().context("no standard input")?;
    let output = std::thread::scope(|scope| {
        let writer = scope.spawn(move || std::io::Write::write_all(&mut input, data));
        let output = child.wait_with_output();
        // A reader that ends early reports it by its status.
        let _ = writer.join();
        output
    })?;
    ensure!(output.status.success(), "{name} failed ({})", output.status);
    Ok(output.stdout)
}
