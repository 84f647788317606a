//! Device checks that hold with and without an IOMMU.

use std::time::Duration;

use super::host::{self, Job, Tap};
use super::{Guest, TempDir};

/// Time limit of a long transfer, in an emulated host and behind an IOMMU.
const TRANSFER_LIMIT: Duration = Duration::from_secs(400);
/// Time limit that is longer than any connection attempt of the other end.
const CLOSING_LIMIT: Duration = Duration::from_secs(60);

/// The virtio type of a network device (virtio 1.2 §5).
pub const NET: u16 = 1;
/// The virtio type of a block device.
pub const BLOCK: u16 = 2;
/// The virtio type of an entropy device.
pub const ENTROPY: u16 = 4;
/// The virtio type of a vsock device.
pub const VSOCK: u16 = 19;

/// Prints the part of a test that begins. A failed test's output then shows its last part, and a
/// long test does not look like a hung host.
#[track_caller]
pub fn part(name: &str) {
    println!("--- {name}");
    super::say_now(&format!("--- {name}"));
}

/// Name of the guest's network interface with this Ethernet address.
#[track_caller]
pub fn interface(guest: &mut Guest, mac: &str) -> String {
    let path = guest.run(&format!("grep -l {mac} /sys/class/net/*/address"));
    path.split('/').nth(4).unwrap_or_default().to_owned()
}

/// PCI address of the guest's `nth` device of this virtio type (virtio 1.2 §5).
#[track_caller]
pub fn pci_address(guest: &mut Guest, virtio_type: u16, nth: usize) -> String {
    let id = 0x1040 + virtio_type;
    let found = guest.run(&format!(
        "grep -l {id:#06x} /sys/bus/pci/devices/*/device | cut -d/ -f6"
    ));
    let address = found.lines().nth(nth);
    address
        .unwrap_or_else(|| panic!("the guest has no device {id:#x} number {nth}"))
        .to_owned()
}

/// Keeps kernel messages off the guest's console; they stay in the kernel log.
#[track_caller]
pub fn hush(guest: &mut Guest) {
    guest.run("dmesg -n 2");
}

/// Powers the guest off; portcullis must end with status 0.
#[track_caller]
pub fn power_off(mut guest: Guest) {
    guest.type_line("poweroff -f").expect_exit(0);
}

/// Resets the guest; portcullis must end with status 3.
#[track_caller]
pub fn reset(mut guest: Guest) {
    guest.type_line("reboot -f").expect_exit(3);
}

/// Configures the address of the guest's interface and pings the host.
#[track_caller]
pub fn bring_up(guest: &mut Guest, interface: &str, tap: &Tap, last: u8) {
    let (own, peer) = (tap.guest_address(last), tap.host_address());
    guest.run(&format!(
        "ip address replace {own}/24 dev {interface} && ip link set {interface} up"
    ));
    guest.run(&format!("ping -c 3 -i 0.2 -W 10 {peer}"));
    let neighbour = guest.run(&format!("ip neigh show to {peer} dev {interface}"));
    assert!(
        neighbour.contains("lladdr"),
        "the host did not answer ARP: {neighbour}"
    );
}

/// Parallel streams of bytes.
#[derive(Clone, Copy)]
pub struct Load {
    /// Number of streams.
    pub streams: u16,
    /// MiB in each stream.
    pub mebibytes: u32,
}

impl Load {
    /// Creates a load of streams with the [`amount`] of MiB each.
    pub fn of(streams: u16, usual: u32) -> Self {
        Self {
            streams,
            mebibytes: amount(usual),
        }
    }
}

/// `usual` rounds or MiB, and four times as many for long tests (`PORTCULLIS_LONG`).
pub fn amount(usual: u32) -> u32 {
    match std::env::var_os("PORTCULLIS_LONG") {
        Some(_) => usual * 4,
        None => usual,
    }
}

/// Sends random bytes from the guest to the host by TCP, and compares their checksums.
#[track_caller]
pub fn send_to_host(guest: &mut Guest, tap: &Tap, load: Load) {
    let scratch = TempDir::new("received");
    let received = |stream: u16| scratch.path(&format!("stream{stream}"));
    let listeners: Vec<Job> = (0..load.streams)
        .map(|stream| {
            let path = received(stream);
            let port = 5000 + stream;
            Job::start(&format!(
                "socat -u TCP-LISTEN:{port},reuseaddr CREATE:{path}"
            ))
        })
        .collect();
    let mut sums = Vec::new();
    for stream in 0..load.streams {
        sums.push(guest_noise(
            guest,
            &format!("/tmp/out{stream}"),
            load.mebibytes,
        ));
    }
    let peer = tap.host_address();
    guest.run_within(
        TRANSFER_LIMIT,
        &all_at_once(load.streams, |stream| {
            let port = 5000 + stream;
            format!("socat -u OPEN:/tmp/out{stream} TCP:{peer}:{port},retry=50,interval=0.2")
        }),
    );
    for (stream, (listener, sum)) in (0..).zip(listeners.into_iter().zip(sums)) {
        listener.finish(CLOSING_LIMIT);
        assert_eq!(
            host::checksum(&received(stream)),
            sum,
            "stream {stream} to the host"
        );
    }
    guest.run("rm /tmp/out*");
}

