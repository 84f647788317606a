//! The benchmark program: `cargo xtask bench` builds and runs it, and prints its tables.
//!
//! `bench [--done=NAME]... [PART...]` runs the measurements with one of the parts in their names
//! (without parts all), except those that are done. It prints `== begin NAME`, `== done NAME`, and
//! `== row HEADER` before each row of a table. After a failure the other measurements still run;
//! the exit status is then 1.

mod counters;
mod parse;
#[path = "../support/mod.rs"]
mod support;

use std::any::Any;
use std::fs;
use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use counters::Trace;
use parse::{number, spread};
use support::host::{self, Tap};
use support::iommu::Api;
use support::{Guest, Machine, PROMPT, READY, TempDir, checks, portcullis};
use vmm::action::EndpointCounters;

const START_UP: &str = "| machine | what | median | least | greatest | boots |";
const IOTLB: &str = "| IOMMU | guest's mode | registered for | direction | MISS | UPDATE | of them ahead | \
                     INVALIDATE | saved | MISS in all | MiB/s | share |";
/// Measurements of every start.
const FIRST_RUN: &str = "exec to the first KVM_RUN, ms";
const EXITS: &str = "to init: exits";
/// Number of boots for a median.
const BOOTS: u32 = 5;
/// Memory of the machines, in MiB.
const GUEST_MIB: u32 = 512;
/// MiB sent in each direction.
const MEBIBYTES: u32 = 8;
const LIMIT: Duration = Duration::from_secs(400);
const MAC: &str = "06:00:ac:10:00:02";

enum Measurement {
    /// A boot, with all devices or without any.
    StartUp { devices: bool },
    /// Traffic behind an IOMMU, or without one.
    Traffic {
        option: &'static str,
        passthrough: bool,
    },
}

fn measurements() -> Vec<(String, Measurement)> {
    let mut all = Vec::new();
    for (name, devices) in [("start-up", false), ("start-up-devices", true)] {
        all.push((name.to_owned(), Measurement::StartUp { devices }));
    }
    let mut options = vec![
        "none",
        "virtio-iommu",
        "virtio-iommu,prefill=off",
        "virtio-iommu,prefill=off,prefetch=off",
    ];
    if cfg!(target_arch = "aarch64") {
        options.extend([
            "smmuv3,ats=on",
            "smmuv3,ats=on,prefetch=off",
            "smmuv3,ats=off",
            "smmuv3,ats=off,prefetch=off",
        ]);
    }
    for option in options {
        let traffic = |passthrough| Measurement::Traffic {
            option,
            passthrough,
        };
        all.push((format!("iotlb:{option}"), traffic(false)));
        if matches!(option, "virtio-iommu" | "smmuv3,ats=on") {
            all.push((format!("iotlb:{option}:identity"), traffic(true)));
        }
    }
    all
}

fn main() -> ExitCode {
    let (done, parts): (Vec<String>, Vec<String>) = std::env::args()
        .skip(1)
        .partition(|word| word.starts_with("--done="));
    let mut wanted = measurements();
    let all: Vec<_> = wanted.iter().map(|(name, _)| name.clone()).collect();
    wanted.retain(|(name, _)| {
        let asked = parts.is_empty() || parts.iter().any(|part| name.contains(part.as_str()));
        asked
            && !done
                .iter()
                .any(|word| word.strip_prefix("--done=") == Some(name))
    });
    if wanted.is_empty() {
        eprintln!("bench: nothing to measure; there are: {}", all.join(", "));
        return ExitCode::from(2);
    }
    let mut session = Session::default();
    for (name, measurement) in &wanted {
        println!("== begin {name}");
        session.measure(name, measurement);
        println!("== done {name}");
    }
    ExitCode::from(u8::from(session.failed))
}

/// Prints a row of the table with this header.
fn row(header: &str, cells: &[&str]) {
    println!("== row {header}");
    println!("| {} |", cells.join(" | "));
}

/// Results of one run of this program.
#[derive(Default)]
struct Session {
    /// MiB/s without an IOMMU, to the host and to the guest.
    without: Option<[f64; 2]>,
    tried_without: bool,
    failed: bool,
}

impl Session {
    fn measure(&mut self, name: &str, measurement: &Measurement) {
        match measurement {
            Measurement::StartUp { devices } => self.start_up(name, *devices),
            Measurement::Traffic {
                option,
                passthrough,
            } => {
                if !self.tried_without {
                    self.tried_without = true;
                    self.traffic("none", false);
                }
                if *option != "none" {
                    self.traffic(option, *passthrough);
                }
            }
        }
    }

