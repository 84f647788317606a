//! Start of a monitor and of its guest: times, exits, memory.

use std::fs;
use std::time::Instant;

use super::counters::{self, Histograms, Trace};
use super::monitor::{GUEST_MIB, MAC, Monitor, plain};
use super::parse::{self, number, spread};
use super::support::host::{self, Tap};
use super::support::{Guest, Machine, PROMPT, READY, TempDir, checks};
use super::{attempt, figure, row};

const HEADER: &str = "| machine | monitor | what | median | least | greatest | boots |";
/// Measurements of every start.
const FIRST_RUN: &str = "exec to the first KVM_RUN, ms";
const EXITS: &str = "to init: exits";
/// Number of boots for a median.
const BOOTS: u32 = 5;
/// Message of the guest's first program.
const INIT: &str = "bench: init";
/// Runs a shell as the first program, which prints [`INIT`] and continues with the usual one.
const FIRST_PROGRAM: &str = "rdinit=/bin/busybox -- sh -c \"echo bench: init; exec /init\"";

/// Boots a machine with all devices or without any a few times, and prints rows and figures of it.
/// Only portcullis has the machine with devices. False if a measurement is missing.
pub fn measure(name: &str, devices: bool, monitors: &[Monitor]) -> bool {
    let trace = Trace::new();
    if let Err(error) = &trace {
        println!("no trace, so no time to the first KVM_RUN: {error}");
    }
    let mut complete = true;
    for monitor in &monitors[..if devices { 1 } else { monitors.len() }] {
        let mut values: Vec<(String, Vec<f64>)> = Vec::new();
        for boot in 1..=BOOTS {
            println!("{name}: {}, boot {boot} of {BOOTS}", monitor.name());
            match attempt(|| one_boot(*monitor, trace.as_ref().ok(), devices)) {
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
        complete &= print(name, *monitor, values);
        println!(
            "{name}: {}, a boot with its exits by kind and address",
            monitor.name()
        );
        match attempt(|| exits_of_boot(*monitor, devices)) {
            Ok(exits) => {
                for (kind, count) in exits {
                    figure(name, &format!("to drivers ready: {kind}"), *monitor, count);
                }
            }
            Err(reason) => {
                println!("{name}: exits {reason}");
                complete = false;
            }
        }
    }
    complete
}

/// Boots and powers off; returns the exits until the drivers are ready, by kind and address.
fn exits_of_boot(monitor: Monitor, devices: bool) -> Vec<(String, f64)> {
    let devices = devices.then(Devices::new);
    let histograms = Histograms::new().expect("KVM's events have histograms");
    let mut guest = start(monitor, devices.as_ref());
    guest.wait_for(READY);
    let counts = histograms.counts();
    drop(histograms);
    guest.wait_for(PROMPT);
    checks::power_off(guest);
    counts
}

/// Prints the values of all boots. False if one is missing.
fn print(name: &str, monitor: Monitor, values: Vec<(String, Vec<f64>)>) -> bool {
    let mut complete = true;
    for what in [FIRST_RUN, EXITS] {
        if values.iter().all(|(known, _)| known != what) {
            let reason = "not measured: see above for why";
            row(HEADER, &[name, monitor.name(), what, reason]);
            complete = false;
        }
    }
    for (what, values) in values {
        let boots = values.len().to_string();
        if let Some(spread) = spread(values) {
            figure(name, &what, monitor, spread[0]);
            let [median, least, greatest] = spread.map(number);
            let cells = [
                name,
                monitor.name(),
                &what,
                &median,
                &least,
                &greatest,
                &boots,
            ];
            row(HEADER, &cells);
        }
    }
    complete
}

/// The host's resources for all devices.
struct Devices {
    tap: Tap,
    scratch: TempDir,
}

impl Devices {
    fn new() -> Self {
        Self {
            tap: Tap::create("pcbench0", 1, 30),
            scratch: TempDir::new("bench"),
        }
    }

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
fn one_boot(monitor: Monitor, trace: Option<&Trace>, devices: bool) -> Vec<(String, f64)> {
    let devices = devices.then(Devices::new);
    let mut measured = Vec::new();
    let before = counters::machines();
    if let Some(trace) = trace {
        trace.start().expect("a trace can be started");
    }
    let started = Instant::now();
    let mut guest = start(monitor, devices.as_ref());
    guest.wait_for(INIT);
    let init = started.elapsed();
    let machine = counters::new_machine(&before);
    let at_init = machine
        .clone()
        .and_then(|machine| counters::exits(&machine));
    guest.wait_for(READY);
    let ready = started.elapsed();
    let at_ready = machine.and_then(|machine| counters::exits(&machine));
    if let Some(trace) = trace {
        let text = trace.stop().expect("a trace can be read");
        match parse::first_run_ms(&text, &monitor.program()) {
            Some(ms) => measured.push((FIRST_RUN.to_owned(), ms)),
            None => {
                let head: Vec<_> = text.lines().take(30).collect();
                println!("the trace has no exec and entry:\n{}", head.join("\n"));
            }
        }
    }
    for (until, time, exits) in [("init", init, at_init), ("drivers ready", ready, at_ready)] {
        measured.push((format!("start to {until}, ms"), time.as_secs_f64() * 1000.0));
        match exits {
            Ok(exits) => {
                let named = |(name, count)| (format!("to {until}: {name}"), count);
                measured.extend(exits.into_iter().map(named));
            }
            Err(reason) => println!("no exits counted: {reason}"),
        }
    }
    guest.wait_for(PROMPT);
    measured.extend(memory(monitor, &guest));
    checks::power_off(guest);
    measured
}

fn start(monitor: Monitor, devices: Option<&Devices>) -> Guest {
    match devices {
        Some(devices) => devices.add_to(plain(FIRST_PROGRAM)).launch(),
        None => monitor.launch_alone(FIRST_PROGRAM),
    }
}

/// Memory of the monitor and size of its program.
fn memory(monitor: Monitor, guest: &Guest) -> Vec<(String, f64)> {
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", guest.process_id()));
    let smaps = smaps.expect("the memory map of a child can be read");
    let resident = parse::beyond_guest_ram(&smaps, GUEST_MIB << 10);
    let resident = resident.expect("one of the mappings is the guest's RAM");
    let mut values = vec![
        ("beyond guest RAM: Pss, KiB".to_owned(), resident.pss.into()),
        (
            "beyond guest RAM: private, KiB".to_owned(),
            resident.private.into(),
        ),
    ];
    if monitor == Monitor::Portcullis {
        let program = counters::file_kib(monitor.program().as_ref());
        let program = program.expect("the program is a file");
        values.push(("size of the program, KiB".to_owned(), program));
    }
    values
}
