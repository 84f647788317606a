//! Boots guests with every device, without an IOMMU: `cargo xtask test` runs them.

mod support;

use std::fs::File;
use std::process::Command;
use std::time::Duration;

use support::checks::{self, BLOCK, ENTROPY, Load, NET, VSOCK, part};
use support::host::{self, Job, Tap};
use support::{Guest, Machine, TempDir, portcullis, run_to_end};

const MAC: &str = "06:00:ac:10:00:02";
const CID: u32 = 7;

/// The PCI addresses of all devices with a driver that can be unbound.
fn devices(guest: &mut Guest) -> Vec<String> {
    [NET, BLOCK, ENTROPY, VSOCK]
        .map(|kind| checks::pci_address(guest, kind, 0))
        .into()
}

#[test]
fn network_vsock_disk_and_entropy_work_through_reboot_and_rebinding() {
    let tap = Tap::create("pctap0", 4, 10);
    let scratch = TempDir::new("devices");
    let (disk, fixed) = (scratch.path("disk"), scratch.path("fixed"));
    host::sparse(&disk, 256);
    host::run(&host::noise(&fixed, 8));
    let net = format!("tap={},mac={MAC},queues=4,mtu=9000", tap.name);
    let machine = Machine::new()
        .tools()
        .with("--memory", "768M")
        .with("--cpus", 2)
        .with("--net", net)
        .with("--vsock", format!("cid={CID}"))
        .with(
            "--disk",
            format!("path={disk},id=data,cache=writeback,queues=2"),
        )
        .with("--disk", format!("path={fixed},id=fixed,readonly=on"))
        .flag("--rng");
    host::run(&format!("ip link set {} mtu 9000", tap.name));

    let mut guest = machine.boot();
    checks::hush(&mut guest);
    part("the guest's kernel sees sane devices");
    sane_devices(&mut guest);
    window_of_configuration_space(&mut guest);

    part("network");
    let interface = checks::interface(&mut guest, MAC);
    network(&mut guest, &interface, &tap);

    part("vsock");
    checks::vsock_both_ways(&mut guest, CID, checks::amount(1));
    checks::vsock_refused_and_reset(&mut guest, CID);

    part("entropy");
    checks::entropy(&mut guest);

    part("disk");
    let sum = checks::fill_new_file_system(&mut guest, "/dev/vda", checks::amount(4));
    checks::check_file_system(&mut guest, "/dev/vda", &sum);

    part("read-only disk");
    let before = host::checksum(&fixed);
    assert_eq!(checks::guest_checksum(&mut guest, "/dev/vdb"), before);
    let (status, text) = guest.try_run("dd if=/dev/zero of=/dev/vdb bs=4k count=1 conv=fsync");
    assert!(status != 0, "a read-only disk was written: {text}");
    assert_eq!(host::checksum(&fixed), before, "a read-only image changed");

    for address in devices(&mut guest) {
        part(&format!("rebinding {address}"));
        checks::rebind(&mut guest, &address, checks::amount(5));
    }
    checks::bring_up(&mut guest, &interface, &tap, 2);
    let load = Load::of(4, 1);
    checks::send_to_host(&mut guest, &tap, load);
    checks::vsock_both_ways(&mut guest, CID, 1);
    checks::entropy(&mut guest);
    checks::check_file_system(&mut guest, "/dev/vda", &sum);
    checks::kernel_log_is_clean(&mut guest);

    part("reboot with traffic");
    let flood = flood(&mut guest, &tap);
    checks::reset(guest);
    drop(flood);
    checks::check_image(&disk);

    part("the same after the reboot");
    let mut guest = machine.boot();
    checks::hush(&mut guest);
    checks::check_file_system(&mut guest, "/dev/vda", &sum);
    checks::bring_up(&mut guest, &interface, &tap, 2);
    checks::vsock_both_ways(&mut guest, CID, 1);
    checks::power_off(guest);
}

