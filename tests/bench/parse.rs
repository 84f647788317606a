//! Parsers of the host kernel's reports about a running machine, and formatting of numbers.
//!
//! A part of the benchmark program; `tests/bench_parse.rs` tests it.

/// Milliseconds from the exec of `program` to the next entry into a guest, in a trace of
/// `sched_process_exec` and `kvm_entry` with a clock in seconds.
pub fn first_run_ms(trace: &str, program: &str) -> Option<f64> {
    let mut lines = trace.lines();
    let executed = lines.find_map(|line| {
        let (head, fields) = line.split_once(": sched_process_exec: ")?;
        let filename = fields
            .split_whitespace()
            .next()?
            .strip_prefix("filename=")?;
        (filename == program).then(|| seconds(head))?
    })?;
    let entered = lines.find_map(|line| seconds(line.split_once(": kvm_entry: ")?.0))?;
    Some((entered - executed) * 1000.0)
}

/// The time in `portcullis-812   [000] d..1.   41.250000`.
fn seconds(head: &str) -> Option<f64> {
    head.split_whitespace().next_back()?.parse().ok()
}

/// Memory of a process in KiB.
#[derive(Debug, Default, PartialEq)]
pub struct ProcessMemory {
    /// Proportional set size: shared pages are divided among their processes.
    pub pss: u32,
    /// Pages of this process only.
    pub private: u32,
}

/// Sums `/proc/PID/smaps` over all mappings smaller than the guest's RAM, which is one mapping of
/// at least `guest_kib`. `None` if there is no such mapping.
pub fn beyond_guest_ram(smaps: &str, guest_kib: u32) -> Option<ProcessMemory> {
    let mut memory = ProcessMemory::default();
    let (mut is_guest, mut found) = (false, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(Ok(kib))) = (words.next(), words.next().map(str::parse::<u32>))
        else {
            continue;
        };
        match name {
            // The second line of each mapping.
            "Size:" => {
                is_guest = kib >= guest_kib;
                found |= is_guest;
            }
            _ if is_guest => {}
            "Pss:" => memory.pss += kib,
            "Private_Clean:" | "Private_Dirty:" => memory.private += kib,
            _ => {}
        }
    }
    found.then_some(memory)
}

/// Data that a receiver got.
#[derive(Debug, PartialEq)]
pub struct Received {
    /// Bytes of payload.
    pub bytes: f64,
    /// Time of the transfer.
    pub seconds: f64,
}

impl Received {
    /// Packets of 1400 bytes.
    pub fn packets(&self) -> f64 {
        self.bytes / 1400.0
    }

    /// Amount in MiB.
    pub fn mebibytes(&self) -> f64 {
        self.bytes / f64::from(1 << 20)
    }

    /// Throughput in 10^6 bits per second.
    pub fn megabits_per_second(&self) -> f64 {
        8e-6 * self.bytes / self.seconds
    }
}

/// The receiver's sums in a report of iperf3 in JSON. `None` if nothing was received.
pub fn received(report: &str) -> Option<Received> {
    let report: serde_json::Value = serde_json::from_str(report).ok()?;
    let sum = &report["end"]["sum_received"];
    let received = Received {
        bytes: sum["bytes"].as_f64()?,
        seconds: sum["seconds"].as_f64()?,
    };
    (received.bytes > 0.0 && received.seconds > 0.0).then_some(received)
}

/// Hits of a probe in the kernel's `kprobe_profile`: lines of a name, hits and misses.
pub fn hits(profile: &str, probe: &str) -> Option<f64> {
    profile.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next()? == probe).then(|| words.next()?.parse().ok())?
    })
}

/// Upper bound on the entries of a histogram.
const ENTRIES: usize = 10;

/// The greatest entries of a kernel histogram, in descending order: their keys and hits.
pub fn histogram(text: &str) -> Vec<(String, f64)> {
    let mut entries: Vec<_> = text
        .lines()
        .filter_map(|line| {
            let (keys, hits) = line.strip_prefix('{')?.split_once("} hitcount:")?;
            let words: Vec<_> = keys.split_whitespace().collect();
            Some((words.join(" "), hits.trim().parse().ok()?))
        })
        .collect();
    entries.sort_by(|(_, one): &(_, f64), (_, other)| other.total_cmp(one));
    entries.truncate(ENTRIES);
    entries
}

/// The median, the least and the greatest of the values.
pub fn spread(mut values: Vec<f64>) -> Option<[f64; 3]> {
    values.sort_by(f64::total_cmp);
    let (least, greatest) = (*values.first()?, *values.last()?);
    let half = values.len() / 2;
    let median = match values.len() % 2 {
        0 => f64::midpoint(values[half - 1], values[half]),
        _ => values[half],
    };
    Some([median, least, greatest])
}

/// Formats a number with its significant decimals.
pub fn number(value: f64) -> String {
    if value.fract() == 0.0 || value.abs() >= 1000.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}
