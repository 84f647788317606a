//! Boots guests with every device behind an IOMMU: `cargo xtask test` runs them.
//!
//! The devices must pass the same checks as without an IOMMU. In addition, the guest's kernel
//! isolates them, and forbidden accesses do not happen.

mod support;

use std::time::{Duration, Instant};

use support::checks::{self, ENTROPY, Load, NET, part};
use support::host::{self, Job, Tap};
use support::iommu::Api;
use support::{Guest, Machine, TempDir};
use vmm::action::{EndpointState, MappingsPage, RegistrationKind};

const MAC: &str = "06:00:ac:10:00:02";
const CID: u32 = 8;
/// The identifiers of all devices on the command line of [`Bench::machine`].
const ENDPOINTS: [&str; 5] = ["net0", "net1", "vsock", "data", "entropy"];
/// An IOMMU under test.
#[derive(Clone, Copy)]
struct Model {
    /// The value of `--iommu`.
    option: &'static str,
    /// Registration of a network device's back end with the notifier chain.
    registration: RegistrationKind,
    /// Upper bound on the misses of a guest that maps every packet.
    most_misses: fn(Traffic) -> u64,
    /// Text that the guest's kernel logs for a fault of this stream at this address, if any.
    fault_record: fn(u32, &str, Forbidden) -> Vec<String>,
}

const VIRTIO_IOMMU: Model = Model {
    option: "virtio-iommu",
    registration: RegistrationKind::MapUnmap,
    most_misses: |traffic| 5 * traffic.mebibytes,
    fault_record: |stream, iova, (_, access)| {
        vec![format!("fault from EP {stream} at {iova} [{access}]")]
    },
};

/// Bytes moved in one direction, and their cost.
#[derive(Clone, Copy)]
struct Traffic {
    mebibytes: u64,
    misses: u64,
    /// Answers to misses, and prefills.
    updates: u64,
}

/// Without ATS vhost falls back to plain invalidations.
#[cfg(target_arch = "aarch64")]
const SMMUV3: Model = Model {
    option: "smmuv3,ats=off",
    registration: RegistrationKind::Unmap,
    // On a slow host one for each acknowledgement while receiving, which the guest sends for two
    // packets or more, each with a buffer of its own: docs/benchmarks.md.
    most_misses: |traffic| traffic.updates / 2,
    fault_record: smmu_fault_record,
};

/// With ATS vhost receives the device IOTLB's invalidations. A translation request without
/// permission is answered, and no event is recorded (IHI 0070 §3.9.1).
#[cfg(target_arch = "aarch64")]
const SMMUV3_ATS: Model = Model {
    option: "smmuv3,ats=on",
    registration: RegistrationKind::DevIotlb,
    fault_record: |_, _, _| Vec::new(),
    ..SMMUV3
};

/// The event number, and the stream and the address of its record (IHI 0070 §7.3).
#[cfg(target_arch = "aarch64")]
fn smmu_fault_record(stream: u32, iova: &str, (step, _): Forbidden) -> Vec<String> {
    const F_TRANSLATION: u32 = 0x10;
    const F_PERMISSION: u32 = 0x13;
    let event = match step {
        "read-only-receive" => F_PERMISSION,
        _ => F_TRANSLATION,
    };
    let digits = iova.trim_start_matches("0x");
    vec![
        format!("event {event:#x} received"),
        format!("0x{stream:08x}000000{event:x}"),
        format!("0x{digits:0>16}"),
    ]
}

