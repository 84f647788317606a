//! The lab: an emulated host with KVM, vhost and tap, for machines without them.
//!
//! QEMU emulates a whole machine with virtualization extensions. A kernel of the distribution runs
//! on it, and the job runs there. `docs/lab.md` describes its reliability.

mod job;
mod qemu;
mod watch;

use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::cpio::Archive;
use crate::guest::{self, Images};
use crate::kernel::Kernel;
use crate::packages;
use crate::paths;
use crate::userland;
pub use job::Job;
use qemu::{Host, JOB, Terminal};
use watch::Watch;

const KERNEL: &str = "linux-image-6.12-cloud";
const INIT: &str = include_str!("../../lab/init");

/// Modules the emulated host loads at start, in this order.
const MODULES: [&str; 10] = [
    "virtio_pci",
    "virtio_blk",
    "virtio_console",
    "ext4",
    "tun",
    "vhost_net",
    "vhost_vsock",
    "loop",
    "bridge",
    "veth",
];

const PROGRAMS: [&str; 17] = [
    "bin/dash",
    "bin/tar",
    "bin/ip",
    "sbin/tc",
    "sbin/bridge",
    "usr/bin/lspci",
    "usr/bin/setpci",
    "usr/bin/socat",
    "usr/bin/iperf3",
    "usr/bin/strace",
    "usr/bin/tcpdump",
    "usr/bin/setpriv",
    "usr/bin/prlimit",
    "sbin/ethtool",
    "sbin/mke2fs",
    "sbin/e2fsck",
    "sbin/debugfs",
];

/// Guest images that an emulated host with virtual time has.
const VIRTUAL_TIME_IMAGES: [&str; 4] = [
    "vmlinux-6.12",
    "vmlinuz-6.12",
    "initramfs.cpio",
    "initramfs-tools.cpio",
];

/// Exit status of a job at its time limit, as timeout(1) returns it.
const TIMED_OUT: u8 = 124;

/// Fetches and creates the files of an emulated host of `arch` and of its guests, unless they
/// exist.
pub fn prepare(arch: Arch) -> Result<()> {
    guest::prepare(arch)?;
    prepare_host(arch)?;
    Ok(())
}

/// Runs a job and returns the exit status of its command. Its output goes to standard output;
/// `on_line` receives each line of it.
pub fn run(job: &Job, on_line: &mut dyn FnMut(&str)) -> Result<u8> {
    let images = guest::prepare(job.arch)?;
    let mut host = prepare_host(job.arch)?;
    let _lock = lock(job)?;
    let dir = paths::target().join(format!("lab/{}", job.arch));
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot clear {}", dir.display()))?;
    }
    fs::create_dir_all(&dir)?;
    let interactive = job.interactive || job.command.is_empty();
    pack(job, &dir, interactive)?;
    add_files(job, &mut host, &images, &dir)?;

    job.say(&format!("starting an emulated {} host", job.arch));
    let terminal = if interactive { Terminal::save() } else { None };
    let qemu = qemu::start(job, &images, &host, &dir, interactive)?;
    let ended = Watch::new(job, qemu, &dir).wait(on_line);
    drop(terminal);
    if !matches!(ended, Ok(Some(_))) {
        show_console(job, &dir);
    }
    match ended? {
        None => {
            job.say("ended: out of time");
            Ok(TIMED_OUT)
        }
        Some(status) => {
            let Some(code) = watch::exit_status(&dir) else {
                show_console(job, &dir);
                bail!("the emulated host ended early (QEMU: {status})");
            };
            if let Some(share) = &job.share {
                unpack_results(&dir, share)?;
            }
            Ok(code)
        }
    }
}

fn prepare_host(arch: Arch) -> Result<Host> {
    let kernel = Kernel::fetch(
        packages::STABLE,
        &format!("{KERNEL}-{}", arch.debian()),
        arch,
    )?;
    let base = paths::cache()?.join(format!("host-{arch}"));
    let mut modules = MODULES.to_vec();
    modules.push(match arch {
        Arch::X86_64 => "kvm_amd",
        Arch::Aarch64 => "kvm",
    });
    let recipe = format!(
        "1 {} {modules:?} {PROGRAMS:?}\n{INIT}",
        kernel.image.display()
    );
    paths::made_once(&base, &recipe, |base| {
        eprintln!("lab: preparing the emulated {arch} host");
        let programs = userland::guest_programs(arch)?;
        let mut archive = Archive::default();
        guest::busybox(&mut archive, &programs)?;
        programs.install(&mut archive, &PROGRAMS)?;
        // Busybox's shell would run its own ip and tar, regardless of PATH.
        archive.link("bin/sh", "/usr/bin/dash");
        archive.copy("bin/bash", &programs.path("bin/bash-static"))?;
        archive.file("init", 0o755, INIT.into());
        archive.file("etc/modules", 0o644, modules.join("\n").into());
        kernel.add_modules(&mut archive, &modules)?;
        archive.write(&base.join("initramfs.cpio"))
    })?;
    Ok(Host {
        kernel: kernel.image,
        initramfs: base.join("initramfs.cpio"),
    })
}

