//! A machine that cannot run is refused in one line that names the reason, with
//! a status that distinguishes the user's errors from the host's.

mod support;

use std::process::Command;

use support::{ProgramOutput, TempDir};

/// The command line, configuration or a file it names cannot be used.
const USAGE: i32 = 2;
/// The host lacks a requirement.
const HOST: i32 = 1;

fn portcullis(arguments: &[&str]) -> ProgramOutput {
    support::run_to_end(Command::new(support::portcullis()).args(arguments))
}

/// Checks for one line on standard error with every one of `words`, and no
/// other output.
#[track_caller]
fn refuses(output: &ProgramOutput, status: i32, words: &[&str]) {
    assert_eq!(output.status, Some(status), "{output:?}");
    assert_eq!(output.stdout, "", "{output:?}");
    assert_eq!(output.stderr.lines().count(), 1, "{output:?}");
    assert!(output.stderr.starts_with("portcullis: "), "{output:?}");
    for word in words {
        assert!(output.stderr.contains(word), "no {word:?} in {output:?}");
    }
}

/// Runs with a kernel file of these `contents`.
fn with_kernel(contents: &[u8]) -> ProgramOutput {
    let files = TempDir::new("kernel");
    let kernel = files.file("the-kernel", contents);
    let output = portcullis(&["run", "--kernel", &kernel]);
    assert!(
        output.stderr.contains(&kernel),
        "the file is not named: {output:?}"
    );
    output
}

#[test]
fn a_file_that_is_no_kernel() {
    refuses(
        &with_kernel(b"#!/bin/sh\n"),
        USAGE,
        &["is not a Linux kernel"],
    );
    refuses(&with_kernel(b""), USAGE, &["is not a Linux kernel"]);
    refuses(
        &with_kernel(&[0; 1 << 20]),
        USAGE,
        &["is not a Linux kernel"],
    );
}

#[test]
fn a_kernel_for_another_architecture() {
    let mut arm = vec![0; 4096];
    arm[56..60].copy_from_slice(b"ARM\x64");
    let mut x86 = vec![0; 4096];
    x86[0x202..0x206].copy_from_slice(b"HdrS");
    let mut riscv = vec![0; 4096];
    riscv[56..60].copy_from_slice(b"RSC\x05");
    let others = if cfg!(target_arch = "x86_64") {
        [(arm, "aarch64"), (riscv, "riscv")]
    } else {
        [(x86, "x86_64"), (riscv, "riscv")]
    };
    for (kernel, architecture) in others {
        refuses(
            &with_kernel(&kernel),
            USAGE,
            &["is a kernel for", architecture],
        );
    }
}

#[test]
fn a_truncated_kernel() {
    let whole = std::fs::read(support::kernel()).expect("the kernel can be read");
    refuses(
        &with_kernel(&whole[..whole.len() / 2]),
        USAGE,
        &["truncated"],
    );
}

#[cfg(target_arch = "x86_64")]
#[test]
fn a_truncated_vmlinux() {
    let whole = std::fs::read(support::image("vmlinux-6.12")).expect("it can be read");
    refuses(
        &with_kernel(&whole[..whole.len() / 2]),
        USAGE,
        &["truncated"],
    );
}

#[test]
fn a_kernel_that_is_missing_or_not_a_file() {
    let missing = portcullis(&["run", "--kernel", "/no/such/kernel"]);
    refuses(&missing, USAGE, &["/no/such/kernel", "No such file"]);
    let directory = portcullis(&["run", "--kernel", "/tmp"]);
    refuses(&directory, USAGE, &["/tmp", "not a regular file"]);
}