/// The host's resources for a machine with all devices: taps, a disk, an API socket.
struct Bench {
    taps: [Tap; 2],
    queues: u16,
    disk: String,
    api: Api,
    _scratch: TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::with_queues(1)
    }

    /// Creates the resources, with this many queue pairs of the first interface.
    fn with_queues(queues: u16) -> Self {
        let scratch = TempDir::new("viommu");
        let disk = scratch.path("disk");
        host::sparse(&disk, 256);
        Self {
            taps: [
                Tap::create("pctap0", queues, 20),
                Tap::create("pctap1", 1, 21),
            ],
            queues,
            disk,
            api: Api::new("viommu"),
            _scratch: scratch,
        }
    }

    /// A machine with all devices behind `model`.
    fn machine(&self, model: Model, cmdline: &str) -> Machine {
        let [first, second] = &self.taps;
        let queues = self.queues;
        let net0 = format!("tap={},id=net0,mac={MAC},queues={queues}", first.name);
        let machine = Machine::new()
            .tools()
            // A slow host loads the IOMMU's module later than the kernel's timeout of 10 s; the
            // devices would then be untranslated.
            .cmdline(&format!("deferred_probe_timeout=600 {cmdline}"))
            .with("--iommu", model.option)
            .with("--memory", "768M")
            .with("--net", net0)
            .with("--net", format!("tap={},id=net1", second.name))
            .with("--vsock", format!("cid={CID}"))
            .with("--disk", format!("path={},id=data", self.disk))
            .flag("--rng");
        self.api.serve(machine)
    }

    fn boot(&self, model: Model, cmdline: &str) -> Guest {
        let mut guest = self.machine(model, cmdline).boot();
        checks::hush(&mut guest);
        guest
    }

    /// Every device is in its own group of this type, and portcullis reports the same.
    fn groups_are(&self, guest: &mut Guest, kind: &str) {
        let state = match kind {
            "identity" => EndpointState::Bypass,
            _ => EndpointState::Translated,
        };
        let mut groups = Vec::new();
        for id in ENDPOINTS {
            let endpoint = self.api.endpoint(id);
            let group = group(guest, &endpoint.pci_address);
            assert_eq!(group_type(guest, &group), kind, "{id}");
            // An identity domain may also consist of mappings.
            if kind != "identity" {
                assert_eq!(endpoint.state, state, "{id}");
            }
            groups.push(group);
        }
        groups.sort();
        groups.dedup();
        assert_eq!(groups.len(), ENDPOINTS.len(), "groups: {groups:?}");
    }

    /// Sends in both directions; prints the counters of the first interface's back end.
    fn traffic(&self, guest: &mut Guest, load: Load) -> [Traffic; 2] {
        let tap = &self.taps[0];
        let mebibytes = u64::from(load.mebibytes) * u64::from(load.streams);
        ["to the host", "to the guest"].map(|direction| {
            let before = self.api.endpoint("net0").counters;
            let packets = tap.received();
            let start = Instant::now();
            if direction == "to the host" {
                checks::send_to_host(guest, tap, load);
            } else {
                checks::send_to_guest(guest, tap, 2, load);
            }
            let seconds = start.elapsed().as_secs();
            let after = self.api.endpoint("net0").counters;
            let packets = tap.received() - packets;
            part(&format!(
                "{mebibytes} MiB {direction} in {seconds} s, {packets} packets sent: {} misses, \
                 {} updates ({} prefills), {} invalidations sent and {} saved",
                after.misses - before.misses,
                after.updates - before.updates,
                after.prefills - before.prefills,
                after.invalidations_sent - before.invalidations_sent,
                after.invalidations_saved - before.invalidations_saved,
            ));
            assert_eq!(after.stalled_queues, 0, "a queue stands still");
            assert_eq!(after.all_faults(), before.all_faults(), "faults");
            Traffic {
                mebibytes,
                misses: after.misses - before.misses,
                updates: after.updates - before.updates,
            }
        })
    }

    /// Number of the device's current mappings, without those for MSIs.
    fn mappings(&self, id: &str) -> usize {
        let resource = format!("/iommu/endpoints/{id}/mappings");
        let (mut count, mut query) = (0, String::new());
        loop {
            let text = self.api.get(&format!("{resource}{query}"));
            let page: MappingsPage = serde_json::from_str(&text).expect("a page of mappings");
            count += page.mappings.iter().filter(|found| !found.mmio).count();
            let Some(next) = page.next else {
                return count;
            };
            query = format!("?after={next}");
        }
    }

    /// Checks all devices.
    fn devices_work(&self, guest: &mut Guest, load: Load) -> [Traffic; 2] {
        let interface = checks::interface(guest, MAC);
        checks::bring_up(guest, &interface, &self.taps[0], 2);
        let traffic = self.traffic(guest, load);
        checks::vsock_both_ways(guest, CID, checks::amount(1));
        checks::vsock_refused_and_reset(guest, CID);
        checks::entropy(guest);
        checks::disk_holds_what_is_written(guest, "/dev/vda", checks::amount(2));
        traffic
    }
}

