//! The control plane answers, and the process ends, in any state of the guest: `cargo xtask test`
//! runs these tests.

mod support;

use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::thread;
use std::time::Instant;

use support::checks::{self, BLOCK, ENTROPY, part};
use support::host::{self, Job};
use support::{Guest, Machine, TempDir, eventually};
use vmm::action::{InstanceInfo, MachineState};

/// The virtio type of an IOMMU (virtio 1.2 §5).
const IOMMU: u16 = 23;

/// Requests of a [`Client`] whose latencies are reported together.
const REQUESTS: u32 = 20;

struct Ctl {
    socket: String,
}

/// A client of the API with a persistent connection.
struct Client(BufReader<UnixStream>);

impl Client {
    fn connect(socket: &str) -> Self {
        let stream = UnixStream::connect(socket).expect("the API accepts connections");
        let limit = stream.set_read_timeout(Some(support::time_limit()));
        limit.expect("a socket has a time limit");
        Self(BufReader::new(stream))
    }

    /// Sends a request without a body, and does not wait for the response.
    fn send(&mut self, request: &str) {
        let sent = write!(self.0.get_mut(), "{request}\r\nHost: localhost\r\n\r\n");
        sent.expect("the API reads requests");
    }

    /// The body of `GET /`.
    fn instance(&mut self) -> InstanceInfo {
        self.send("GET / HTTP/1.1");
        let mut length = 0;
        loop {
            let mut line = String::new();
            let read = self.0.read_line(&mut line);
            assert_ne!(read.expect("GET / is answered"), 0, "no response to GET /");
            let line = line.trim_end().to_ascii_lowercase();
            if line.is_empty() {
                break;
            }
            if let Some(value) = line.strip_prefix("content-length:") {
                length = value.trim().parse().expect("a length");
            }
        }
        let mut body = vec![0; length];
        self.0.read_exact(&mut body).expect("a whole response");
        serde_json::from_slice(&body).expect("an instance")
    }

    /// Repeats `GET /`; each response must say that the machine runs. Reports the latencies, on
    /// which no assertion depends.
    #[track_caller]
    fn is_answered(&mut self, during: &str) {
        let mut times: Vec<_> = (0..REQUESTS)
            .map(|_| {
                let start = Instant::now();
                assert_eq!(self.instance().state, MachineState::Running);
                start.elapsed()
            })
            .collect();
        times.sort_unstable();
        let [.., last] = times.as_slice() else { return };
        let median = times[times.len() / 2];
        part(&format!(
            "GET / {during}: {REQUESTS} responses, median {median:?}, longest {last:?}"
        ));
    }
}

impl Ctl {
    #[track_caller]
    fn done(&self, words: &[&str]) -> String {
        let mut command = Command::new(support::portcullis());
        let start = Instant::now();
        command
            .args(["ctl", "--api-socket", &self.socket])
            .args(words);
        let output = support::run_to_end(&mut command);
        assert_eq!(output.status, Some(0), "{words:?}: {output:?}");
        // For the report only.
        part(&format!(
            "{words:?} took {} ms",
            start.elapsed().as_millis()
        ));
        output.stdout
    }

    /// Value of a metric, by its name and labels.
    #[track_caller]
    fn metric(&self, name: &str) -> u64 {
        let metrics = self.done(&["metrics"]);
        let mut lines = metrics.lines().filter_map(|line| line.rsplit_once(' '));
        let value = lines.find(|(found, _)| *found == name);
        let value = value.and_then(|(_, value)| value.parse().ok());
        value.unwrap_or_else(|| panic!("no {name} in {metrics}"))
    }

    #[track_caller]
    fn state(&self) -> MachineState {
        let text = self.done(&["GET", "/"]);
        let info: InstanceInfo = serde_json::from_str(&text).expect("an instance");
        info.state
    }
}