/// Appends the files of the job to the initramfs of the host. With virtual time also all that it
/// would read from a disk, whose answers come in real time.
fn add_files(job: &Job, host: &mut Host, images: &Images, dir: &Path) -> Result<()> {
    let mut files = job.files.clone();
    if job.virtual_time.is_some() {
        files.copy(JOB, &dir.join(JOB))?;
        for image in VIRTUAL_TIME_IMAGES {
            let from = images.dir.join(image);
            if from.exists() {
                files.copy(&format!("images/{image}"), &from)?;
            }
        }
    }
    let more = dir.join("files.cpio");
    files.write(&more)?;
    let mut initramfs = fs::read(&host.initramfs)?;
    initramfs.extend(fs::read(more)?);
    host.initramfs = dir.join("initramfs.cpio");
    fs::write(&host.initramfs, initramfs)?;
    Ok(())
}

/// Permits one lab of each architecture at a time on a machine, from every checkout: two of one
/// would only slow each other down, two of different ones share the machine's cores.
fn lock(job: &Job) -> Result<File> {
    let path = std::env::temp_dir().join(format!("portcullis-lab-{}.lock", job.arch));
    let file = File::options().create(true).append(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    if file.try_lock().is_err() {
        job.say(&format!(
            "waiting for another {} lab on this machine ({})",
            job.arch,
            path.display()
        ));
        file.lock()?;
    }
    Ok(file)
}

/// Packs the job into the archive that the emulated host unpacks from its second disk.
fn pack(job: &Job, dir: &Path, interactive: bool) -> Result<()> {
    let stage = dir.join("stage");
    fs::create_dir_all(stage.join("bin"))?;
    for (name, program) in &job.programs {
        fs::copy(program, stage.join("bin").join(name))
            .with_context(|| format!("cannot copy {}", program.display()))?;
    }
    if let Some(tools) = &job.guest_tools {
        fs::copy(tools, stage.join("guest-tools.cpio"))?;
    }
    if interactive {
        fs::write(stage.join("interactive"), "")?;
    }
    let words: Vec<String> = job.command.iter().map(|word| quoted(word)).collect();
    let command = if words.is_empty() {
        "bash --norc".to_owned()
    } else {
        words.join(" ")
    };
    let size = packages::output(Command::new("stty").arg("size").stdin(Stdio::inherit()));
    let resize = match size.unwrap_or_default().trim().split_once(' ') {
        Some((rows, columns)) if interactive && rows != "0" => {
            format!("stty rows {rows} columns {columns}\n")
        }
        _ => String::new(),
    };
    let script = format!(
        "#!/bin/sh\n{resize}export TERM={}\nexport PORTCULLIS_BIN=/portcullis/bin/portcullis\n\
         export PORTCULLIS_GUEST_DIR=/guest\nexport PORTCULLIS_RETRIES=/run/retries\n\
         read -r PORTCULLIS_HOST_START_SECONDS rest < /proc/uptime\n\
         export PORTCULLIS_HOST_START_SECONDS\n\
         echo \"started $PORTCULLIS_HOST_START_SECONDS\" >&3\nexec {command} 3>&-\n",
        quoted(&std::env::var("TERM").unwrap_or_else(|_| "linux".to_owned()))
    );
    let path = stage.join("job");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;

    let archive = dir.join(JOB);
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--mtime=@0", "-cf"]).arg(&archive);
    tar.arg("-C").arg(&stage).arg(".");
    packages::checked(&mut tar, "packing the job")?;
    if let Some(share) = &job.share {
        let mut tar = Command::new("tar");
        // The names of files change, the targets of symbolic links do not.
        tar.arg("-rf")
            .arg(&archive)
            .arg("--transform=flags=rhS;s,^\\.,share,");
        tar.arg("-C").arg(share).arg(".");
        packages::checked(&mut tar, "packing the shared directory")?;
    }
    fs::remove_dir_all(stage)?;
    Ok(())
}

fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// Prints the end of the emulated host's own console.
fn show_console(job: &Job, dir: &Path) {
    let path = dir.join("console.log");
    let text = fs::read(&path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    for line in &lines[lines.len().saturating_sub(40)..] {
        job.say(&format!("| {line}"));
    }
    job.say(&format!("that was the end of {}", path.display()));
}

fn unpack_results(dir: &Path, share: &Path) -> Result<()> {
    let archive = dir.join("results");
    if fs::metadata(&archive).is_ok_and(|metadata| metadata.len() > 0) {
        let mut tar = Command::new("tar");
        tar.arg("-xf")
            .arg(archive)
            .arg("-C")
            .arg(share)
            .arg("--no-same-owner");
        packages::checked(
            &mut tar,
            "unpacking what the job changed in the shared directory",
        )?;
    }
    Ok(())
}