/// Load of a machine with no other work.
fn full() -> Load {
    Load::of(2, 1)
}

/// Load of a machine with other work, or of a repeated check.
fn small() -> Load {
    Load::of(1, 1)
}

fn group(guest: &mut Guest, address: &str) -> String {
    let link = guest.run(&format!(
        "readlink /sys/bus/pci/devices/*{address}/iommu_group"
    ));
    link.rsplit('/').next().unwrap_or_default().to_owned()
}

fn group_type(guest: &mut Guest, group: &str) -> String {
    guest.run(&format!("cat /sys/kernel/iommu_groups/{group}/type"))
}

fn strict(model: Model) {
    let bench = Bench::new();
    let mut guest = bench.boot(model, "iommu.strict=1");
    part("groups");
    bench.groups_are(&mut guest, "DMA");
    let registration = bench.api.endpoint("net0").registration;
    let registration = registration.expect("a network device has a back end");
    println!(
        "registered for {}: {}",
        registration.kind, registration.reason
    );
    assert_eq!(registration.kind, model.registration);

    part("all devices");
    for traffic in bench.devices_work(&mut guest, full()) {
        let most = (model.most_misses)(traffic);
        let Traffic {
            misses, updates, ..
        } = traffic;
        assert!(misses <= most, "{misses} misses, {updates} updates");
    }
    checks::kernel_log_is_clean(&mut guest);
    checks::power_off(guest);
}

/// Lazy mode, in which the guest's kernel unmaps late and in batches, and every change of a group's
/// type while the machine runs.
fn lazy_and_switching(model: Model) {
    let bench = Bench::new();
    let mut guest = bench.boot(model, "iommu.strict=0");
    part("groups");
    bench.groups_are(&mut guest, "DMA-FQ");
    part("all devices");
    bench.devices_work(&mut guest, full());

    part("switching types");
    let net1 = bench.api.endpoint("net1").pci_address;
    let second = guest.run(&format!("ls /sys/bus/pci/devices/*{net1}/virtio*/net"));
    checks::bring_up(&mut guest, &second, &bench.taps[1], 2);
    flushes_stay_with_their_device(&bench, &mut guest);
    let load = flood(&mut guest, &bench.taps[1]);
    let address = bench.api.endpoint("net0").pci_address;
    let interface = checks::interface(&mut guest, MAC);
    for kind in ["identity", "DMA", "identity", "DMA-FQ", "DMA"] {
        part(&format!("net0 becomes {kind}"));
        switch(&mut guest, &address, kind);
        checks::bring_up(&mut guest, &interface, &bench.taps[0], 2);
        bench.traffic(&mut guest, small());
    }
    // From DMA to DMA-FQ, the driver stays bound.
    let group = group(&mut guest, &address);
    let own_load = flood_on(&mut guest, &bench.taps[0], 5600);
    guest.run(&format!(
        "echo DMA-FQ > /sys/kernel/iommu_groups/{group}/type"
    ));
    assert_eq!(group_type(&mut guest, &group), "DMA-FQ");
    drop(own_load);
    bench.traffic(&mut guest, small());
    for mut job in load {
        assert!(job.is_running(), "the load ended early");
    }
    assert_eq!(bench.api.endpoint("net1").counters.stalled_queues, 0);
    checks::kernel_log_is_clean(&mut guest);
    checks::power_off(guest);
}

