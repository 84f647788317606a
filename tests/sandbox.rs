//! The confined monitor: its threads' status, and the end of one that makes a forbidden call.
#![allow(unsafe_code, reason = "the standard library signals no single thread")]

mod support;

use std::fs;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{PermissionsExt as _, chown};
use std::process::{Command, Stdio};

use support::checks::{self, NET, part};
use support::host::{self, Job};
use support::refusal::refuse;
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
    let mut guest = machine(&files).with("--log-level", "info").boot();
    let abi = "landlock denies what the kernel's ABI ";
    assert_eq!(guest.log().matches(abi).count(), 1, "{}", guest.log());
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
        assert_eq!(status(process, *thread, "CapBnd"), "0".repeat(16), "{name}");
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
    assert!(!fs::exists("/etc/portcullis-log").expect("a directory"));
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
fn all_threads_are_of(process: u32, user: u32) {
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
    all_threads_are_of(guest.process_id(), 65534);
    guest.run("echo written | dd of=/dev/vda bs=512 count=1 conv=fsync");
    guest.type_line("poweroff -f").expect_exit(0);
    let written = fs::read(&disk).expect("the disk");
    assert!(written.starts_with(b"written\n"));
}

#[test]
fn root_gives_a_machine_to_a_user() {
    let files = TempDir::new("user");
    let mut guest = machine(&files).with("--user", "64321:64322").boot();
    all_threads_are_of(guest.process_id(), 64321);
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

#[test]
fn a_step_that_fails_on_the_event_loop_ends_the_process() {
    let files = TempDir::new("step");
    let socket = files.path("api");
    let mut serve = Command::new(portcullis());
    serve.args(["serve", "--api-socket", &socket]);
    serve.stdin(Stdio::null()).stderr(Stdio::piped());
    // Only the event loop adds rules to its domain: the other threads are confined by then.
    refuse(&mut serve, libc::SYS_landlock_add_rule, libc::EINVAL);
    let serve = serve.spawn().expect("portcullis can be started");
    eventually("served", || fs::exists(&socket).expect("its directory"));
    let ctl = |words: &[&str]| {
        let mut ctl = Command::new(portcullis());
        run_to_end(ctl.args(["ctl", "--api-socket", &socket]).args(words))
    };
    let body = format!(r#"{{"kernel_image_path": "{}"}}"#, support::kernel());
    let configured = ctl(&["PUT", "/boot-source", &body]);
    assert_eq!(configured.status, Some(0), "{configured:?}");
    let line = "cannot confine the process: denying access by landlock is not possible; `--sandbox \
                off` runs";
    let started = ctl(&["start"]);
    assert_eq!(started.status, Some(1), "{started:?}");
    assert!(started.stderr.contains(line), "{started:?}");
    let ended = serve.wait_with_output().expect("it ends");
    let text = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(ended.status.code(), Some(1), "{text}");
    assert!(text.contains(line), "{text}");
    assert!(!fs::exists(&socket).expect("its directory"), "{socket}");
}

#[test]
fn a_jailed_machine_has_its_control_group_and_network() {
    const OWNER: u32 = 64321;
    const MEMORY: u64 = 900 << 20;
    let files = TempDir::new("jailed");
    let groups = files.path("groups");
    fs::create_dir(&groups).expect("a directory");
    host::run(&format!("mount -t cgroup2 none {groups}"));
    // The jail looks for the groups at their usual place.
    let mounted = "mount -t cgroup2 none /sys/fs/cgroup && exec \"$@\"";
    let by = ["unshare", "--mount", "/bin/sh", "-c", mounted, "sh"];

    let network = format!(
        "ip tuntap add tap5 mode tap vnet_hdr user {OWNER}
        ip address add 10.9.5.1/24 dev tap5 && ip link set tap5 up
        exec sleep 100000"
    );
    let network = files.file("network", network.as_bytes());
    let network = Job::start(&format!("unshare --net /bin/sh {network}"));
    let namespace = format!("/proc/{}/ns/net", network.id());
    let in_network = format!("nsenter --net={namespace} ip -4 -o address show tap5");
    eventually("a tap", || {
        host::try_run(&in_network).1.contains("10.9.5.1")
    });

    let root = files.path("root");
    fs::create_dir(&root).expect("a directory");
    let machine = Machine::new().with("--net", "tap=tap5");
    let owner = OWNER.to_string();
    let memory = format!("memory.max={MEMORY}");
    let jail = ["jail", "--root", &root, "--uid", &owner, "--gid", &owner];
    let options = [
        "--id",
        "vm5",
        "--cgroup",
        &memory,
        "--cgroup",
        "pids.max=30",
    ];
    let mut arguments: Vec<String> = [&jail[..], &options, &["--netns", &namespace, "--"]]
        .concat()
        .into_iter()
        .map(str::to_owned)
        .collect();
    arguments.extend(machine.arguments());
    let mut guest = machine.boot_by(|| Guest::launch_by(&by, &arguments));
    guest.quieten();

    part("the group");
    let jail = guest.process_id();
    let child = fs::read_to_string(format!("/proc/{jail}/task/{jail}/children"));
    let monitor: u32 = child
        .expect("the jail runs")
        .trim()
        .parse()
        .expect("a process");
    let group = fs::read_to_string(format!("/proc/{monitor}/cgroup")).expect("its group");
    assert!(
        group.lines().any(|line| line == "0::/portcullis/vm5"),
        "{group}"
    );
    let value = |file: &str| {
        let text = fs::read_to_string(format!("{groups}/portcullis/vm5/{file}"));
        text.expect("a file of the group").trim().to_owned()
    };
    assert_eq!(value("memory.max"), MEMORY.to_string());
    assert_eq!(value("pids.max"), "30");
    assert_eq!(value("cgroup.procs"), monitor.to_string());

    part("the network");
    let link = |process: u32| fs::read_link(format!("/proc/{process}/ns/net")).expect("a network");
    assert_eq!(link(monitor), link(network.id()));
    assert_ne!(link(monitor), link(std::process::id()));
    let device = checks::pci_address(&mut guest, NET, 0);
    let name = guest.run(&format!("ls /sys/bus/pci/devices/{device}/virtio*/net"));
    guest.run(&format!(
        "ip address add 10.9.5.2/24 dev {name} && ip link set {name} up"
    ));
    guest.run("ping -c 1 -W 60 10.9.5.1");
    all_threads_are_of(monitor, OWNER);

    guest.type_line("poweroff -f").expect_exit(0);
    let left = fs::exists(format!("{groups}/portcullis/vm5"));
    assert!(!left.expect("its parent"), "the group is left");
    host::run(&format!("umount {groups}"));
}
