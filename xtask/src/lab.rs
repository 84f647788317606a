//! The lab: an emulated host that has KVM, vhost and tap, for machines that have not.
//!
//! QEMU emulates a whole machine with virtualization extensions, a kernel of the distribution
//! runs on it, and the job runs there. `docs/lab.md` says how far it can be trusted.

use std::fs::{self, File};
use std::io::{IsTerminal, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::arch::Arch;
use crate::cpio::Archive;
use crate::guest::{self, Images};
use crate::kernel::Kernel;
use crate::packages;
use crate::paths;
use crate::userland::{self, Sysroot};

const KERNEL: &str = "linux-image-6.12-cloud";
const INIT: &str = include_str!("../lab/init");

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

/// Exit status of a job that ran out of time, as of timeout(1).
const TIMED_OUT: u8 = 124;

/// Something to run in the lab.
pub struct Job {
    /// Architecture of the emulated host.
    pub arch: Arch,
    /// Its processors.
    pub cpus: u8,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// Time from power-on to the end of the command.
    pub timeout: Duration,
    /// Longest silence of the command, after which the host counts as hung.
    pub silence: Option<Duration>,
    /// Programs put into /portcullis/bin, which is in PATH, by the name they get there.
    pub programs: Vec<(String, PathBuf)>,
    /// An initramfs segment appended to those of the guests.
    pub guest_tools: Option<PathBuf>,
    /// Directory copied to /share and, as far as the command changed it, back.
    pub share: Option<PathBuf>,
    /// Command and arguments; a shell when empty.
    pub command: Vec<String>,
    /// Connect the command with the terminal.
    pub interactive: bool,
}

impl Job {
    /// A job with the defaults that the architecture is reliable with.
    pub fn new(arch: Arch) -> Job {
        Job {
            arch,
            cpus: match arch {
                // More than one and the emulated host itself crashes now and then.
                Arch::X86_64 => 1,
                Arch::Aarch64 => 2,
            },
            memory_mib: 4096,
            timeout: Duration::from_secs(600),
            silence: None,
            programs: Vec::new(),
            guest_tools: None,
            share: None,
            command: Vec::new(),
            interactive: false,
        }
    }
}

/// Runs a job and returns the exit status of its command. Its output goes to standard output;
/// `on_line` sees every line of it.
pub fn run(job: &Job, on_line: &mut dyn FnMut(&str)) -> Result<u8> {
    let images = guest::prepare(job.arch)?;
    let host = prepare_host(job.arch)?;
    let _lock = lock(job.arch)?;
    let dir = paths::target().join(format!("lab/{}", job.arch));
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("cannot clear {}", dir.display()))?;
    }
    fs::create_dir_all(&dir)?;
    let interactive = job.interactive || job.command.is_empty();
    pack(job, &dir, interactive)?;

    let started = Instant::now();
    eprintln!("lab: starting an emulated {} host", job.arch);
    let terminal = if interactive { Terminal::save() } else { None };
    let mut qemu = start_qemu(job, &images, &host, &dir, interactive)?;
    let output = forward(&mut qemu);
    let ended = wait(&mut qemu, output, &dir, started, job, on_line);
    drop(terminal);
    match ended? {
        None => {
            show_console(&dir);
            eprintln!("lab: ended after {} s: out of time", job.timeout.as_secs());
            Ok(TIMED_OUT)
        }
        Some(status) => {
            let Some(code) = exit_status(&dir) else {
                show_console(&dir);
                bail!("the emulated host ended early (QEMU: {status})");
            };
            if let Some(share) = &job.share {
                unpack_results(&dir, share)?;
            }
            Ok(code)
        }
    }
}

/// Kernel and initramfs of the emulated host.
struct Host {
    kernel: PathBuf,
    initramfs: PathBuf,
}