/// Each device has its own domain, or ASID: a flush for the busy one is not a flush for the idle
/// one.
fn flushes_stay_with_their_device(bench: &Bench, guest: &mut Guest) {
    let invalidations = |id| bench.api.endpoint(id).counters.invalidations_sent;
    let before = ["net0", "net1"].map(invalidations);
    bench.traffic(guest, Load::of(2, 2));
    let after = ["net0", "net1"].map(invalidations);
    let [busy, idle] = [after[0] - before[0], after[1] - before[1]];
    part(&format!(
        "invalidations: {busy} for the busy device, {idle} for the idle one"
    ));
    assert!(busy >= 20, "{busy} invalidations of a busy device");
    // The idle device may still send a packet.
    assert!(idle <= busy / 4, "{idle} invalidations of an idle device");
}

/// The guest maps more than the kernel's vhost has entries for, so that vhost evicts the oldest
/// entries, and misses them.
fn pressure(model: Model) {
    let limit = host::run("cat /sys/module/vhost/parameters/max_iotlb_entries");
    let limit: usize = limit.parse().expect("a number of entries");
    let bench = Bench::with_queues(8);
    let mut guest = bench.boot(model, "iommu.strict=1");
    let interface = checks::interface(&mut guest, MAC);
    checks::bring_up(&mut guest, &interface, &bench.taps[0], 2);
    guest.run(&format!("ethtool -L {interface} combined 8"));
    let mapped = bench.mappings("net0");
    part(&format!("{mapped} mappings, {limit} entries"));
    assert!(mapped > limit, "{mapped} mappings fit");
    let load = Load::of(8, 1);
    bench.traffic(&mut guest, load);
    checks::bring_up(&mut guest, &interface, &bench.taps[0], 2);
    checks::kernel_log_is_clean(&mut guest);
    checks::power_off(guest);
}

/// As many queue pairs as vCPUs: a mapping goes to the pair of the vCPU that made it, and not to
/// the others.
fn several_pairs(model: Model) {
    // Eight in a long test.
    let pairs = u16::try_from(checks::amount(2)).expect("there are few");
    let bench = Bench::with_queues(pairs);
    let machine = bench.machine(model, "iommu.strict=1");
    let mut guest = machine.with("--cpus", pairs).boot();
    checks::hush(&mut guest);
    let interface = checks::interface(&mut guest, MAC);
    checks::bring_up(&mut guest, &interface, &bench.taps[0], 2);
    guest.run(&format!("ethtool -L {interface} combined {pairs}"));
    // The first buffers of every receive queue were mapped by one vCPU.
    bench.traffic(&mut guest, Load::of(pairs, 1));
    let before = bench.api.endpoint("net0").counters;
    let traffic = bench.traffic(&mut guest, Load::of(pairs, 1));
    let after = bench.api.endpoint("net0").counters;
    // Each of the IOTLBs counts the end of each mapping.
    let ends = after.invalidations_sent + after.invalidations_saved
        - (before.invalidations_sent + before.invalidations_saved);
    let mappings = ends / u64::from(pairs);
    let updates = after.updates - before.updates;
    part(&format!("{mappings} mappings, {updates} updates"));
    assert!(10 * updates <= 12 * mappings, "updates of a mapping");
    for Traffic {
        mebibytes, misses, ..
    } in traffic
    {
        assert!(misses <= 10 * mebibytes, "{misses} misses");
    }
    checks::kernel_log_is_clean(&mut guest);
    checks::power_off(guest);
}

/// Changes the type of the group of the function at `address`, with its driver unbound.
fn switch(guest: &mut Guest, address: &str, kind: &str) {
    let group = group(guest, address);
    let name = guest.run(&format!(
        "basename $(readlink -f /sys/bus/pci/devices/*{address})"
    ));
    let drivers = "/sys/bus/pci/drivers/virtio-pci";
    guest.run(&format!(
        "echo {name} > {drivers}/unbind && \
         echo {kind} > /sys/kernel/iommu_groups/{group}/type; \
         echo {name} > {drivers}/bind"
    ));
    assert_eq!(group_type(guest, &group), kind);
}

/// Continuous traffic through a tap in both directions.
fn flood(guest: &mut Guest, tap: &Tap) -> [Job; 2] {
    flood_on(guest, tap, 5500)
}

