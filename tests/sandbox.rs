//! The confined monitor: its threads' status, and the end of one that makes a forbidden call.
#![allow(unsafe_code, reason = "the standard library signals no single thread")]

mod support;

use std::fs;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::process::Command;

use support::checks::part;
use support::host;
use support::{Guest, Machine, TempDir, eventually, portcullis, run_to_end};

/// Exit status of a monitor that made a forbidden call.
const FORBIDDEN: i32 = 148;

/// Names of the threads of a machine of [`machine`], one of each kind.
const THREADS: [&str; 8] = [
    "portcullis",
    "vcpu0",
    "iotlb",
    "msi",
    "disk-data",
    "console",
    "queries",
    "api",
];

/// A machine with a thread of each kind.
fn machine(files: &TempDir) -> Machine {
    let disk = files.path("disk");
    host::sparse(&disk, 16);
    Machine::new()
        .with("--iommu", "virtio-iommu")
        .with("--vsock", "cid=9")
        .with("--disk", format!("path={disk},id=data"))
        .with("--api-socket", files.path("api"))
}

/// The threads of a process: number and name.
fn threads(process: u32) -> Vec<(i32, String)> {
    let tasks = fs::read_dir(format!("/proc/{process}/task")).expect("the monitor runs");
    let numbers = tasks.filter_map(|task| task.ok()?.file_name().to_str()?.parse().ok());
    numbers
        .filter_map(|number: i32| {
            let name = fs::read_to_string(format!("/proc/{process}/task/{number}/comm")).ok()?;
            Some((number, name.trim().to_owned()))
        })
        .collect()
}

/// The same without the threads that the kernel made for this process.
fn own_threads(process: u32) -> Vec<(i32, String)> {
    let mut threads = threads(process);
    threads.retain(|(_, name)| !name.starts_with("vhost-") && !name.starts_with("kvm-"));
    threads
}

/// A field of the thread's status in proc(5).
#[track_caller]
fn status(process: u32, thread: i32, field: &str) -> String {
    let path = format!("/proc/{process}/task/{thread}/status");
    let text = fs::read_to_string(&path).expect("the thread runs");
    let mut lines = text.lines();
    let value = lines.find_map(|line| line.strip_prefix(field)?.strip_prefix(':'));
    value.expect("a field of status").trim().to_owned()
}

#[test]
fn every_thread_of_a_running_machine_is_confined() {
    let files = TempDir::new("confined");
    // Inherited by the monitor, and closed at its start.
    let inherited = fs::File::open("/dev/null").expect("a file");
    // SAFETY: only the flag of an open descriptor changes.
    unsafe { libc::fcntl(inherited.as_raw_fd(), libc::F_SETFD, 0) };
    let mut guest = machine(&files).boot();
    let process = guest.process_id();
    let running = own_threads(process);
    for name in THREADS {
        assert!(running.iter().any(|(_, known)| known == name), "no {name}");
    }
    for (thread, name) in &running {
        part(name);
        assert_eq!(status(process, *thread, "Seccomp"), "2", "{name}");
        assert_eq!(status(process, *thread, "NoNewPrivs"), "1", "{name}");
        assert_eq!(status(process, *thread, "CapEff"), "0".repeat(16), "{name}");
        assert_eq!(status(process, *thread, "CapPrm"), "0".repeat(16), "{name}");
    }
    part("files and memory");
    assert_eq!(status(process, running[0].0, "Umask"), "0077");
    let open = fs::read_dir(format!("/proc/{process}/fd")).expect("descriptors");
    let open = open.filter_map(|fd| fs::read_link(fd.ok()?.path()).ok());
    assert!(!open.into_iter().any(|to| to.as_os_str() == "/dev/null"));
    let maps = fs::read_to_string(format!("/proc/{process}/smaps")).expect("mappings");
    let not_dumped = maps.lines().filter(|line| {
        line.starts_with("VmFlags:") && line.split_whitespace().any(|flag| flag == "dd")
    });
    assert!(not_dumped.count() > 0, "guest memory is in core dumps");

    part("files after the start");
    let socket = files.path("api");
    let put = |path: &str| {
        let mut ctl = Command::new(portcullis());
        let body = format!(r#"{{"log_path": "{path}"}}"#);
        ctl.args(["ctl", "--api-socket", &socket, "PUT", "/logger", &body]);
        run_to_end(&mut ctl)
    };
    let elsewhere = put("/etc/portcullis-log");
    assert_eq!(elsewhere.status, Some(1), "{elsewhere:?}");
    assert!(elsewhere.stderr.contains("--allow-dir"), "{elsewhere:?}");
    guest.signal("TERM").expect_exit(0);
    assert!(!fs::exists(&socket).expect("its directory"), "{socket}");
}

/// Modes of a file, restored when dropped.
struct Mode<'a>(&'a str, fs::Permissions);

