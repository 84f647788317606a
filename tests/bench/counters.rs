//! Measurements on the host: traces, counters of its KVM, memory, transfers.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, thread};

/// Counters of the host's KVM, with a directory for each machine.
const KVM: &str = "/sys/kernel/debug/kvm";
/// Longest wait for the other end of a transfer.
const TRANSFER_LIMIT: Duration = Duration::from_secs(400);

/// A trace of program starts and of entries into guests by this process. Removed when dropped.
pub struct Trace(PathBuf);

impl Trace {
    /// Creates a separate trace that does not run yet.
    pub fn new() -> io::Result<Self> {
        let trace = Self(PathBuf::from(
            "/sys/kernel/tracing/instances/portcullis-bench",
        ));
        fs::create_dir_all(&trace.0)?;
        trace.set("tracing_on", "0")?;
        trace.set("trace_clock", "mono")?;
        // Only the start is needed: a small buffer that keeps its oldest events.
        trace.set("buffer_size_kb", "64")?;
        trace.set("options/overwrite", "0")?;
        trace.set("options/event-fork", "1")?;
        trace.set("set_event_pid", &std::process::id().to_string())?;
        trace.set("events/sched/sched_process_exec/enable", "1")?;
        trace.set("events/kvm/kvm_entry/enable", "1")?;
        Ok(trace)
    }

    fn set(&self, file: &str, value: &str) -> io::Result<()> {
        fs::write(self.0.join(file), value)
            .map_err(|error| io::Error::other(format!("{}: {error}", self.0.join(file).display())))
    }

    /// Clears and starts the trace.
    pub fn start(&self) -> io::Result<()> {
        self.set("trace", "")?;
        self.set("tracing_on", "1")
    }

    /// Stops the trace and returns its text.
    pub fn stop(&self) -> io::Result<String> {
        self.set("tracing_on", "0")?;
        fs::read_to_string(self.0.join("trace"))
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // A failure has no effect: the next trace uses it again.
        let _ = fs::remove_dir(&self.0);
    }
}

/// Directories of the machines in the host's KVM counters.
pub fn machines() -> BTreeSet<PathBuf> {
    let entries = fs::read_dir(KVM).into_iter().flatten().flatten();
    entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect()
}

/// Directory of the machine that is not in `before`.
pub fn new_machine(before: &BTreeSet<PathBuf>) -> Result<PathBuf, String> {
    let now = machines();
    let mut new = now.difference(before);
    match (new.next(), new.next()) {
        (Some(machine), None) => Ok(machine.clone()),
        _ => Err(format!("{KVM} has not one new machine: {now:?}")),
    }
}

/// Counters of a machine, by KVM's names.
pub fn exits(machine: &Path) -> Result<Vec<(String, f64)>, String> {
    let mut counters = Vec::new();
    for name in COUNTERS {
        // The counters depend on the architecture.
        if let Ok(text) = fs::read_to_string(machine.join(name)) {
            let count = text.trim().parse::<u32>();
            let count = count.map_err(|error| format!("{name} is {text:?}: {error}"))?;
            counters.push((name.to_owned(), f64::from(count)));
        }
    }
    Ok(counters)
}

/// Number of exits of a machine so far.
pub fn exits_of(machine: &Path) -> f64 {
    let text = fs::read_to_string(machine.join("exits"));
    let count = text.ok().and_then(|text| text.trim().parse().ok());
    count.expect("KVM counts exits")
}

/// The number of all exits, and of some kinds.
const COUNTERS: [&str; 11] = [
    "exits",
    // x86_64; the first are page faults of guest memory
    "pf_taken",
    "io_exits",
    "mmio_exits",
    "irq_exits",
    "halt_exits",
    // aarch64; faults of guest memory are not counted
    "mmio_exit_user",
    "mmio_exit_kernel",
    "hvc_exit_stat",
    "wfi_exit_stat",
    "wfe_exit_stat",
];

/// Tracing files of the host's kernel.
const TRACING: &str = "/sys/kernel/tracing";
/// The kernel's functions for MISS, UPDATE and INVALIDATE of a vhost IOTLB, by probe.
const IOTLB_PROBES: [(&str, &str); 3] = [
    ("miss", "vhost_iotlb_miss"),
    ("update", "vhost_iotlb_add_range"),
    ("invalidate", "vhost_iotlb_del_range"),
];

/// Probes that count the messages of all vhost IOTLBs. Removed when dropped.
pub struct IotlbProbes(());

impl IotlbProbes {
    /// Sets the probes.
    pub fn new() -> io::Result<Self> {
        let probes = Self(());
        for (name, function) in IOTLB_PROBES {
            tracing("kprobe_events", &format!("p:portcullis/{name} {function}"))?;
        }
        tracing("events/portcullis/enable", "1")?;
        Ok(probes)
    }