fn flood_on(guest: &mut Guest, tap: &Tap, port: u16) -> [Job; 2] {
    let sink = Job::start(&format!(
        "socat -u TCP-LISTEN:{port},reuseaddr OPEN:/dev/null"
    ));
    let peer = tap.host_address();
    // Not as much as the guest can send: that would be all that an emulated host does.
    guest.in_background(&format!(
        "while head -c 32768 /dev/zero; do sleep 1; done | \
         socat -u - TCP:{peer}:{port},retry=50,interval=0.2"
    ));
    let pings = Job::start(&format!("ping -q -i 0.1 {}", tap.guest_address(2)));
    std::thread::sleep(Duration::from_secs(1));
    [sink, pings]
}

fn passthrough(model: Model) {
    let bench = Bench::new();
    let mut guest = bench.boot(model, "iommu.passthrough=1");
    part("groups");
    bench.groups_are(&mut guest, "identity");
    part("all devices");
    bench.devices_work(&mut guest, full());
    // Below the 32-bit hole there are at most two regions, each missed in both directions.
    let misses = bench.api.endpoint("net0").counters.misses;
    assert!(
        misses <= 4,
        "{misses} misses of a device that sees all memory"
    );
    checks::kernel_log_is_clean(&mut guest);
    checks::power_off(guest);
}

/// A step of the test driver that tries a forbidden access, and whether the device reads (`R`) or
/// writes (`W`).
type Forbidden = (&'static str, &'static str);

const FORBIDDEN: [Forbidden; 6] = [
    ("unmapped-transmit", "R"),
    ("unmapped-receive", "W"),
    ("read-only-receive", "W"),
    ("unmapped-used-ring", "W"),
    ("unmap-receive-in-use", "W"),
    ("unmap-transmit-in-use", "R"),
];

/// A driver in the guest's user space tries accesses that its IOMMU forbids.
fn isolation(model: Model) {
    let bench = Bench::new();
    let mut guest = bench.boot(model, "guest.load=vfio_iommu_type1,vfio_pci");
    // Only where MSIs are not isolated, as behind a virtio-iommu on x86_64.
    guest.run("echo 1 > /sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts");
    let tap = &bench.taps[0];
    let (own, peer) = (tap.guest_address(20), tap.host_address());
    let endpoint = bench.api.endpoint("net0");
    let address = format!("0000:{}", endpoint.pci_address.trim_start_matches("0000:"));
    let run = |guest: &mut Guest, steps: &str| {
        let output = guest.run_within(
            Duration::from_secs(240),
            &format!("isolation {address} {own} {peer} {steps}"),
        );
        println!("{output}");
        output
    };

    part("exchange");
    run(&mut guest, "exchange interrupt");
    // Faults when the kernel last had not logged any for its interval.
    let mut quiet = 0;
    for forbidden in FORBIDDEN {
        let (step, _) = forbidden;
        part(step);
        let before = bench.api.endpoint("net0").counters.all_faults();
        // The kernel logs at most ten faults in five seconds.
        if before - quiet > 5 {
            guest.run("sleep 5");
            quiet = before;
        }
        guest.run("dmesg -c > /dev/null");
        let output = run(&mut guest, step);
        let after = bench.api.endpoint("net0").counters.all_faults();
        assert!(after > before, "{step} shows in no counter");
        let (_, rest) = output
            .split_once(" at ")
            .expect("the step names an address");
        let iova: String = rest
            .chars()
            .take_while(char::is_ascii_alphanumeric)
            .collect();
        let log = guest.run("dmesg");
        let record = (model.fault_record)(endpoint.stream_id, &iova, forbidden);
        for part in &record {
            assert!(log.contains(part), "no {part:?} in:\n{log}");
        }
        let silent = record.is_empty();
        assert!(!silent || !log.contains("event 0x"), "an event:\n{log}");
    }
    run(&mut guest, "again");

    part("the kernel's driver again");
    let interface = checks::interface(&mut guest, MAC);
    checks::bring_up(&mut guest, &interface, tap, 2);
    bench.traffic(&mut guest, small());
    checks::power_off(guest);
}