/// Sends random bytes from the host to the guest by TCP, and compares their checksums.
#[track_caller]
pub fn send_to_guest(guest: &mut Guest, tap: &Tap, last: u8, load: Load) {
    let scratch = TempDir::new("sent");
    let own = tap.guest_address(last);
    let mut senders = Vec::new();
    let mut sums = Vec::new();
    for stream in 0..load.streams {
        let path = scratch.path(&format!("stream{stream}"));
        host::run(&host::noise(&path, load.mebibytes));
        sums.push(host::checksum(&path));
        let port = 6000 + stream;
        senders.push(Job::start(&format!(
            "socat -u OPEN:{} TCP:{own}:{port},retry=100,interval=0.2",
            path
        )));
    }
    guest.run_within(
        TRANSFER_LIMIT,
        &all_at_once(load.streams, |stream| {
            let port = 6000 + stream;
            format!("socat -u TCP-LISTEN:{port},reuseaddr CREATE:/tmp/in{stream}")
        }),
    );
    for (stream, (sender, sum)) in senders.into_iter().zip(sums).enumerate() {
        sender.finish(CLOSING_LIMIT);
        assert_eq!(
            guest_checksum(guest, &format!("/tmp/in{stream}")),
            sum,
            "stream {stream} to the guest"
        );
    }
    guest.run("rm /tmp/in*");
}

/// A shell command that runs one command for each stream in parallel and fails if one of them does.
fn all_at_once(streams: u16, command: impl Fn(u16) -> String) -> String {
    let mut script = String::new();
    for stream in 0..streams {
        script += &format!("{} & p{stream}=$!; ", command(stream));
    }
    let waits: Vec<_> = (0..streams).map(|n| format!("wait $p{n}")).collect();
    script + &waits.join(" && ")
}

/// Fills a file in the guest with random bytes and returns its checksum.
#[track_caller]
pub fn guest_noise(guest: &mut Guest, path: &str, mebibytes: u32) -> String {
    guest.run(&host::noise(path, mebibytes));
    guest_checksum(guest, path)
}

