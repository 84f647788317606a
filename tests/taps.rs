//! Taps in another namespace, taps that disappear, and their effect on guests. `cargo xtask test`
//! runs these tests.

mod support;

use std::process::Command;
use std::time::Instant;

use support::checks::{self, NET, part};
use support::host::{self, Tap};
use support::{Guest, Machine, portcullis, run_to_end, time_limit};

const MAC: &str = "06:00:ac:10:00:41";
/// Text of a log line between the time and its origin.
const WARNING: &str = "] warn ";
const ERROR: &str = "] error ";

/// Waits until the guest's interface has a carrier, or has none.
#[track_caller]
fn carrier(guest: &mut Guest, interface: &str, expected: &str) {
    guest.run(&format!(
        "until grep -q {expected} /sys/class/net/{interface}/carrier; do sleep 0.2; done"
    ));
}

/// The lines of the monitor's log that contain all of `words`.
fn lines(guest: &Guest, words: &[&str]) -> Vec<String> {
    let log = guest.log();
    let lines = log
        .lines()
        .filter(|line| words.iter().all(|word| line.contains(word)));
    lines.map(str::to_owned).collect()
}

/// Waits for a line of the log that contains all of `words`, and expects no other such line.
#[track_caller]
fn logged_once(guest: &Guest, words: &[&str]) {
    let deadline = Instant::now() + time_limit();
    while lines(guest, words).is_empty() {
        assert!(
            Instant::now() < deadline,
            "no line has {words:?}:\n{}",
            guest.log()
        );
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    let found = lines(guest, words);
    assert_eq!(found.len(), 1, "{found:#?}");
}

/// A network namespace of the host, deleted when dropped.
struct Namespace(&'static str);

impl Namespace {
    fn create(name: &'static str) -> Self {
        host::run(&format!("ip netns add {name}"));
        Self(name)
    }

    fn ip(&self, command: &str) {
        host::run(&format!("ip -n {} {command}", self.0));
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        host::try_run(&format!("ip netns delete {}", self.0));
    }
}

#[test]
fn a_tap_in_a_network_namespace_is_used_although_sys_shows_another() {
    let namespace = Namespace::create("pcns");
    // A link of the same name that is no tap, visible in /sys.
    host::run("ip link add pctap2 type bridge");
    namespace.ip("tuntap add pctap2 mode tap multi_queue");
    namespace.ip("address add 10.9.41.1/24 dev pctap2");
    namespace.ip("link set pctap2 up");
    let machine = Machine::new()
        .tools()
        .with("--net", format!("tap=pctap2,mac={MAC}"));
    let arguments = machine.arguments();
    let enter = format!("--net=/run/netns/{}", namespace.0);
    let mut guest = machine.boot_by(|| Guest::launch_by(&["nsenter", &enter], &arguments));
    guest.quieten();
    let interface = checks::interface(&mut guest, MAC);
    guest.run(&format!(
        "ip address add 10.9.41.2/24 dev {interface} && ip link set {interface} up"
    ));
    guest.run("ping -c 3 -i 0.2 -W 10 10.9.41.1");
    checks::power_off(guest);
    host::run("ip link delete pctap2");
}

#[test]
fn a_template_for_a_taps_name_is_refused() {
    let mut machine = Command::new(portcullis());
    machine.args(Machine::new().with("--net", "tap=pctap%d").arguments());
    let output = run_to_end(&mut machine);
    assert_eq!(output.status, Some(2), "{}", output.stderr);
    assert!(output.stderr.contains("template"), "{}", output.stderr);
    let left = host::run("ip -o link show");
    assert!(!left.contains("pctap0"), "one was made:\n{left}");
}

#[test]
fn a_tap_that_goes_down_or_away_takes_the_guests_link_and_nothing_else() {
    const NAME: &str = "pctap3";
    let tap = Tap::create(NAME, 1, 42);
    let machine = Machine::new()
        .tools()
        .with("--net", format!("tap={NAME},id=lan,mac={MAC}"));
    let mut guest = machine.boot();
    checks::hush(&mut guest);
    let interface = checks::interface(&mut guest, MAC);
    checks::bring_up(&mut guest, &interface, &tap, 2);
    let address = checks::pci_address(&mut guest, NET, 0);

    part("down and up");
    host::run(&format!("ip link set {NAME} down"));
    carrier(&mut guest, &interface, "0");
    logged_once(&guest, &["lan: ", NAME, "is down"]);
    host::run(&format!("ip link set {NAME} up"));
    carrier(&mut guest, &interface, "1");
    checks::bring_up(&mut guest, &interface, &tap, 2);

    part("deleted");
    host::run(&format!("ip link delete {NAME}"));
    carrier(&mut guest, &interface, "0");
    logged_once(&guest, &["lan: ", NAME, "was deleted"]);
    part("rebinding without a tap");
    checks::rebind(&mut guest, &address, 3);
    guest.run(&format!("ip link set {interface} up"));
    carrier(&mut guest, &interface, "0");

    part("made again");
    // A confined monitor has no capability: the new tap is its user's.
    host::run(&format!("ip tuntap add {NAME} mode tap user 0 vnet_hdr"));
    let remade = Tap::configure(NAME, 42);
    carrier(&mut guest, &interface, "1");
    checks::bring_up(&mut guest, &interface, &remade, 2);
    part("rebinding");
    checks::rebind(&mut guest, &address, 3);
    checks::bring_up(&mut guest, &interface, &remade, 2);
    checks::kernel_log_is_clean(&mut guest);
    logged_once(&guest, &["lan: ", NAME, "was deleted"]);
    // One line for each of the two events, and no error.
    let warnings = lines(&guest, &[WARNING]);
    assert_eq!(warnings.len(), 2, "{warnings:#?}");
    let errors = lines(&guest, &[ERROR]);
    assert!(errors.is_empty(), "{errors:#?}");
    checks::power_off(guest);
}

#[test]
fn a_network_device_that_was_never_started_ends_without_an_error_line() {
    let tap = Tap::create("pctap4", 1, 43);
    for iommu in ["none", "virtio-iommu"] {
        let machine = Machine::new()
            .with("--iommu", iommu)
            .with("--net", format!("tap={},mac={MAC}", tap.name))
            .with("--vsock", "cid=9")
            .cmdline("guest.skip=virtio_net,vmw_vsock_virtio_transport");
        let mut guest = machine.boot();
        guest.signal("TERM").expect_exit(0);
        let errors = lines(&guest, &[ERROR]);
        assert!(errors.is_empty(), "{errors:#?}");
    }
}