    /// Number of misses, updates and invalidations since the probes were set.
    pub fn counts(&self) -> [f64; 3] {
        let profile = fs::read_to_string(Path::new(TRACING).join("kprobe_profile"));
        let profile = profile.expect("probes have a profile");
        IOTLB_PROBES.map(|(name, _)| super::parse::hits(&profile, name).expect("a probe has hits"))
    }
}

impl Drop for IotlbProbes {
    fn drop(&mut self) {
        // A failure shows when they are set again.
        let _ = tracing("events/portcullis/enable", "0");
        let _ = tracing("kprobe_events", "-:portcullis/");
    }
}

/// Events of KVM to count, each with the keys of its histogram. An address is that of a page.
const HISTOGRAMS: &[(&str, &str)] = if cfg!(target_arch = "x86_64") {
    &[
        ("kvm_exit", "exit_reason.hex"),
        ("kvm_pio", "port.hex,rw"),
        ("kvm_mmio", "gpa.buckets=4096,type"),
        ("kvm_msr", "ecx.hex,write"),
        ("kvm_cpuid", "function.hex"),
    ]
} else {
    &[
        ("kvm_exit", "ret,esr_ec.hex"),
        ("kvm_mmio", "gpa.buckets=4096,type"),
    ]
};

/// Histograms of the exits of all machines, by kind and address. Removed when dropped.
pub struct Histograms(());

impl Histograms {
    /// Starts to count.
    pub fn new() -> io::Result<Self> {
        let histograms = Self(());
        for (event, keys) in HISTOGRAMS {
            tracing(
                &format!("events/kvm/{event}/trigger"),
                &format!("hist:keys={keys}"),
            )?;
        }
        Ok(histograms)
    }

    /// Counts so far: event with keys, and number.
    pub fn counts(&self) -> Vec<(String, f64)> {
        let mut counts = Vec::new();
        for (event, _) in HISTOGRAMS {
            let text =
                fs::read_to_string(Path::new(TRACING).join(format!("events/kvm/{event}/hist")));
            let entries = super::parse::histogram(&text.expect("an event has a histogram"));
            let named = entries
                .into_iter()
                .map(|(keys, count)| (format!("{event} {keys}"), count));
            counts.extend(named);
        }
        counts
    }
}

impl Drop for Histograms {
    fn drop(&mut self) {
        // A failure shows when they are started again.
        for (event, keys) in HISTOGRAMS {
            let _ = tracing(
                &format!("events/kvm/{event}/trigger"),
                &format!("!hist:keys={keys}"),
            );
        }
    }
}

/// Appends a line to a tracing file.
fn tracing(file: &str, line: &str) -> io::Result<()> {
    let path = Path::new(TRACING).join(file);
    let mut file = fs::OpenOptions::new().append(true).open(&path)?;
    file.write_all(line.as_bytes()).map_err(|error| {
        // The kernel's reason, for the events that have one.
        let reason = fs::read_to_string(Path::new(TRACING).join("error_log"));
        let reason = reason.unwrap_or_default();
        io::Error::other(format!("{}: {line}: {error} {reason}", path.display()))
    })
}

/// The size of a file in KiB.
pub fn file_kib(path: &Path) -> io::Result<f64> {
    let bytes = fs::metadata(path)?.len();
    Ok(f64::from(u32::try_from(bytes >> 10).unwrap_or(u32::MAX)))
}

/// Reads one connection to its end, on a thread; returns the bytes and the time since its start.
pub fn receive(listener: TcpListener) -> thread::JoinHandle<io::Result<(usize, Duration)>> {
    thread::spawn(move || {
        let (mut stream, _) = listener.accept()?;
        let started = Instant::now();
        stream.set_read_timeout(Some(TRANSFER_LIMIT))?;
        let mut buffer = vec![0; 1 << 18];
        let mut bytes = 0;
        loop {
            match stream.read(&mut buffer)? {
                0 => return Ok((bytes, started.elapsed())),
                count => bytes += count,
            }
        }
    })
}

/// Sends `bytes` on a thread, to a listener that may start later; returns the time until it has
/// closed the connection.
pub fn send(to: String, bytes: usize) -> thread::JoinHandle<io::Result<Duration>> {
    thread::spawn(move || {
        let deadline = Instant::now() + TRANSFER_LIMIT;
        let mut stream = loop {
            match TcpStream::connect(&to) {
                Ok(stream) => break stream,
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        };
        let started = Instant::now();
        stream.set_read_timeout(Some(TRANSFER_LIMIT))?;
        stream.set_write_timeout(Some(TRANSFER_LIMIT))?;
        stream.write_all(&vec![0; bytes])?;
        stream.shutdown(Shutdown::Write)?;
        stream.read_exact(&mut [0]).map_or_else(
            |error| match error.kind() {
                io::ErrorKind::UnexpectedEof => Ok(started.elapsed()),
                _ => Err(error),
            },
            |()| Err(io::Error::other("the guest answered")),
        )
    })
}