fn sane_devices(guest: &mut Guest) {
    let text = guest.run("lspci -vv");
    for kind in [NET, BLOCK, ENTROPY, VSOCK] {
        let id = format!("1af4:{:04x}", 0x1040 + kind);
        assert!(text.contains(&id), "no device {id}:\n{text}");
    }
    for bad in [
        "rev ff",
        "!!! Unknown header",
        "<unassigned>",
        "[virtual]",
        "[disabled]",
    ] {
        assert!(!text.contains(bad), "lspci shows {bad}:\n{text}");
    }
    let functions = guest.run("lspci -n | grep -c 1af4:10");
    assert_eq!(functions, "5", "virtio functions");
    let enabled = text.matches("MSI-X: Enable+").count();
    assert_eq!(enabled, 5, "devices that use MSI-X:\n{text}");
    let modern = guest.run("cat /sys/bus/virtio/devices/*/features | cut -c33 | sort -u");
    assert_eq!(modern, "1", "VERSION_1 is negotiated by every device");
    checks::kernel_log_is_clean(guest);
}

/// The guest reads configuration space as memory, until a driver opens the window on the BAR
/// (virtio 1.2 §4.1.4.9): each read of it is then one of the BAR.
fn window_of_configuration_space(guest: &mut Guest) {
    const DEVICE_STATUS: u32 = 20;
    let address = checks::pci_address(guest, ENTROPY, 0);
    let path = format!("/sys/bus/pci/devices/{address}/config");
    let text = guest.run(&format!("od -An -v -tx1 -N256 {path}"));
    let bytes: Vec<usize> = text
        .split_whitespace()
        .map(|byte| usize::from_str_radix(byte, 16).expect("od prints bytes"))
        .collect();
    let mut at = bytes[0x34];
    while (bytes[at], bytes[at + 3]) != (9, 5) {
        at = bytes[at + 1];
        assert_ne!(at, 0, "no window: {text}");
    }
    let status = |guest: &mut Guest| {
        let register = format!("setpci -s {address} {:x}.b", at + 16);
        let aim = format!("setpci -s {address} {:x}.l={DEVICE_STATUS:x}", at + 8);
        guest.run(&format!("{aim} {:x}.l=1 && {register}", at + 12))
    };
    let closed = guest.run(&format!("setpci -s {address} {:x}.b", at + 16));
    assert_eq!(closed, "00", "a window of no length");
    assert_eq!(status(guest), "0f", "DRIVER_OK");
    let drivers = "/sys/bus/pci/drivers/virtio-pci";
    guest.run(&format!("echo {address} > {drivers}/unbind"));
    let after = guest.run(&format!("setpci -s {address} {:x}.b", at + 16));
    assert_eq!(after, "01", "ACKNOWLEDGE: Linux reset the device");
    guest.run(&format!("echo {address} > {drivers}/bind"));
    assert_eq!(status(guest), "0f", "DRIVER_OK");
}

fn network(guest: &mut Guest, interface: &str, tap: &Tap) {
    let mtu = guest.run(&format!("cat /sys/class/net/{interface}/mtu"));
    assert_eq!(mtu, "9000", "the MTU of the device's configuration");
    checks::bring_up(guest, interface, tap, 2);
    guest.run(&format!("ethtool -L {interface} combined 4"));
    let peer = tap.host_address();
    guest.run(&format!("ping -c 3 -i 0.2 -W 10 -s 8900 {peer}"));
    host::run(&format!(
        "ping -c 3 -i 0.2 -W 10 -s 8900 {}",
        tap.guest_address(2)
    ));
    let load = Load::of(4, 1);
    checks::send_to_host(guest, tap, load);
    checks::send_to_guest(guest, tap, 2, load);
    let used = guest.run("grep -c 'virtio.*-input\\..* *$' /proc/interrupts");
    assert_eq!(used, "4", "receive queues with an interrupt of their own");
}

/// Continuous traffic in both directions: pings, and a stream.
fn flood(guest: &mut Guest, tap: &Tap) -> [Job; 2] {
    let sink = Job::start("socat -u TCP-LISTEN:5500,reuseaddr OPEN:/dev/null");
    let peer = tap.host_address();
    guest.in_background(&format!(
        "socat -u OPEN:/dev/zero TCP:{peer}:5500,retry=50,interval=0.2"
    ));
    let pings = Job::start(&format!("ping -q -i 0.1 {}", tap.guest_address(2)));
    std::thread::sleep(Duration::from_secs(2));
    [sink, pings]
}