#[test]
fn a_fifo_or_a_device_node_in_the_place_of_a_file_blocks_nothing() {
    let files = TempDir::new("kinds");
    let fifo = files.path("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status();
    assert!(made.expect("mkfifo").success());
    let kernel = support::kernel();
    let output = portcullis(&["run", "--kernel", &fifo]);
    refuses(&output, USAGE, &[&fifo, "not a regular file"]);
    let output = portcullis(&["run", "--kernel", &kernel, "--initrd", &fifo]);
    refuses(&output, USAGE, &[&fifo, "not a regular file"]);
    for (option, value, words) in [
        (
            "--disk",
            format!("path={fifo}"),
            ["disk0", "neither a file"],
        ),
        (
            "--disk",
            format!("path={fifo},readonly=on"),
            ["disk0", "neither a file"],
        ),
        (
            "--log-file",
            "/dev/ptmx".into(),
            ["--log-file", "/dev/ptmx"],
        ),
        (
            "--log-file",
            "/proc/self/mem".into(),
            ["--log-file", "interface of the kernel"],
        ),
    ] {
        let output = portcullis(&["run", "--kernel", &kernel, option, &value]);
        refuses(&output, USAGE, &words);
    }
    // The control plane continues after it.
    let socket = files.path("socket");
    let mut serve = Command::new(support::portcullis());
    serve.args(["serve", "--api-socket", &socket]);
    let mut serve = serve.spawn().expect("the monitor starts");
    while !std::path::Path::new(&socket).exists() {
        assert_eq!(serve.try_wait().expect("it is our child"), None);
        std::thread::yield_now();
    }
    let drive = format!(r#"{{"drive_id": "a", "path_on_host": "{fifo}", "is_read_only": true}}"#);
    let put = portcullis(&["ctl", "--api-socket", &socket, "PUT", "/drives/a", &drive]);
    assert_eq!(put.status, Some(1), "{put:?}");
    assert!(put.stderr.contains("drives[a].path_on_host"), "{put:?}");
    let info = portcullis(&["ctl", "--api-socket", &socket, "GET", "/"]);
    assert!(info.stdout.contains("Not started"), "{info:?}");
    let stop = portcullis(&["ctl", "--api-socket", &socket, "stop"]);
    assert_eq!(stop.status, Some(0), "{stop:?}");
    serve.wait().expect("it has ended");
}

/// A read-only block device over a file.
struct ReadOnlyLoop(String);

impl ReadOnlyLoop {
    /// Requires root. The options are common to util-linux and busybox.
    fn over(image: &str) -> Self {
        let free = losetup(&["-f"]);
        let device = free.trim_end().to_owned();
        losetup(&["-r", &device, image]);
        Self(device)
    }
}

impl Drop for ReadOnlyLoop {
    fn drop(&mut self) {
        losetup(&["-d", &self.0]);
    }
}

fn losetup(arguments: &[&str]) -> String {
    let output = support::run_to_end(Command::new("losetup").args(arguments));
    assert_eq!(output.status, Some(0), "losetup {arguments:?}: {output:?}");
    output.stdout
}

#[test]
fn a_block_device_that_takes_no_writes() {
    let files = TempDir::new("read-only");
    let image = files.file("image", &[0; 4096]);
    let device = ReadOnlyLoop::over(&image);
    let with_disk = |disk: &str| {
        let no_kernel = files.file("no-kernel", b"");
        portcullis(&["run", "--kernel", &no_kernel, "--disk", disk])
    };
    let path = format!("path={}", device.0);
    let words = ["drives[disk0]", &device.0, "add readonly=on"];
    refuses(&with_disk(&path), USAGE, &words);
    // With the option the disk is accepted, and the kernel is refused.
    let accepted = with_disk(&format!("{path},readonly=on"));
    refuses(&accepted, USAGE, &["is not a Linux kernel"]);
}

#[test]
fn an_initial_ramdisk_that_is_missing_or_too_large() {
    let kernel = support::kernel();
    let missing = portcullis(&["run", "--kernel", &kernel, "--initrd", "/no/initrd"]);
    refuses(&missing, USAGE, &["initrd_path", "/no/initrd"]);
    let files = TempDir::new("initrd");
    let large = files.path("large");
    let made = std::fs::File::create(&large).and_then(|file| file.set_len(1 << 30));
    made.expect("a sparse file can be made");
    let arguments = [
        "run", "--kernel", &kernel, "--initrd", &large, "--memory", "256M",
    ];
    refuses(
        &portcullis(&arguments),
        USAGE,
        &["initrd_path", &large, "does not fit"],
    );
}

#[test]
fn a_file_that_may_not_be_read() {
    let files = TempDir::new("unreadable");
    let kernel = files.file("kernel", b"secret");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o000);
    std::fs::set_permissions(&kernel, mode).expect("a mode can be set");
    let output = as_nobody(&["run", "--kernel", &kernel]);
    refuses(&output, USAGE, &[&kernel, "Permission denied"]);
}

#[test]
fn a_host_where_kvm_may_not_be_used() {
    let output = as_nobody(&["run", "--kernel", &support::kernel()]);
    refuses(&output, HOST, &["/dev/kvm", "permission", "kvm group"]);
}

#[test]
fn a_host_without_kvm() {
    let script = "mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec \"$@\"";
    let mut command = Command::new("unshare");
    command.args(["-m", "sh", "-c", script, "sh"]);
    command.arg(support::portcullis());
    command.args(["run", "--kernel", &support::kernel()]);
    refuses(
        &support::run_to_end(&mut command),
        HOST,
        &["/dev/kvm does not exist"],
    );
}

/// Runs as a user without privileges. Requires root, to become that user.
fn as_nobody(arguments: &[&str]) -> ProgramOutput {
    let mut command = Command::new("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups"]);
    command.arg(support::portcullis()).args(arguments);
    support::run_to_end(&mut command)
}