/// The checksum of a file in the guest.
#[track_caller]
pub fn guest_checksum(guest: &mut Guest, path: &str) -> String {
    let text = guest.run(&format!("md5sum < {path}"));
    text.split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// Sends a stream in each direction by vsock, and compares the checksums.
#[track_caller]
pub fn vsock_both_ways(guest: &mut Guest, cid: u32, mebibytes: u32) {
    let scratch = TempDir::new("vsock");
    let received = scratch.path("received");
    let listener = Job::start(&format!(
        "socat -u VSOCK-LISTEN:5100,reuseaddr CREATE:{}",
        received
    ));
    let sum = guest_noise(guest, "/tmp/vsock-out", mebibytes);
    guest.run_within(
        TRANSFER_LIMIT,
        "socat -u OPEN:/tmp/vsock-out VSOCK-CONNECT:2:5100,retry=50,interval=0.2",
    );
    listener.finish(CLOSING_LIMIT);
    assert_eq!(host::checksum(&received), sum, "vsock stream to the host");

    let sent = scratch.path("sent");
    host::run(&host::noise(&sent, mebibytes));
    let sender = Job::start(&format!(
        "socat -u OPEN:{} VSOCK-CONNECT:{cid}:5200,retry=100,interval=0.2",
        sent
    ));
    guest.run_within(
        TRANSFER_LIMIT,
        "socat -u VSOCK-LISTEN:5200,reuseaddr CREATE:/tmp/vsock-in",
    );
    sender.finish(CLOSING_LIMIT);
    let sum = guest_checksum(guest, "/tmp/vsock-in");
    assert_eq!(sum, host::checksum(&sent), "vsock stream to the guest");
    guest.run("rm /tmp/vsock-*");
}

/// A connection to a vsock port without a listener is refused, in both directions, and one whose
/// other end dies is reset; the device continues.
#[track_caller]
pub fn vsock_refused_and_reset(guest: &mut Guest, cid: u32) {
    let (status, text) = guest.try_run("socat -u OPEN:/dev/null VSOCK-CONNECT:2:5300");
    assert!(status != 0 && text.contains("reset by peer"), "{text}");
    let (status, text) =
        host::try_run(&format!("socat -u OPEN:/dev/null VSOCK-CONNECT:{cid}:5300"));
    assert!(status != 0 && text.contains("reset by peer"), "{text}");

    let dies = Job::start("socat -u VSOCK-LISTEN:5400,reuseaddr OPEN:/dev/null");
    guest.in_background(
        "socat -u OPEN:/dev/zero VSOCK-CONNECT:2:5400,retry=50,interval=0.2; \
         echo $? > /tmp/reset-status",
    );
    guest.run("sleep 1; ! [ -e /tmp/reset-status ]");
    drop(dies);
    let status = guest.run(
        "for i in $(seq 100); do [ -s /tmp/reset-status ] && break; sleep 0.1; done; \
         cat /tmp/reset-status; rm /tmp/reset-status",
    );
    assert_ne!(status, "0", "a sender to a dead listener succeeded");
    vsock_both_ways(guest, cid, 1);
}

/// Writes random bytes to the guest's disk `device`, and compares them with a later read.
#[track_caller]
pub fn disk_holds_what_is_written(guest: &mut Guest, device: &str, mebibytes: u32) {
    let sum = guest_noise(guest, "/tmp/noise", mebibytes);
    guest.run_within(
        TRANSFER_LIMIT,
        &format!("dd if=/tmp/noise of={device} bs=1M conv=fsync 2>/dev/null && rm /tmp/noise"),
    );
    guest.run("echo 3 > /proc/sys/vm/drop_caches");
    let read = guest.run(&format!(
        "dd if={device} bs=1M count={mebibytes} 2>/dev/null | md5sum"
    ));
    assert!(read.starts_with(&sum), "{device}: {read} is not {sum}");
}

/// Makes a file system on the guest's disk `device`, writes random bytes to it and returns their
/// checksum.
#[track_caller]
pub fn fill_new_file_system(guest: &mut Guest, device: &str, mebibytes: u32) -> String {
    guest.run_within(
        TRANSFER_LIMIT,
        &format!("/usr/bin/mke2fs -q -t ext4 {device}"),
    );
    guest.run(&format!("mount -t ext4 {device} /mnt"));
    let sum = guest_noise(guest, "/tmp/noise", mebibytes);
    guest.run_within(
        TRANSFER_LIMIT,
        "dd if=/tmp/noise of=/mnt/noise bs=1M conv=fsync 2>/dev/null && rm /tmp/noise",
    );
    guest.run_within(TRANSFER_LIMIT, "umount /mnt");
    sum
}

/// Compares the file of [`fill_new_file_system`] with its checksum, read from the device again.
#[track_caller]
pub fn check_file_system(guest: &mut Guest, device: &str, sum: &str) {
    guest.run(&format!("mount -t ext4 -o ro {device} /mnt"));
    guest.run("echo 3 > /proc/sys/vm/drop_caches");
    assert_eq!(guest_checksum(guest, "/mnt/noise"), sum, "file on {device}");
    guest.run("umount /mnt");
}

/// Checks the file system in an image that no guest uses, on the host.
#[track_caller]
pub fn check_image(image: &str) {
    host::run(&format!("e2fsck -fn {}", image));
}

/// Unbinds the PCI function at `address` from its driver and binds it again, `times` times.
#[track_caller]
pub fn rebind(guest: &mut Guest, address: &str, times: u32) {
    guest.run_within(
        TRANSFER_LIMIT,
        &format!(
            "( cd /sys/bus/pci/drivers/virtio-pci; for i in $(seq {times}); do \
             echo {address} > unbind && echo {address} > bind || exit 1; done; [ -e {address} ] )"
        ),
    );
}

/// Checks that random bytes come from the virtio device, and that two reads differ.
#[track_caller]
pub fn entropy(guest: &mut Guest) {
    let current = guest.run("cat /sys/class/misc/hw_random/rng_current");
    assert!(current.starts_with("virtio_rng"), "{current}");
    let mut draw = || guest.run("dd if=/dev/hwrng bs=512 count=8 iflag=fullblock | md5sum");
    let (first, second) = (draw(), draw());
    assert_ne!(first, second, "the same random bytes came twice");
    let (status, _) = guest.try_run("dd if=/dev/hwrng bs=512 count=8 | tr -d '\\000' | grep -q .");
    assert_eq!(status, 0, "the random bytes are all zero");
}

/// Lines of a kernel's report up to its call trace, which registers precede.
const STACK_DUMP: usize = 40;

/// Checks that the guest's kernel log reports no faulty device and no fallback.
#[track_caller]
pub fn kernel_log_is_clean(guest: &mut Guest) {
    let log = guest.run("dmesg -r");
    let suspicious = [
        "no space",
        "can't assign",
        "failed to assign",
        "no compatible bridge window",
        "can't claim",
        "falling back",
        "fall back",
        "failed to enable MSI",
        "no irq handler",
        "Unhandled",
        "Call Trace",
        "Call trace",
        "BUG:",
        "WARNING:",
        "nobody cared",
        "probe of",
        "soft lockup",
    ];
    let lines: Vec<_> = log.lines().collect();
    let complains = |index: usize| {
        let line = lines[index];
        let context = &lines[index.saturating_sub(STACK_DUMP)..index];
        suspicious.iter().any(|word| line.contains(word))
            // An SMMU's own interrupts are wired here.
            && !line.contains("falling back to wired irqs")
            // A host that does not run a vCPU for 21 s is slow; its devices are not faulty.
            && !context.iter().any(|line| line.contains("rcu:") && line.contains("stall"))
    };
    if let Some(first) = (0..lines.len()).find(|index| complains(*index)) {
        let context = &lines[first.saturating_sub(STACK_DUMP)..lines.len().min(first + STACK_DUMP)];
        panic!(
            "the guest's kernel complains: {}\nin:\n{}",
            lines[first],
            context.join("\n")
        );
    }
}