impl<'a> Mode<'a> {
    /// Sets the mode of the file at `path`.
    fn set(path: &'a str, mode: u32) -> Self {
        let before = fs::metadata(path).expect("a file").permissions();
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).expect("a mode");
        Self(path, before)
    }
}

impl Drop for Mode<'_> {
    fn drop(&mut self) {
        let _ = fs::set_permissions(self.0, self.1.clone());
    }
}

/// All threads of the monitor are this user's, and confined.
#[track_caller]
fn all_threads_are_of(guest: &Guest, user: u32) {
    let process = guest.process_id();
    for (thread, name) in own_threads(process) {
        let ids = status(process, thread, "Uid");
        let of_user = ids.split_whitespace().all(|id| id == user.to_string());
        assert!(of_user, "{name}: {ids}");
        assert_eq!(status(process, thread, "Seccomp"), "2", "{name}");
        assert_eq!(status(process, thread, "CapEff"), "0".repeat(16), "{name}");
    }
}

#[test]
fn a_user_with_access_to_kvm_runs_a_machine_with_a_disk() {
    let files = TempDir::new("plain");
    let disk = files.path("disk");
    host::sparse(&disk, 16);
    chown(&disk, Some(65534), Some(65534)).expect("root gives files away");
    let _kvm = Mode::set("/dev/kvm", 0o666);
    let machine = Machine::new()
        .with("--iommu", "virtio-iommu")
        .with("--disk", format!("path={disk},id=data"))
        .flag("--rng");
    let by = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    let mut guest = machine.boot_by(|| Guest::launch_by(&by, &machine.arguments()));
    guest.quieten();
    all_threads_are_of(&guest, 65534);
    guest.run("echo written | dd of=/dev/vda bs=512 count=1 conv=fsync");
    guest.type_line("poweroff -f").expect_exit(0);
    let written = fs::read(&disk).expect("the disk");
    assert!(written.starts_with(b"written\n"));
}

#[test]
fn root_gives_a_machine_to_a_user() {
    let files = TempDir::new("user");
    let mut guest = machine(&files).with("--user", "64321:64322").boot();
    all_threads_are_of(&guest, 64321);
    guest.run("echo written | dd of=/dev/vda bs=512 count=1 conv=fsync");
    guest.type_line("poweroff -f").expect_exit(0);
    let written = fs::read(files.path("disk")).expect("the disk");
    assert!(written.starts_with(b"written\n"));
}

#[test]
fn a_forbidden_call_of_any_thread_ends_the_monitor_and_restores_the_terminal() {
    for name in THREADS {
        part(name);
        let files = TempDir::new("forbidden");
        let log = files.path("log");
        let arguments = machine(&files).with("--log-file", &log).arguments();
        let before = support::Pty::open().expect("a terminal").mode();
        let mut guest = Guest::launch_on_terminal(&portcullis(), &arguments);
        // The terminal is raw when all threads are confined.
        eventually("raw", || guest.terminal().mode().is_raw());
        let process = guest.process_id();
        let running = threads(process);
        let thread = running.iter().find(|(_, known)| known == name);
        let (thread, _) = thread.unwrap_or_else(|| panic!("no {name}"));
        let group = i32::try_from(process).expect("a process");
        let signal = libc::SIGRTMIN() + 1;
        // SAFETY: the monitor has a handler of the signal.
        let sent = unsafe { libc::syscall(libc::SYS_tgkill, group, *thread, signal) };
        assert_eq!(sent, 0, "{}", std::io::Error::last_os_error());
        guest.expect_exit(FORBIDDEN);
        assert_eq!(guest.terminal().mode(), before, "{name}");
        let called = if name == "portcullis" { "main" } else { name };
        let line = format!("portcullis: thread {called} made the forbidden system call execve (");
        let logged = fs::read_to_string(&log).expect("a log");
        assert_eq!(logged.matches(&line).count(), 1, "{logged}");
        let printed = guest.console_output();
        assert_eq!(printed.matches(&line).count(), 1, "{printed}");
    }
}