fn prepare_host(arch: Arch) -> Result<Host> {
    let kernel = Kernel::fetch(&format!("{KERNEL}-{}", arch.debian()), arch)?;
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
        // Busybox's shell would run its own ip and tar, whatever PATH says.
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

/// One lab of each architecture at a time on a machine, from every checkout: two of one would only
/// slow each other down, two of different ones share the machine's cores.
fn lock(arch: Arch) -> Result<File> {
    let path = std::env::temp_dir().join(format!("portcullis-lab-{arch}.lock"));
    let file = File::options().create(true).append(true).open(&path);
    let file = file.with_context(|| format!("cannot open {}", path.display()))?;
    if file.try_lock().is_err() {
        eprintln!(
            "lab: waiting for another {arch} lab on this machine ({})",
            path.display()
        );
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
         export PORTCULLIS_GUEST_DIR=/guest\nexport PORTCULLIS_RETRIES=/run/retries\nexec {command}\n",
        quoted(&std::env::var("TERM").unwrap_or_else(|_| "linux".to_owned()))
    );
    let path = stage.join("job");
    fs::write(&path, script)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;

    let archive = dir.join("job.tar");
    let mut tar = Command::new("tar");
    tar.arg("-cf").arg(&archive).arg("-C").arg(&stage).arg(".");
    packages::checked(&mut tar, "packing the job")?;
    if let Some(share) = &job.share {
        let mut tar = Command::new("tar");
        // Names change, the targets of symbolic links do not.
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

fn start_qemu(
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
            // QEMU loses an interrupt that comes just as a guest of the host exits (its SVM
            // helpers change the pending ones without a lock). A periodic tick brings the next
            // one; after a lost one-shot timer the host would sleep for ever.
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
    // The emulated host ends with us, however we end.
    let mut tied = Command::new("setpriv");
    tied.args(["--pdeathsig", "KILL", "--"])
        .arg(command.get_program())
        .args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => tied.env(name, value),
            None => tied.env_remove(name),
        };
    }
    tied
}

/// Reads the standard output of QEMU, if it is ours, in a thread of its own.
fn forward(qemu: &mut Child) -> mpsc::Receiver<Vec<u8>> {
    let (sender, receiver) = mpsc::channel();
    if let Some(mut output) = qemu.stdout.take() {
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    break;
                }
            }
        });
    }
    receiver
}

/// Passes output on until QEMU ends, or ends it when the time is over (`None`).
fn wait(
    qemu: &mut Child,
    output: mpsc::Receiver<Vec<u8>>,
    dir: &Path,
    started: Instant,
    job: &Job,
    on_line: &mut dyn FnMut(&str),
) -> Result<Option<ExitStatus>> {
    let mut line = Vec::new();
    let mut up = false;
    let mut show = |chunk: &[u8]| -> Result<()> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(chunk)?;
        stdout.flush()?;
        for byte in chunk {
            if *byte == b'\n' {
                on_line(String::from_utf8_lossy(&line).trim_end());
                line.clear();
            } else {
                line.push(*byte);
            }
        }
        Ok(())
    };
    let mut heard = Instant::now();
    loop {
        match output.recv_timeout(Duration::from_millis(50)) {
            Ok(chunk) => {
                heard = Instant::now();
                show(&chunk)?;
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(Duration::from_millis(50)),
        }
        if !up && fs::read_to_string(dir.join("status")).is_ok_and(|text| text.starts_with("up")) {
            up = true;
            eprintln!("lab: up after {:.1} s", started.elapsed().as_secs_f32());
        }
        let ended = qemu.try_wait()?;
        if let Some(limit) = job.silence
            && ended.is_none()
            && heard.elapsed() > limit
        {
            qemu.kill()?;
            qemu.wait()?;
            show_console(dir);
            bail!("the emulated host said nothing for {} s", limit.as_secs());
        }
        let late = started.elapsed() > job.timeout;
        if ended.is_some() || late {
            if late && ended.is_none() {
                qemu.kill()?;
                qemu.wait()?;
            }
            for chunk in output {
                show(&chunk)?;
            }
            return Ok(ended);
        }
    }
}

fn exit_status(dir: &Path) -> Option<u8> {
    let text = fs::read_to_string(dir.join("status")).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("exit "))?
        .trim()
        .parse()
        .ok()
}

/// Shows the end of the emulated host's own console.
fn show_console(dir: &Path) {
    let path = dir.join("console.log");
    let text = fs::read(&path).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<&str> = text.lines().collect();
    for line in &lines[lines.len().saturating_sub(40)..] {
        eprintln!("lab: | {line}");
    }
    eprintln!("lab: that was the end of {}", path.display());
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

/// The terminal's settings, restored when dropped: QEMU cannot when it is killed.
struct Terminal(String);

impl Terminal {
    fn save() -> Option<Terminal> {
        if !std::io::stdin().is_terminal() {
            return None;
        }
        let text = packages::output(Command::new("stty").arg("-g").stdin(Stdio::inherit())).ok()?;
        Some(Terminal(text.trim().to_owned()))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        // Nothing better to do if it fails.
        let _ = Command::new("stty").arg(&self.0).status();
    }
}