#[test]
fn invalid_amounts_of_memory() {
    for amount in ["1M", "63M", "1024G"] {
        let output = portcullis(&["run", "--kernel", "k", "--memory", amount]);
        refuses(&output, USAGE, &["--memory", amount, "use 64 to"]);
    }
}

#[test]
fn invalid_numbers_of_processors() {
    for count in ["0", "33", "300"] {
        let output = portcullis(&["run", "--kernel", "k", "--cpus", count]);
        refuses(&output, USAGE, &["--cpus", count, "use 1 to 32"]);
    }
}

#[test]
fn a_command_line_that_is_too_long() {
    let long = "a".repeat(2048);
    let kernel = support::kernel();
    let output = portcullis(&["run", "--kernel", &kernel, "--cmdline", &long]);
    refuses(&output, USAGE, &["boot_args", "2047"]);
}

#[test]
fn a_machine_without_a_kernel() {
    refuses(&portcullis(&["run"]), USAGE, &["--kernel"]);
}

#[test]
fn a_configuration_that_cannot_be_used() {
    let files = TempDir::new("bad-config");
    for (text, words) in [
        ("{", vec!["line 1"]),
        (r#"{"boot_source": {}}"#, vec!["boot_source", "boot-source"]),
        (
            r#"{"machine-config": {"vcpu_count": "two", "mem_size_mib": 1}}"#,
            vec!["vcpu_count"],
        ),
        (
            r#"{"machine-config": {"vcpu_count": 99, "mem_size_mib": 128}}"#,
            vec!["vcpu_count"],
        ),
    ] {
        let config = files.file("config.json", text.as_bytes());
        let mut expected = words.clone();
        expected.push("config.json");
        refuses(&portcullis(&["run", "--config", &config]), USAGE, &expected);
        refuses(
            &portcullis(&["check", "--config", &config]),
            USAGE,
            &expected,
        );
    }
    let missing = portcullis(&["check", "--config", "/no/such/file"]);
    refuses(&missing, USAGE, &["/no/such/file"]);
}

#[test]
fn options_that_do_not_exist() {
    let output = portcullis(&["run", "--kernel", "k", "--no-such-option"]);
    refuses(&output, USAGE, &["--no-such-option"]);
}

#[test]
fn a_log_file_and_a_socket_that_cannot_be_made() {
    let kernel = support::kernel();
    let log = portcullis(&["run", "--kernel", &kernel, "--log-file", "/no/log"]);
    refuses(&log, USAGE, &["--log-file", "/no/log"]);
    let socket = portcullis(&["serve", "--api-socket", "/no/socket"]);
    refuses(&socket, USAGE, &["/no/socket"]);
}