/// Rebinding and rebooting, both with traffic running.
fn storm(model: Model) {
    let bench = Bench::new();
    let mut guest = bench.boot(model, "");
    let interface = checks::interface(&mut guest, MAC);
    let tap = &bench.taps[0];
    checks::bring_up(&mut guest, &interface, tap, 2);
    let address = checks::pci_address(&mut guest, NET, 0);

    let pings = Job::start(&format!("ping -q -i 0.1 {}", tap.guest_address(2)));
    let own = tap.guest_address(2);
    let rounds = checks::amount(1);
    for round in 1..=rounds {
        part(&format!("12 rebinds, round {round} of {rounds}"));
        guest.run_within(
            Duration::from_secs(200),
            &format!(
                "( cd /sys/bus/pci/drivers/virtio-pci; for i in $(seq 12); do \
                 echo {address} > unbind && echo {address} > bind && \
                 ip address replace {own}/24 dev {interface} && ip link set {interface} up \
                 || exit 1; done )"
            ),
        );
    }
    drop(pings);
    checks::bring_up(&mut guest, &interface, tap, 2);
    bench.traffic(&mut guest, small());
    for (id, kind) in [("net0", NET), ("entropy", ENTROPY)] {
        let address = checks::pci_address(&mut guest, kind, 0);
        guest.run(&format!(
            "echo {address} > /sys/bus/pci/drivers/virtio-pci/unbind"
        ));
        assert_eq!(bench.mappings(id), 0, "mappings of {id} without a driver");
        assert_eq!(bench.api.endpoint(id).counters.stalled_queues, 0, "{id}");
        guest.run(&format!(
            "echo {address} > /sys/bus/pci/drivers/virtio-pci/bind"
        ));
    }
    checks::bring_up(&mut guest, &interface, tap, 2);
    checks::kernel_log_is_clean(&mut guest);
    checks::power_off(guest);

    // Not in the lazy mode: Linux resets a virtio-iommu at shutdown, and then waits forever for the
    // requests of its flush queue.
    let mut guest = bench.boot(model, "iommu.strict=1");
    let rounds = checks::amount(3);
    for round in 1..=rounds {
        part(&format!("reboot {round} of {rounds}"));
        checks::bring_up(&mut guest, &interface, tap, 2);
        let load = flood(&mut guest, tap);
        checks::reset(guest);
        drop(load);
        guest = bench.boot(model, "iommu.strict=1");
        let counters = bench.api.endpoint("net0").counters;
        assert_eq!(counters.stalled_queues, 0);
        assert_eq!(counters.all_faults(), 0);
    }
    checks::bring_up(&mut guest, &interface, tap, 2);
    bench.traffic(&mut guest, small());
    checks::power_off(guest);
}

/// The distribution's newest kernel translates for every device, and logs no error.
fn newest_kernel(model: Model) {
    let bench = Bench::new();
    let mut guest = bench.machine(model, "").newest().boot();
    checks::hush(&mut guest);
    let release = guest.run("uname -r");
    part(&release);
    assert!(!release.starts_with("6.12."), "{release} is the usual one");
    for id in ENDPOINTS {
        let state = bench.api.endpoint(id).state;
        assert_eq!(state, EndpointState::Translated, "{id}");
    }
    bench.devices_work(&mut guest, small());
    checks::kernel_log_is_clean(&mut guest);
    checks::power_off(guest);
}

mod virtio_iommu {
    use super::*;

    #[test]
    fn devices_work_in_strict_mode() {
        strict(VIRTIO_IOMMU);
    }

    #[test]
    #[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
    fn devices_work_in_lazy_mode_and_through_changes_of_type() {
        lazy_and_switching(VIRTIO_IOMMU);
    }

    #[test]
    #[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
    fn devices_work_in_passthrough_mode() {
        passthrough(VIRTIO_IOMMU);
    }

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn devices_work_with_the_newest_kernel() {
        newest_kernel(VIRTIO_IOMMU);
    }

