//! The QEMU that emulates the host.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use super::job::Job;
use crate::arch::Arch;
use crate::guest::Images;
use crate::native;
use crate::packages;
use crate::userland::{self, Sysroot};

/// The job's archive in the lab's directory.
pub(super) const JOB: &str = "job.tar";

/// Kernel and initramfs of the emulated host.
pub struct Host {
    /// Kernel image.
    pub kernel: PathBuf,
    /// Its initramfs.
    pub initramfs: PathBuf,
}

/// Starts the emulated host; its standard output is a pipe unless `interactive`.
pub fn start(
    job: &Job,
    images: &Images,
    host: &Host,
    dir: &Path,
    interactive: bool,
) -> Result<Child> {
    let tools = userland::host_tools()?;
    let mut qemu = qemu(job.arch, &tools);
    let (machine, console) = match job.arch {
        Arch::X86_64 => ("q35", "console=ttyS0 nokaslr mitigations=off"),
        Arch::Aarch64 => ("virt,virtualization=on,gic-version=3", "console=ttyAMA0"),
    };
    qemu.args(["-machine", machine]);
    let append = clock(job, &mut qemu);
    qemu.arg("-smp").arg(job.cpus.to_string());
    qemu.arg("-m").arg(job.memory_mib.to_string());
    qemu.args([
        "-nodefaults",
        "-display",
        "none",
        "-monitor",
        "none",
        "-no-reboot",
    ]);
    qemu.arg("-kernel")
        .arg(&host.kernel)
        .arg("-initrd")
        .arg(&host.initramfs);
    qemu.arg("-append")
        .arg(format!("{console} {append} panic=-1 quiet"));
    if job.virtual_time.is_none() {
        for disk in [&images.disk, &dir.join(JOB)] {
            let path = disk.display();
            qemu.arg("-drive")
                .arg(format!("file={path},format=raw,if=virtio,readonly=on"));
        }
    }
    qemu.arg("-serial")
        .arg(format!("file:{}", dir.join("console.log").display()));
    // Without ioeventfd QEMU handles output on the processor's thread, at a fixed virtual time.
    let ioeventfd = ["on", "off"][usize::from(job.virtual_time.is_some())];
    qemu.arg("-device")
        .arg(format!("virtio-serial-pci,ioeventfd={ioeventfd}"));
    for port in ["status", "results"] {
        let path = dir.join(port);
        qemu.arg("-chardev")
            .arg(format!("file,id={port},path={}", path.display()));
        qemu.arg("-device")
            .arg(format!("virtserialport,chardev={port},name={port}"));
    }
    if interactive {
        qemu.args(["-chardev", "stdio,id=terminal,signal=off"]);
        qemu.args(["-device", "virtconsole,chardev=terminal"]);
    } else {
        qemu.args(["-chardev", "file,id=output,path=/dev/stdout,append=on"]);
        qemu.args(["-device", "virtserialport,chardev=output,name=output"]);
        qemu.stdin(Stdio::null()).stdout(Stdio::piped());
    }
    qemu.spawn().context("cannot start QEMU")
}

/// Adds the processor and its clock; returns what the kernel's command line needs for them.
fn clock(job: &Job, qemu: &mut Command) -> &'static str {
    let Some(seed) = job.virtual_time else {
        qemu.args(["-accel", "tcg,thread=multi,tb-size=1024", "-cpu"]);
        return match job.arch {
            Arch::X86_64 => {
                qemu.arg("max,+svm,-la57");
                // QEMU loses an interrupt that arrives at the moment when a guest of the host exits
                // (its SVM helpers change the pending ones without a lock). A periodic tick brings
                // the next one; after a lost one-shot timer the host would sleep forever.
                "nohz=off highres=off"
            }
            Arch::Aarch64 => {
                qemu.arg("max,pauth-impdef=on");
                ""
            }
        };
    };
    qemu.args(["-accel", "tcg,thread=single,tb-size=1024", "-cpu"]);
    qemu.arg(match job.arch {
        // The instructions for random numbers have their source outside the emulated machine.
        Arch::X86_64 => "max,+svm,-la57,-rdrand,-rdseed",
        Arch::Aarch64 => "max,pauth-impdef=on",
    });
    qemu.args(["-icount", "shift=0,sleep=off"]);
    qemu.args(["-rtc", "base=2026-01-01,clock=vm"]);
    qemu.arg("-seed").arg(seed.to_string());
    "nokaslr norandmaps"
}

/// A QEMU: the machine's own if it is new enough, else the private one.
fn qemu(arch: Arch, tools: &Sysroot) -> Command {
    let program = format!("qemu-system-{arch}");
    let version = packages::output(Command::new(&program).arg("--version"));
    let major = version.ok().and_then(|text| {
        let rest = text.split_once("version ")?.1;
        rest.split_once('.')?.0.parse::<u32>().ok()
    });
    let command = if major.is_some_and(|major| major >= 10) {
        Command::new(program)
    } else {
        let mut command = tools.command(&format!("usr/bin/{program}"));
        command.arg("-L").arg(tools.path("usr/share/qemu"));
        command.arg("-L").arg(tools.path("usr/share/seabios"));
        command.arg("-L").arg(tools.path("usr/lib/ipxe/qemu"));
        let modules = Path::new("usr/lib")
            .join(Arch::native().triplet())
            .join("qemu");
        command.env(
            "QEMU_MODULE_DIR",
            tools.path(&modules.display().to_string()),
        );
        command
    };
    // The emulated host ends with this process, however that ends.
    native::wrapped(&["setpriv", "--pdeathsig", "KILL", "--"], &command)
}

/// The terminal's settings, restored when dropped: QEMU cannot when it is killed.
pub struct Terminal(String);

impl Terminal {
    /// The settings of standard input, if that is a terminal.
    pub fn save() -> Option<Terminal> {
        if !std::io::stdin().is_terminal() {
            return None;
        }
        let text = packages::output(Command::new("stty").arg("-g").stdin(Stdio::inherit())).ok()?;
        Some(Terminal(text.trim().to_owned()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // A failure has no remedy.
        let _ = Command::new("stty").arg(&self.0).status();
    }
}
