//! The benchmark program: `cargo xtask bench` builds and runs it, and prints its tables.
//!
//! `bench [--peer] [--done=NAME]... [PART...]` runs the measurements with one of the parts in their
//! names (without parts all), except those that are done; with `--peer` also of QEMU. It prints
//! `== begin NAME`, `== done NAME`, `== figure NAME | FIGURE | MONITOR | VALUE`, and `== row HEADER`
//! before each row of a table. After a failure the other measurements still run; the exit status is
//! then 1.

mod counters;
mod iotlb;
mod monitor;
mod parse;
mod start_up;
#[path = "../support/mod.rs"]
mod support;
mod traffic;

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

use monitor::Monitor;

enum Measurement {
    /// A boot, with all devices or without any.
    StartUp { devices: bool },
    /// Messages of the IOTLB, or a stream without an IOMMU.
    Iotlb {
        option: &'static str,
        passthrough: bool,
    },
    /// Throughput of all monitors, with this on the guest's command line.
    Traffic {
        iommu: &'static str,
        cmdline: &'static str,
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
        let traffic = |passthrough| Measurement::Iotlb {
            option,
            passthrough,
        };
        all.push((format!("iotlb:{option}"), traffic(false)));
        if matches!(option, "virtio-iommu" | "smmuv3,ats=on") {
            all.push((format!("iotlb:{option}:identity"), traffic(true)));
        }
    }
    let smmu = cfg!(target_arch = "aarch64").then_some("smmuv3");
    let none = Measurement::Traffic {
        iommu: "none",
        cmdline: "",
    };
    all.push(("traffic:none".to_owned(), none));
    for iommu in ["virtio-iommu"].into_iter().chain(smmu) {
        for (mode, cmdline) in MODES {
            let traffic = Measurement::Traffic { iommu, cmdline };
            all.push((format!("traffic:{iommu}:{mode}"), traffic));
        }
    }
    all
}

/// Modes of a guest's IOMMU, and its command line for them.
const MODES: [(&str, &str); 3] = [
    ("strict", "iommu.strict=1"),
    ("lazy", "iommu.strict=0"),
    ("identity", "iommu.passthrough=1"),
];

fn main() -> ExitCode {
    let (options, parts): (Vec<String>, Vec<String>) = std::env::args()
        .skip(1)
        .partition(|word| word.starts_with("--"));
    let done: Vec<_> = options
        .iter()
        .filter_map(|word| word.strip_prefix("--done="))
        .collect();
    let mut monitors = vec![Monitor::Portcullis];
    if options.iter().any(|word| word == "--peer") {
        monitors.push(Monitor::Qemu);
    }
    let mut wanted = measurements();
    let all: Vec<_> = wanted.iter().map(|(name, _)| name.clone()).collect();
    wanted.retain(|(name, _)| {
        let asked = parts.is_empty() || parts.iter().any(|part| name.contains(part.as_str()));
        asked && !done.contains(&name.as_str())
    });
    if wanted.is_empty() {
        eprintln!("bench: nothing to measure; there are: {}", all.join(", "));
        return ExitCode::from(2);
    }
    let mut iotlb = iotlb::Session::default();
    let mut complete = true;
    for (name, measurement) in &wanted {
        println!("== begin {name}");
        complete &= match measurement {
            Measurement::StartUp { devices } => start_up::measure(name, *devices, &monitors),
            Measurement::Iotlb {
                option,
                passthrough,
            } => iotlb.measure(option, *passthrough),
            Measurement::Traffic { iommu, cmdline } => traffic(name, iommu, cmdline, &monitors),
        };
        println!("== done {name}");
    }
    ExitCode::from(u8::from(!complete))
}

/// Measures the monitors one after the other. False if one fails.
fn traffic(name: &str, iommu: &str, cmdline: &str, monitors: &[Monitor]) -> bool {
    let mut complete = true;
    for monitor in monitors {
        println!("{name}: {}", monitor.name());
        match attempt(|| traffic::measure(*monitor, iommu, cmdline)) {
            Ok(figures) => {
                for (what, value) in figures {
                    figure(name, &what, *monitor, value);
                }
            }
            Err(reason) => {
                println!("{name}: {} {reason}", monitor.name());
                complete = false;
            }
        }
    }
    complete
}

/// Prints a figure of the measurement `name`; `what` ends with the unit.
fn figure(name: &str, what: &str, monitor: Monitor, value: f64) {
    println!("== figure {name} | {what} | {} | {value}", monitor.name());
}

/// Prints a row of the table with this header.
fn row(header: &str, cells: &[&str]) {
    println!("== row {header}");
    println!("| {} |", cells.join(" | "));
}

/// Calls `work`; a panic becomes an error with its message in one line.
fn attempt<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(work)).map_err(|panic| {
        let reason = first_line(&*panic);
        let reason = reason.trim_end_matches("; its console:").replace('|', "/");
        format!("not measured: {reason}")
    })
}

/// The first line of a panic's message.
fn first_line(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
    let line = text.and_then(|text| text.lines().next());
    line.unwrap_or("a panic").to_owned()
}