/// A guest that keeps one of its vCPUs inside the virtio-iommu, over this many mappings.
fn flooded(files: &TempDir, mappings: u32) -> (Guest, Ctl) {
    let disk = files.path("disk");
    host::sparse(&disk, 16);
    let socket = files.path("api");
    let machine = Machine::new()
        .tools()
        .cmdline("module_blacklist=virtio_iommu")
        .with("--cpus", 2)
        // Two mappings for each 4 KiB of memory are permitted.
        .with("--memory", "3G")
        .with("--iommu", "virtio-iommu")
        .with("--disk", format!("path={disk},id=data"))
        .flag("--rng")
        .with("--api-socket", &socket);
    let mut guest = machine.boot();
    let address = checks::pci_address(&mut guest, IOMMU, 0);
    let stream = |guest: &mut Guest, kind| {
        let address = checks::pci_address(guest, kind, 0);
        let (_, slot) = address.rsplit_once(':').expect("a slot");
        let (device, _) = slot.split_once('.').expect("a function");
        u32::from_str_radix(device, 16).expect("a number") << 3
    };
    let (endpoint, other) = (stream(&mut guest, BLOCK), stream(&mut guest, ENTROPY));
    guest.run(&format!(
        "{{ ( taskset -c 1 flood {address} {endpoint} {other} {mappings} \
         > /tmp/flood 2>&1 < /dev/null ) & }}"
    ));
    guest.run(
        "while ! grep -q 'ring 2$' /tmp/flood; do \
         grep Error -A 9 /tmp/flood && break; sleep 1; done; ! grep -q Error /tmp/flood",
    );
    (guest, Ctl { socket })
}

/// Number of rings that the device has answered.
fn rings(guest: &mut Guest) -> u64 {
    let last = guest.run("tail -n 1 /tmp/flood");
    let number = last.rsplit(' ').next().and_then(|word| word.parse().ok());
    number.unwrap_or_else(|| panic!("no ring in {last:?}"))
}

fn control_plane_stays_live(mappings: u32) {
    let files = TempDir::new("flood");
    let (mut guest, ctl) = flooded(&files, mappings);
    let mut client = Client::connect(&ctl.socket);
    client.is_answered("while a vCPU is inside the virtio-iommu");
    for _ in 0..3 {
        ctl.done(&["pause"]);
        assert_eq!(ctl.state(), MachineState::Paused);
        ctl.done(&["iommu"]);
        ctl.done(&["resume"]);
        // The ring that the pause interrupted is answered completely and correctly.
        let before = rings(&mut guest);
        let answered = format!(
            "while ! grep -q 'ring {}$' /tmp/flood; do sleep 0.2; done",
            before + 2
        );
        guest.run(&answered);
    }
    ctl.done(&["iommu"]);
    // The guest unmaps and maps one page repeatedly.
    let mapped = ctl.metric("portcullis_virtio_iommu_mappings");
    assert!(
        [mappings - 1, mappings].map(u64::from).contains(&mapped),
        "{mapped}"
    );
    client.is_answered("after three pauses");
    let start = Instant::now();
    guest.signal("TERM").expect_exit(0);
    part(&format!("SIGTERM took {} ms", start.elapsed().as_millis()));
}

#[test]
fn full_rings_of_a_virtio_iommu_delay_no_pause_and_no_end() {
    control_plane_stays_live(4096);
}

#[test]
#[ignore = "long: cargo xtask test --long"]
fn full_rings_over_a_million_mappings_delay_no_pause_and_no_end() {
    control_plane_stays_live(1 << 20);
}

/// A thread of the monitor.
struct Thread(String);

impl Thread {
    /// The thread of this name.
    #[track_caller]
    fn named(guest: &Guest, name: &str) -> Self {
        let tasks = format!("/proc/{}/task", guest.process_id());
        let tasks = fs::read_dir(tasks).expect("the monitor runs");
        let mut paths = tasks.map(|task| task.expect("a thread").path().display().to_string());
        let path = paths.find(|path| read(&format!("{path}/comm")).trim() == name);
        Self(path.unwrap_or_else(|| panic!("the monitor has no thread {name}")))
    }

    /// Waits until the thread is inside this system call.
    #[track_caller]
    fn wait_for_call(&self, number: libc::c_long) {
        let path = format!("{}/syscall", self.0);
        let is_inside = || read(&path).split(' ').next() == Some(&number.to_string());
        eventually(&format!("system call {number} of {}", self.0), is_inside);
    }