    #[test]
    fn forbidden_accesses_do_not_happen() {
        isolation(VIRTIO_IOMMU);
    }

    #[test]
    #[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
    fn more_mappings_than_entries_still_let_traffic_through() {
        pressure(VIRTIO_IOMMU);
    }

    #[test]
    #[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
    fn a_mapping_goes_to_the_queue_pair_of_its_vcpu() {
        several_pairs(VIRTIO_IOMMU);
    }

    #[test]
    #[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
    fn rebinding_and_rebooting_leave_nothing_behind() {
        storm(VIRTIO_IOMMU);
    }
}

#[cfg(target_arch = "aarch64")]
mod smmuv3 {
    use super::*;

    #[test]
    fn devices_work_in_strict_mode_without_ats() {
        strict(SMMUV3);
    }

    #[test]
    fn devices_work_in_strict_mode_with_ats() {
        strict(SMMUV3_ATS);
    }

    #[test]
    fn devices_work_in_lazy_mode_and_through_changes_of_type_with_ats() {
        lazy_and_switching(SMMUV3_ATS);
    }

    #[test]
    fn devices_work_in_passthrough_mode_without_ats() {
        passthrough(SMMUV3);
    }

    #[test]
    #[ignore = "long: cargo xtask test --long"]
    fn devices_work_in_passthrough_mode_with_ats() {
        passthrough(SMMUV3_ATS);
    }

    #[test]
    fn devices_work_with_the_newest_kernel() {
        newest_kernel(SMMUV3_ATS);
    }

    #[test]
    fn forbidden_accesses_do_not_happen_without_ats() {
        isolation(SMMUV3);
    }

    #[test]
    fn forbidden_accesses_do_not_happen_with_ats() {
        isolation(SMMUV3_ATS);
    }

    #[test]
    fn devices_work_in_strict_mode_with_stage_2_alone() {
        let option = "smmuv3,ats=on,stage=2";
        strict(Model {
            option,
            ..SMMUV3_ATS
        });
    }

    #[test]
    #[ignore = "long: cargo xtask test --long"]
    fn devices_work_in_strict_mode_where_stages_nest() {
        let option = "smmuv3,ats=off,stage=nested";
        strict(Model { option, ..SMMUV3 });
    }

    #[test]
    #[ignore = "long: cargo xtask test --long"]
    fn rebinding_and_rebooting_leave_nothing_behind_without_ats() {
        storm(SMMUV3);
    }

    #[test]
    fn rebinding_and_rebooting_leave_nothing_behind_with_ats() {
        storm(SMMUV3_ATS);
    }

    #[test]
    #[ignore = "long: cargo xtask test --long"]
    fn devices_work_in_lazy_mode_and_through_changes_of_type_without_ats() {
        lazy_and_switching(SMMUV3);
    }

    /// The guest disables ATS of a function and enables it again, with traffic running.
    #[test]
    fn vhost_follows_ats_as_the_guest_switches_it() {
        let bench = Bench::new();
        let mut guest = bench.boot(SMMUV3_ATS, "iommu.strict=1");
        let interface = checks::interface(&mut guest, MAC);
        checks::bring_up(&mut guest, &interface, &bench.taps[0], 2);
        let address = bench.api.endpoint("net0").pci_address;
        let load = flood(&mut guest, &bench.taps[0]);
        for _ in 0..2 {
            for (control, kind) in [
                ("0000", RegistrationKind::Unmap),
                ("8000", RegistrationKind::DevIotlb),
            ] {
                guest.run(&format!("setpci -s {address} ECAP_ATS+6.w={control}"));
                part(&format!("ATS control is {control}"));
                let registration = bench.api.endpoint("net0").registration;
                assert_eq!(registration.map(|found| found.kind), Some(kind));
                bench.traffic(&mut guest, small());
            }
        }
        for mut job in load {
            assert!(job.is_running(), "the load ended early");
        }
        checks::power_off(guest);
    }
}
