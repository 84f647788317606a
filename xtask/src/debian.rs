//! A root file system of Debian with systemd, for guests that boot from a disk.
//!
//! Its packages are unpacked, not installed: their scripts are programs of the guest's
//! architecture. This module does the parts of those scripts that the system needs to start.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::arch::Arch;
use crate::packages::{self, Suite};
use crate::paths;
use crate::userland::Sysroot;

/// Debian's essential packages, and those for a system that starts, serves a console and can
/// install packages.
const PACKAGES: [&str; 12] = [
    "?essential",
    "systemd-sysv",
    "udev",
    "dbus",
    "apt",
    "passwd",
    "mount",
    "kmod",
    "procps",
    "iproute2",
    "e2fsprogs",
    // The root is laid out with /usr merged from the start.
    "usr-is-merged",
];

/// Omitted: documentation, and files for hardware that a guest lacks.
const LEFT_OUT: [&str; 5] = [
    "./usr/share/doc/*",
    "./usr/share/man/*",
    "./usr/share/locale/*",
    "./usr/share/info/*",
    "./usr/lib/udev/hwdb.d/*",
];

/// Files of the administrator or of the packages' scripts.
const FILES: [(&str, u32, &str); 12] = [
    ("etc/hostname", 0o644, "debian\n"),
    (
        "etc/hosts",
        0o644,
        "127.0.0.1 localhost debian\n::1 localhost\n",
    ),
    (
        "etc/fstab",
        0o644,
        "LABEL=debian / ext4 errors=remount-ro 0 1\n",
    ),
    // Empty: systemd generates one at its first start, and does not ask the administrator.
    ("etc/machine-id", 0o444, ""),
    (
        "etc/nsswitch.conf",
        0o644,
        "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n",
    ),
    (
        "etc/pam.d/common-auth",
        0o644,
        "auth required pam_unix.so nullok\n",
    ),
    (
        "etc/pam.d/common-account",
        0o644,
        "account required pam_unix.so\n",
    ),
    (
        "etc/pam.d/common-password",
        0o644,
        "password required pam_unix.so obscure yescrypt\n",
    ),
    (
        "etc/pam.d/common-session",
        0o644,
        "session required pam_unix.so\n",
    ),
    (
        "etc/pam.d/common-session-noninteractive",
        0o644,
        "session required pam_unix.so\n",
    ),
    // Groups that udev's script adds; systemd adds others at its first start.
    (
        "usr/lib/sysusers.d/udev.conf",
        0o644,
        "g input -\ng kvm -\ng render -\ng sgx -\n",
    ),
    ("var/lib/dpkg/status", 0o644, ""),
];

/// Files that the packages' scripts copy.
const COPIES: [(&str, &str); 4] = [
    ("usr/share/base-passwd/group.master", "etc/group"),
    ("usr/share/base-files/profile", "etc/profile"),
    ("usr/share/base-files/dot.profile", "root/.profile"),
    ("usr/share/base-files/dot.bashrc", "root/.bashrc"),
];

/// Size of the file system in MiB; most of it is a hole.
const MEBIBYTES: u32 = 512;

/// Creates the file system for `arch` unless it exists; root's password is empty.
pub fn root_file_system(arch: Arch) -> Result<PathBuf> {
    let base = paths::cache()?.join(format!("debian-{arch}"));
    paths::made_once(&base, &recipe(), |base| {
        eprintln!("guest: preparing a Debian root file system for {arch}");
        let root = base.join("root");
        let suite = Suite::open(packages::STABLE, arch)?;
        packages::unpack(&suite.download_with_dependencies(&PACKAGES)?, &root)?;
        configure(&root)?;
        write_image(&root, &base.join("root.ext4"))?;
        fs::remove_dir_all(root)?;
        Ok(())
    })?;
    Ok(base.join("root.ext4"))
}

/// All inputs of the file system, by which a changed one is made again.
pub fn recipe() -> String {
    format!("1 {PACKAGES:?} {LEFT_OUT:?} {FILES:?} {COPIES:?} {MEBIBYTES}")
}

fn configure(root: &Path) -> Result<()> {
    users(root)?;
    for (from, to) in COPIES {
        fs::copy(root.join(from), root.join(to))
            .with_context(|| format!("cannot copy {from} of the packages"))?;
    }
    for (path, mode, text) in FILES {
        put(&root.join(path), mode, text)?;
    }
    Ok(())
}

fn put(path: &Path, mode: u32, text: &str) -> Result<()> {
    let context = || format!("cannot write {}", path.display());
    fs::write(path, text).with_context(context)?;
    fs::set_permissions(path, Permissions::from_mode(mode)).with_context(context)
}

/// The users of every Debian system, root without a password and the others unable to log in.
/// systemd adds those of its services at its first start.
fn users(root: &Path) -> Result<()> {
    let master = root.join("usr/share/base-passwd/passwd.master");
    let master =
        fs::read_to_string(&master).with_context(|| format!("cannot read {}", master.display()))?;
    let mut passwd = String::new();
    let mut shadow = String::new();
    for line in master.lines() {
        let (name, rest) = line
            .split_once(":*:")
            .with_context(|| format!("a user in base-passwd's form: {line}"))?;
        let password = if name == "root" { "" } else { "*" };
        passwd += &format!("{name}:x:{rest}\n");
        shadow += &format!("{name}:{password}:19700:0:99999:7:::\n");
    }
    put(&root.join("etc/passwd"), 0o644, &passwd)?;
    put(&root.join("etc/shadow"), 0o640, &shadow)
}

/// Creates an ext4 file system of everything below `root`, owned by root.
fn write_image(root: &Path, image: &Path) -> Result<()> {
    let names = ["e2fsprogs", "libarchive13t64"];
    let tools = Sysroot::of_packages(packages::TOOLS, Arch::native(), "ext4-tools", &names)?;
    // An archive stores the owner of a file; a directory created without root cannot.
    let mut tar = Command::new("tar");
    tar.args(["-c", "--owner=0", "--group=0", "--numeric-owner"])
        .args(LEFT_OUT.map(|pattern| format!("--exclude={pattern}")))
        .arg("-C")
        .arg(root)
        .arg(".");
    let mut tar = tar
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run tar")?;
    let archive = tar.stdout.take().context("no standard output")?;
    let mut mke2fs = tools.command("sbin/mke2fs");
    mke2fs.args(["-q", "-F", "-t", "ext4", "-L", "debian", "-d", "-"]);
    mke2fs.arg(image).arg(format!("{MEBIBYTES}M"));
    packages::checked(mke2fs.stdin(archive), "mke2fs")?;
    ensure!(tar.wait()?.success(), "packing the root file system failed");
    Ok(())
}
