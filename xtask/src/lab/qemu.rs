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
    let console = match job.arch {
        Arch::X86_64 => {
            qemu.args(["-machine", "q35", "-cpu", "max,+svm,-la57"]);
            // QEMU loses an interrupt that arrives at the moment when a guest of the host exits
            // (its SVM helpers change the pending ones without a lock). A periodic tick brings the
            // next one; after a lost one-shot timer the host would sleep forever.
            "console=ttyS0 nokaslr mitigations=off nohz=off highres=off"
        }
        Arch::Aarch64 => {
            qemu.args(["-machine", "virt,virtualization=on,gic-version=3"]);
            qemu.args(["-cpu", "max,pauth-impdef=on"]);
            "console=ttyAMA0"
        }
    };
    qemu.args(["-accel", "tcg,thread=multi,tb-size=1024"]);
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
    qemu.arg("-append").arg(format!("{console} panic=-1 quiet"));
    for disk in [&images.disk, &dir.join("job.tar")] {
        let path = disk.display();
        qemu.arg("-drive")
            .arg(format!("file={path},format=raw,if=virtio,readonly=on"));
    }
    qemu.arg("-serial")
        .arg(format!("file:{}", dir.join("console.log").display()));
    qemu.args(["-device", "virtio-serial-pci"]);
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
