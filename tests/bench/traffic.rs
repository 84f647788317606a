//! Throughput of a network device by iperf3, its cost per packet, and the messages of its IOTLB.

use std::io;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::thread;
use std::time::Duration;

use super::counters::{self, IotlbProbes};
use super::monitor::{MAC, Monitor};
use super::parse::{self, Received};
use super::support::host::{self, Tap};
use super::support::{Guest, checks};

/// Number of transfers for a median.
const ROUNDS: u32 = 3;
/// Time limit of a transfer on a quiet machine.
const LIMIT: Duration = Duration::from_secs(400);

/// Options of iperf3 for each protocol; UDP without a limit of its rate.
const PROTOCOLS: [(&str, &str); 2] = [("UDP", "-u -b 0 -l 1400 -n 2M"), ("TCP", "-n 4M")];

/// The direction of a transfer.
#[derive(Clone, Copy)]
enum Way {
    ToHost,
    ToGuest,
}

/// Boots with a network device and measures both protocols in both directions. Returns figures:
/// names with units, and values.
pub fn measure(monitor: Monitor, iommu: &str, cmdline: &str) -> Vec<(String, f64)> {
    let tap = Tap::create("pcbench0", 1, 30);
    let before = counters::machines();
    let mut guest = monitor.boot_with_net(iommu, cmdline, &tap);
    let machine = counters::new_machine(&before).expect("KVM counts the exits of the machine");
    checks::hush(&mut guest);
    let interface = checks::interface(&mut guest, MAC);
    checks::bring_up(&mut guest, &interface, &tap, 2);
    let mut figures = Vec::new();
    for way in [Way::ToHost, Way::ToGuest] {
        for (protocol, options) in PROTOCOLS {
            let mut transfer = || transfer(&mut guest, &tap, way, options);
            // The first one brings up caches, and the host's pool of random numbers.
            transfer();
            let mut rounds = Vec::new();
            for _ in 0..ROUNDS {
                let exits = counters::exits_of(&machine);
                let received = transfer();
                rounds.push((received, counters::exits_of(&machine) - exits));
            }
            // Probes cost time, so the messages are counted in one more transfer.
            let probes = (iommu != "none").then(IotlbProbes::new);
            let probes = probes.transpose().expect("the kernel has probes");
            let counted = probes.map(|probes| {
                let received = transfer();
                probes.counts().map(|count| count / received.mebibytes())
            });
            let what = match way {
                Way::ToHost => format!("{protocol} to the host"),
                Way::ToGuest => format!("{protocol} to the guest"),
            };
            figures.extend(figures_of(&what, protocol, rounds, counted));
        }
    }
    checks::power_off(guest);
    figures
}

fn figures_of(
    what: &str,
    protocol: &str,
    rounds: Vec<(Received, f64)>,
    counted: Option<[f64; 3]>,
) -> Vec<(String, f64)> {
    let mut figures = Vec::new();
    let mut add = |unit: &str, of: &dyn Fn(&(Received, f64)) -> f64| {
        if let Some([median, ..]) = parse::spread(rounds.iter().map(of).collect()) {
            figures.push((format!("{what}, {unit}"), median));
        }
    };
    add("Mbit/s", &|(received, _)| received.megabits_per_second());
    if protocol == "UDP" {
        add("ns per packet", &|(received, _)| {
            1e9 * received.seconds / received.packets()
        });
        add("exits per packet", &|(received, exits)| {
            exits / received.packets()
        });
    } else {
        add("exits per MiB", &|(received, exits)| {
            exits / received.mebibytes()
        });
    }
    for (name, count) in ["MISS", "UPDATE", "INVALIDATE"]
        .iter()
        .zip(counted.into_iter().flatten())
    {
        figures.push((format!("{what}, {name} per MiB"), count));
    }
    figures
}

fn transfer(guest: &mut Guest, tap: &Tap, way: Way, options: &str) -> Received {
    // A port for each transfer: the sockets of an earlier one may not be closed yet.
    static PORT: AtomicU16 = AtomicU16::new(5300);
    let port = PORT.fetch_add(1, Ordering::Relaxed);
    let limit = LIMIT.as_secs();
    let report = match way {
        Way::ToHost => {
            let mut server = Command::new("timeout");
            server.args([
                &limit.to_string(),
                "iperf3",
                "-s",
                "-1",
                "-J",
                "-p",
                &port.to_string(),
            ]);
            let server = server.stdin(Stdio::null()).stdout(Stdio::piped()).spawn();
            let server = server.expect("the host has iperf3");
            let client = format!("iperf3 -c {} -p {port} {options}", tap.host_address());
            guest.run_within(LIMIT, &until_listening(&client));
            output(server.wait_with_output())
        }
        Way::ToGuest => {
            guest.in_background(&format!("iperf3 -s -1 -p {port}"));
            let client = format!("iperf3 -J -c {} -p {port} {options}", tap.guest_address(2));
            let mut tries = 0;
            loop {
                // With a report in JSON, iperf3 ends with status 0 when it cannot connect.
                let (_, text) = host::try_run(&client);
                if parse::received(&text).is_some() {
                    break text;
                }
                tries += 1;
                assert!(tries < 20, "iperf3 failed on the host: {text}");
                thread::sleep(Duration::from_millis(100));
            }
        }
    };
    parse::received(&report).unwrap_or_else(|| panic!("iperf3 received nothing: {report}"))
}

/// A shell command that runs `client` until it can connect.
fn until_listening(client: &str) -> String {
    format!(
        "for try in $(seq 20); do {client} > /tmp/iperf && break; sleep 0.1; done; \
         grep -q receiver /tmp/iperf"
    )
}

fn output(output: io::Result<std::process::Output>) -> String {
    let output = output.expect("iperf3 can be waited for");
    String::from_utf8_lossy(&output.stdout).into_owned()
}