    /// Calls `work`; a panic becomes an error with its message in one line.
    fn attempt<T>(&mut self, work: impl FnOnce() -> T) -> Result<T, String> {
        catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
            self.failed = true;
            let reason = first_line(&*panic);
            let reason = reason.trim_end_matches("; its console:").replace('|', "/");
            format!("not measured: {reason}")
        })
    }

    fn start_up(&mut self, name: &str, devices: bool) {
        let trace = Trace::new();
        if let Err(error) = &trace {
            println!("no trace, so no time to the first KVM_RUN: {error}");
        }
        let mut values: Vec<(String, Vec<f64>)> = Vec::new();
        for boot in 1..=BOOTS {
            println!("{name}: boot {boot} of {BOOTS}");
            match self.attempt(|| one_boot(trace.as_ref().ok(), devices)) {
                Ok(measured) => {
                    for (what, value) in measured {
                        match values.iter_mut().find(|(known, _)| *known == what) {
                            Some((_, values)) => values.push(value),
                            None => values.push((what, vec![value])),
                        }
                    }
                }
                Err(reason) => println!("{name}: boot {boot} {reason}"),
            }
        }
        for what in [FIRST_RUN, EXITS] {
            if values.iter().all(|(known, _)| known != what) {
                row(START_UP, &[name, what, "not measured: see above for why"]);
                self.failed = true;
            }
        }
        for (what, values) in values {
            let boots = values.len().to_string();
            if let Some(spread) = spread(values) {
                let [median, least, greatest] = spread.map(number);
                row(START_UP, &[name, &what, &median, &least, &greatest, &boots]);
            }
        }
    }

    fn traffic(&mut self, option: &'static str, passthrough: bool) {
        let mode = match (option, passthrough) {
            ("none", _) => "-",
            (_, false) => "iommu.strict=1",
            (_, true) => "iommu.passthrough=1",
        };
        let measured = match self.attempt(|| both_ways(option, mode)) {
            Ok(measured) => measured,
            Err(reason) => return row(IOTLB, &[option, mode, &reason]),
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
            row(IOTLB, &cells);
        }
    }
}

/// The first line of a panic's message.
fn first_line(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    let line = text.and_then(|text| text.lines().next());
    line.unwrap_or("a panic").to_owned()
}

/// The host's resources for all devices.
struct Devices {
    tap: Tap,
    scratch: TempDir,
}

impl Devices {
    fn add_to(&self, machine: Machine) -> Machine {
        let disk = self.scratch.path("disk");
        host::sparse(&disk, 64);
        machine
            .with("--iommu", "virtio-iommu")
            .with("--net", format!("tap={},mac={MAC}", self.tap.name))
            .with("--vsock", "cid=9")
            .with("--disk", format!("path={disk}"))
            .flag("--rng")
    }
}

/// Boots to the shell and powers off; returns the measurements, by name and unit.
fn one_boot(trace: Option<&Trace>, devices: bool) -> Vec<(String, f64)> {
    let devices = devices.then(|| Devices {
        tap: Tap::create("pcbench0", 1, 30),
        scratch: TempDir::new("bench"),
    });
    let mut machine = Machine::new()
        .cmdline("")
        .with("--memory", format!("{GUEST_MIB}M"));
    if let Some(devices) = &devices {
        machine = devices.add_to(machine);
    }
    let mut measured = Vec::new();
    let before = counters::machines();
    if let Some(trace) = trace {
        trace.start().expect("a trace can be started");
    }
    let started = Instant::now();
    let mut guest = machine.launch();
    guest.wait_for(READY);
    let ready = started.elapsed();
    let exits = counters::exits(&before);
    if let Some(trace) = trace {
        let text = trace.stop().expect("a trace can be read");
        let program = portcullis().display().to_string();
        match parse::first_run_ms(&text, &program) {
            Some(ms) => measured.push((FIRST_RUN.to_owned(), ms)),
            None => {
                let head: Vec<_> = text.lines().take(30).collect();
                println!("the trace has no exec and entry:\n{}", head.join("\n"));
            }
        }
    }
    measured.push(("start to init, ms".to_owned(), ready.as_secs_f64() * 1000.0));
    match exits {
        Ok(exits) => {
            let named = |(name, count)| (format!("to init: {name}"), count);
            measured.extend(exits.into_iter().map(named));
        }
        Err(reason) => println!("no exits counted: {reason}"),
    }
    guest.wait_for(PROMPT);
    measured.extend(memory(&guest));
    checks::power_off(guest);
    measured
}

/// Memory of the monitor and size of its program.
fn memory(guest: &Guest) -> Vec<(String, f64)> {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", guest.process_id()));
    let smaps = smaps.expect("the memory map of a child can be read");
    let resident = parse::beyond_guest_ram(&smaps, GUEST_MIB << 10);
    let resident = resident.expect("one of the mappings is the guest's RAM");
    let program = counters::file_kib(&portcullis()).expect("the program is a file");
    vec![
        ("beyond guest RAM: Pss, KiB".to_owned(), resident.pss.into()),
        (
            "beyond guest RAM: private, KiB".to_owned(),
            resident.private.into(),
        ),
        ("size of the program, KiB".to_owned(), program),
    ]
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
    let machine = Machine::new()
        .tools()
        .cmdline(mode.trim_start_matches('-'))
        .with("--iommu", option)
        .with("--memory", format!("{GUEST_MIB}M"))
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
