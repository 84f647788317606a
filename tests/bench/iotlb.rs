//! Messages of the vhost IOTLB for one TCP stream each way, from the API of portcullis.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use vmm::action::EndpointCounters;

use super::counters;
use super::monitor::{MAC, plain};
use super::parse::number;
use super::support::host::Tap;
use super::support::iommu::Api;
use super::support::{Guest, checks};
use super::{attempt, row};

const HEADER: &str = "| IOMMU | guest's mode | registered for | direction | MISS | UPDATE | of them ahead | \
                      INVALIDATE | saved | MISS in all | MiB/s | share |";
/// MiB sent in each direction.
const MEBIBYTES: u32 = 8;
const LIMIT: Duration = Duration::from_secs(400);

/// Results of the machine without an IOMMU, which is measured first.
#[derive(Default)]
pub struct Session {
    /// MiB/s to the host and to the guest.
    without: Option<[f64; 2]>,
    tried_without: bool,
}

impl Session {
    /// Measures a machine and prints its rows. False if it fails.
    pub fn measure(&mut self, option: &str, passthrough: bool) -> bool {
        let without = self.tried_without || self.traffic("none", false);
        self.tried_without = true;
        let measured = option == "none" || self.traffic(option, passthrough);
        without && measured
    }

    fn traffic(&mut self, option: &str, passthrough: bool) -> bool {
        let mode = match (option, passthrough) {
            ("none", _) => "-",
            (_, false) => "iommu.strict=1",
            (_, true) => "iommu.passthrough=1",
        };
        let measured = match attempt(|| both_ways(option, mode)) {
            Ok(measured) => measured,
            Err(reason) => {
                row(HEADER, &[option, mode, &reason]);
                return false;
            }
        };
        let speeds = [measured[0].speed(), measured[1].speed()];
        if option == "none" {
            self.without = Some(speeds);
        }
        for (at, way) in measured.iter().enumerate() {
            let direction = ["to the host", "to the guest"][at];
            let share = self.without.map_or("not measured".to_owned(), |without| {
                format!("{:.0} %", 100.0 * speeds[at] / without[at])
            });
            let counted = way
                .counted
                .map(|count| count.map_or("-".to_owned(), number));
            let mut cells = vec![option, mode, &way.registered, direction];
            cells.extend(counted.iter().map(String::as_str));
            let speed = format!("{:.2}", speeds[at]);
            cells.extend([speed.as_str(), &share]);
            row(HEADER, &cells);
        }
        true
    }
}

/// Traffic in one direction.
struct Direction {
    time: Duration,
    /// Registration of the back end.
    registered: String,
    /// Per MiB: misses, updates, prefills, invalidations sent and saved. The last one: all misses
    /// since the boot.
    counted: [Option<f64>; 6],
}

impl Direction {
    fn speed(&self) -> f64 {
        f64::from(MEBIBYTES) / self.time.as_secs_f64()
    }
}

/// Boots with one network device and sends to the host and to the guest.
fn both_ways(option: &str, mode: &str) -> [Direction; 2] {
    let tap = Tap::create("pcbench0", 1, 30);
    let api = Api::new("bench");
    let machine = plain(mode.trim_start_matches('-'))
        .tools()
        .with("--iommu", option)
        .with("--net", format!("tap={},id=net0,mac={MAC}", tap.name));
    println!("booting with --iommu {option}");
    let mut guest = api.serve(machine).boot();
    checks::hush(&mut guest);
    let interface = checks::interface(&mut guest, MAC);
    checks::bring_up(&mut guest, &interface, &tap, 2);
    let ways = [send_to_host, send_to_guest].map(|send| {
        let before = (option != "none").then(|| api.endpoint("net0").counters);
        println!("sending {MEBIBYTES} MiB");
        let time = send(&mut guest, &tap);
        let Some(before) = before else {
            return Direction {
                time,
                registered: "-".to_owned(),
                counted: [None; 6],
            };
        };
        let after = api.endpoint("net0");
        let kind = after.registration.map(|found| found.kind.to_string());
        Direction {
            time,
            registered: kind.unwrap_or_else(|| "nothing".to_owned()),
            counted: counted(&before, &after.counters).map(Some),
        }
    });
    checks::power_off(guest);
    ways
}

fn counted(before: &EndpointCounters, after: &EndpointCounters) -> [f64; 6] {
    let per_mib = |before: u64, after: u64| {
        let count = u32::try_from(after - before).expect("a count of few MiB");
        f64::from(count) / f64::from(MEBIBYTES)
    };
    let all = u32::try_from(after.misses).expect("a count of few MiB");
    [
        per_mib(before.misses, after.misses),
        per_mib(before.updates, after.updates),
        per_mib(before.prefills, after.prefills),
        per_mib(before.invalidations_sent, after.invalidations_sent),
        per_mib(before.invalidations_saved, after.invalidations_saved),
        f64::from(all),
    ]
}

const BYTES: usize = (MEBIBYTES as usize) << 20;

fn send_to_host(guest: &mut Guest, tap: &Tap) -> Duration {
    let peer = tap.host_address();
    let listener = TcpListener::bind((peer.as_str(), 0)).expect("the host can listen");
    let port = listener.local_addr().expect("it has an address").port();
    let receiver = counters::receive(listener);
    guest.run_within(
        LIMIT,
        &format!("socat -u -b262144 OPEN:/dev/zero,readbytes={BYTES} TCP:{peer}:{port}"),
    );
    let received = receiver.join().expect("the receiver does not panic");
    let (bytes, time) = received.expect("the guest's stream can be read to its end");
    assert_eq!(bytes, BYTES, "bytes that came to the host");
    time
}

fn send_to_guest(guest: &mut Guest, tap: &Tap) -> Duration {
    // A port for each transfer: a sender whose guest has died continues for a while.
    static PORT: AtomicU16 = AtomicU16::new(6000);
    let port = PORT.fetch_add(1, Ordering::Relaxed);
    let sender = counters::send(format!("{}:{port}", tap.guest_address(2)), BYTES);
    let count = guest.run_within(
        LIMIT,
        &format!("socat -u -b262144 TCP-LISTEN:{port},reuseaddr - | wc -c"),
    );
    assert_eq!(count, BYTES.to_string(), "bytes that came to the guest");
    let sent = sender.join().expect("the sender does not panic");
    sent.expect("the stream can be sent to its end")
}