#[test]
fn a_full_host_disk_is_an_error_in_the_guest_and_nothing_else() {
    let scratch = TempDir::new("full");
    let path = scratch.path("small");
    host::run(&format!(
        "mkdir {path} && mount -t tmpfs -o size=8M tmpfs {path}"
    ));
    let image = format!("{path}/disk");
    host::sparse(&image, 64);
    let mut guest = Machine::new()
        .tools()
        .with("--disk", format!("path={image},id=data"))
        .boot();
    checks::hush(&mut guest);

    let write = "dd if=/tmp/noise of=/dev/vda bs=1M conv=fsync";
    let sum = checks::guest_noise(&mut guest, "/tmp/noise", 24);
    let (status, text) = guest.try_run(write);
    assert!(status != 0, "24 MiB were written to 8: {text}");
    let errors = guest.run("dmesg | grep -c 'I/O error, dev vda'");
    assert_ne!(errors, "0", "the guest's kernel was told");
    // The machine goes on, and so does the device.
    guest.run("dd if=/dev/vda of=/dev/null bs=1M count=4 iflag=direct");
    host::run(&format!("mount -o remount,size=64M {path}"));
    guest.run(write);
    guest.run("echo 3 > /proc/sys/vm/drop_caches");
    let read = guest.run("dd if=/dev/vda bs=1M count=24 2>/dev/null | md5sum");
    assert!(read.starts_with(&sum), "{read} is not {sum}");
    let log = guest.log();
    let lines: Vec<_> = log
        .lines()
        .filter(|line| line.contains("No space"))
        .collect();
    assert_eq!(lines.len(), 1, "the log says it once:\n{log}");
    checks::power_off(guest);
    host::run(&format!("umount {path}"));
}

#[test]
fn a_file_size_limit_is_an_error_in_the_guest_and_nothing_else() {
    let scratch = TempDir::new("limit");
    let image = scratch.path("disk");
    host::sparse(&image, 16);
    let machine = Machine::new()
        .tools()
        .with("--disk", format!("path={image},id=data"));
    let mut guest = machine.boot_by(|| {
        let mut command = Command::new("bash");
        command.args(["-c", "ulimit -f 8192; exec \"$@\"", "bash"]);
        command.arg(portcullis()).args(machine.arguments());
        Guest::launch_piped(command)
    });
    checks::hush(&mut guest);

    let write = "dd if=/tmp/noise of=/dev/vda bs=1M conv=fsync";
    let sum = checks::guest_noise(&mut guest, "/tmp/noise", 12);
    let (status, text) = guest.try_run(write);
    assert!(status != 0, "12 MiB were written where 8 may be: {text}");
    let errors = guest.run("dmesg | grep -c 'I/O error, dev vda'");
    assert_ne!(errors, "0", "the guest's kernel was told");
    // The machine goes on, and so does the device, within the limit.
    guest.run("dd if=/tmp/noise of=/dev/vda bs=1M count=4 conv=fsync 2>/dev/null");
    guest.run("echo 3 > /proc/sys/vm/drop_caches");
    let read = guest.run("dd if=/dev/vda bs=1M count=4 2>/dev/null | cmp -n 4194304 - /tmp/noise");
    assert_eq!(read, "", "noise {sum}");
    let log = guest.log();
    let reports = log.lines().filter(|line| line.contains("File too large"));
    assert_eq!(reports.count(), 1, "the log says it once:\n{log}");
    checks::power_off(guest);
}

#[test]
fn unavailable_devices_are_refused_in_one_line() {
    let scratch = TempDir::new("refused");
    let disk = scratch.path("disk");
    host::sparse(&disk, 16);
    // Locked in the same way as by a machine that writes to it.
    let lock = File::open(&disk).expect("the disk is there");
    lock.lock().expect("no other process holds it");
    refused("--disk", &format!("path={disk}"), &["disk", "in use"]);
    drop(lock);

    let missing = scratch.path("missing");
    refused(
        "--disk",
        &format!("path={missing}"),
        &["missing", "No such file"],
    );
    let tap = Tap::create("pctap1", 1, 11);
    let wide = format!("tap={},queues=2", tap.name);
    refused("--net", &wide, &["pctap1", "multi_queue"]);
}

/// A machine with this option ends with status 2 and one line that contains all of `words`.
#[track_caller]
fn refused(option: &str, value: &str, words: &[&str]) {
    let mut machine = Command::new(portcullis());
    machine.args(Machine::new().with(option, value).arguments());
    let output = run_to_end(&mut machine);
    assert_eq!(output.status, Some(2), "{}", output.stderr);
    let line = output.stderr.trim();
    assert!(!line.contains('\n'), "more than one line:\n{line}");
    for word in words {
        assert!(line.contains(word), "{line:?} does not say {word}");
    }
}