    /// Delays the thread by ten minutes at each system call of this name.
    fn delay_at(&self, call: &str) -> Job {
        let (_, id) = self.0.rsplit_once('/').expect("a path");
        let job = Job::start(&format!(
            "strace -qq -o /dev/null -p {id} -e trace={call} -e inject={call}:delay_enter=600000000"
        ));
        let path = format!("{}/status", self.0);
        eventually("a traced thread", || {
            !read(&path).contains("TracerPid:\t0\n")
        });
        job
    }
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The host does not complete a read of a disk. A vCPU waits for it with the disk's registers
/// locked, because it resets the function.
#[test]
fn a_vcpu_that_never_leaves_a_device_delays_no_query_and_no_end() {
    let files = TempDir::new("stuck");
    let (disk, socket) = (files.path("disk"), files.path("api"));
    host::sparse(&disk, 16);
    let machine = Machine::new()
        .tools()
        .with("--cpus", 2)
        .with("--disk", format!("path={disk},id=data"))
        .with("--api-socket", &socket);
    let arguments = machine.arguments();
    let launch = || Guest::launch_on_terminal(&support::portcullis(), &arguments);
    let mut guest = machine.boot_by(launch);
    guest.quieten();
    assert!(guest.terminal().mode().is_raw());
    let address = checks::pci_address(&mut guest, BLOCK, 0);
    let mut client = Client::connect(&socket);
    client.is_answered("while nothing is stuck");
    let ctl = Ctl { socket };
    let read_bytes = || ctl.metric("portcullis_block_read_bytes_total{device=\"data\"}");
    let before = read_bytes();
    guest.run("dd if=/dev/vda of=/dev/null bs=64k skip=64 count=16");
    assert!(read_bytes() >= before + (1 << 20), "a read is not counted");

    let worker = Thread::named(&guest, "disk-data");
    let held = worker.delay_at("lseek");
    guest.in_background("dd if=/dev/vda of=/dev/null bs=4096 skip=3072 count=1");
    worker.wait_for_call(libc::SYS_lseek);
    let vcpu = Thread::named(&guest, "vcpu1");
    // Initiate Function Level Reset (PCIe 6.0 §7.5.3.4).
    guest.in_background(&format!(
        "taskset -c 1 setpci -s {address} CAP_EXP+8.w=8000"
    ));
    vcpu.wait_for_call(libc::SYS_futex);
    client.is_answered("while a vCPU is stuck inside a device");
    // It waits for the vCPU, and so forever.
    Client::connect(&ctl.socket).send("GET /metrics HTTP/1.1");
    let mut pause = Command::new(support::portcullis());
    pause.args(["ctl", "--api-socket", &ctl.socket, "pause"]);
    let pause = thread::spawn(move || support::run_to_end(&mut pause));
    client.is_answered("while a pause waits for it, too");
    vcpu.wait_for_call(libc::SYS_futex);

    let start = Instant::now();
    guest.signal("TERM");
    let status = format!("/proc/{}/status", guest.process_id());
    eventually("end", || read(&status).contains("State:\tZ"));
    part(&format!("SIGTERM took {} ms", start.elapsed().as_millis()));
    // All threads have ended. The parent is notified after the tracer has ended too.
    drop(held);
    guest.expect_exit(0);
    assert!(guest.terminal().mode().is_cooked());
    let output = guest.console_output();
    assert!(output.contains("a vCPU does not stop"), "{output}");
    let paused = pause.join().expect("ctl has ended");
    assert_eq!(paused.status, Some(1), "{paused:?}");
}

/// Three busy vCPUs, and a watchdog that reports a CPU without progress for twice this time.
#[cfg(target_arch = "x86_64")]
fn busy(files: &TempDir, watchdog_s: u32) -> (Guest, Ctl) {
    let socket = files.path("api");
    let machine = Machine::new()
        .with("--cpus", 3)
        .with("--api-socket", &socket);
    let mut guest = machine.boot();
    guest.run(&format!(
        "echo {watchdog_s} > /proc/sys/kernel/watchdog_thresh"
    ));
    for cpu in 0..3 {
        guest.in_background(&format!("taskset -c {cpu} sh -c 'while :; do :; done'"));
    }
    (guest, Ctl { socket })
}

/// Only x86_64 can report a pause to the guest: docs/api.md.
#[cfg(target_arch = "x86_64")]
#[test]
#[ignore = "long: cargo xtask test --long"]
fn a_long_pause_is_no_soft_lockup() {
    let files = TempDir::new("paused");
    let (mut guest, ctl) = busy(&files, 10);
    guest.run("sleep 12; dmesg -c > /dev/null");
    ctl.done(&["pause"]);
    std::thread::sleep(std::time::Duration::from_secs(40));
    ctl.done(&["resume"]);
    guest.run("sleep 12");
    let log = guest.run("dmesg");
    for word in ["lockup", "stall"] {
        assert!(!log.contains(word), "{log}");
    }
    guest.signal("TERM").expect_exit(0);
}
