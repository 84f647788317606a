//! The control plane answers, and the process ends, whatever the guest does: `cargo xtask test`
//! runs these.

mod support;

use std::process::Command;
use std::time::Instant;

use support::checks::{self, BLOCK, ENTROPY, part};
use support::host;
use support::{Guest, Machine, TempDir};
use vmm::action::{InstanceInfo, MachineState};

/// The virtio type of an IOMMU (virtio 1.2 §5).
const IOMMU: u16 = 23;

struct Ctl {
    socket: String,
}

impl Ctl {
    #[track_caller]
    fn done(&self, words: &[&str]) -> String {
        let mut command = Command::new(support::portcullis());
        let start = Instant::now();
        command
            .args(["ctl", "--api-socket", &self.socket])
            .args(words);
        let said = support::run_to_end(&mut command);
        assert_eq!(said.status, Some(0), "{words:?}: {said:?}");
        // For the report only: nothing depends on it.
        part(&format!(
            "{words:?} took {} ms",
            start.elapsed().as_millis()
        ));
        said.stdout
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
        // Two mappings for each 4 KiB of memory are allowed.
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

/// How many rings the device has answered.
fn rings(guest: &mut Guest) -> u64 {
    let last = guest.run("tail -n 1 /tmp/flood");
    let number = last.rsplit(' ').next().and_then(|word| word.parse().ok());
    number.unwrap_or_else(|| panic!("no ring in {last:?}"))
}

fn control_plane_stays_live(mappings: u32) {
    let files = TempDir::new("flood");
    let (mut guest, ctl) = flooded(&files, mappings);
    assert_eq!(ctl.state(), MachineState::Running);
    for _ in 0..3 {
        ctl.done(&["pause"]);
        assert_eq!(ctl.state(), MachineState::Paused);
        ctl.done(&["iommu"]);
        ctl.done(&["resume"]);
        // The ring that the pause interrupted is answered, whole and right.
        let before = rings(&mut guest);
        let answered = format!(
            "while ! grep -q 'ring {}$' /tmp/flood; do sleep 0.2; done",
            before + 2
        );
        guest.run(&answered);
    }
    ctl.done(&["iommu"]);
    ctl.done(&["metrics"]);
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

/// Three busy vCPUs and a watchdog that reports what stands still for longer than twice this.
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

/// Only x86_64 has a way to tell a guest of a pause: docs/api.md.
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
