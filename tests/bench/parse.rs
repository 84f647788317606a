//! What the host's kernel says of a running machine, read; and numbers, written.
//!
//! A part of the benchmark program; `tests/bench_parse.rs` tests it.

/// Milliseconds from the exec of `program` to the first entry into a guest after it, in a trace
/// of `sched_process_exec` and `kvm_entry` by a clock in seconds.
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
pub struct Resident {
    /// Pages that it shares with others are divided among them.
    pub pss: u32,
    /// Only pages that no other process has.
    pub private: u32,
}

/// What `/proc/PID/smaps` counts in all mappings smaller than the guest's RAM, which is one
/// mapping of `guest_kib` at least. `None` if there is no such mapping.
pub fn beyond_guest_ram(smaps: &str, guest_kib: u32) -> Option<Resident> {
    let mut resident = Resident::default();
    let (mut is_guest, mut found) = (false, false);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(name), Some(Ok(kib))) = (words.next(), words.next().map(str::parse::<u32>))
        else {
            continue;
        };
        match name {
            // The first line of each mapping but for its addresses.
            "Size:" => {
                is_guest = kib >= guest_kib;
                found |= is_guest;
            }
            _ if is_guest => {}
            "Pss:" => resident.pss += kib,
            "Private_Clean:" | "Private_Dirty:" => resident.private += kib,
            _ => {}
        }
    }
    found.then_some(resident)
}

/// The median, the least and the greatest.
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

/// A number with as many decimals as say something.
pub fn number(value: f64) -> String {
    if value.fract() == 0.0 || value.abs() >= 1000.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}
