//! A drawing of an endpoint's IOVA space: one strip for the whole, one line for each run of
//! mappings, and the holes between them.

use super::show::size;
use std::fmt::Write as _;
use vmm::action::{EndpointInfo, EndpointState, Hex, Mapping, Permissions};

/// Number of cells of the strip.
const CELLS: u64 = 64;

/// Upper bound on the runs that are listed.
const MAX_RUNS: usize = 48;

/// Width of the bars, in cells.
const BAR: usize = 24;

/// Adjacent mappings with the same permissions.
#[derive(Clone, Copy)]
struct Run {
    start: u64,
    /// Last IOVA, inclusive.
    end: u64,
    target: u64,
    /// The guest physical addresses are contiguous too.
    straight: bool,
    permissions: Permissions,
    mmio: bool,
    mappings: usize,
}

impl Run {
    /// Length in bytes; a run over all of 2^64 is one byte short.
    fn bytes(&self) -> u64 {
        (self.end - self.start).saturating_add(1)
    }
}

/// Draws `mappings`, in ascending order of IOVA. With `rest`, more mappings may exist above that
/// address.
pub fn draw(endpoint: &EndpointInfo, mappings: &[Mapping], rest: Option<Hex>) -> String {
    let mut text = format!(
        "{}  {} {}  stream {:#x}  {}\n",
        endpoint.id, endpoint.device, endpoint.pci_address, endpoint.stream_id, endpoint.state
    );
    let runs = runs(mappings);
    let not_listed = rest.map_or(String::new(), |rest| {
        format!("mappings above {rest} are not listed\n")
    });
    let Some(last) = runs.last() else {
        if let Some(rest) = rest {
            let _ = write!(text, "nothing is mapped up to {rest}\n{not_listed}");
            return text;
        }
        text.push_str(match endpoint.state {
            EndpointState::Translated => "nothing is mapped: every access faults\n",
            EndpointState::Blocked => "every access faults\n",
            EndpointState::Bypass | EndpointState::Direct => {
                "accesses are not translated: IOVA = guest physical address\n"
            }
        });
        return text;
    };
    let mapped = runs
        .iter()
        .fold(0u64, |sum, run| sum.saturating_add(run.bytes()));
    let at_least = if rest.is_some() { "at least " } else { "" };
    let _ = writeln!(
        text,
        "{at_least}{} mappings, {at_least}{} mapped, {} runs\n",
        mappings.len(),
        size(mapped),
        runs.len()
    );
    text.push_str(&strip(&runs, last.end));
    text.push('\n');
    let largest = runs.iter().map(Run::bytes).max().unwrap_or(1);
    let mut next = 0u64;
    for run in runs.iter().take(MAX_RUNS) {
        if run.start > next {
            let _ = writeln!(text, "  {:>18}  · {}", "", size(run.start - next));
        }
        let _ = writeln!(text, "  {}", line(run, largest));
        next = run.end.saturating_add(1);
    }
    if runs.len() > MAX_RUNS {
        let _ = writeln!(text, "  … and {} more runs", runs.len() - MAX_RUNS);
    }
    text.push_str(&not_listed);
    text
}

fn runs(mappings: &[Mapping]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for mapping in mappings {
        let Mapping {
            start: Hex(start),
            end: Hex(end),
            target: Hex(target),
            ..
        } = *mapping;
        if end < start {
            continue;
        }
        if let Some(run) = runs.last_mut()
            && run.end.checked_add(1) == Some(start)
            && (run.permissions, run.mmio) == (mapping.permissions, mapping.mmio)
        {
            run.straight &= target.wrapping_sub(run.target) == start - run.start;
            run.end = end;
            run.mappings += 1;
            continue;
        }
        runs.push(Run {
            start,
            end,
            target,
            straight: true,
            permissions: mapping.permissions,
            mmio: mapping.mmio,
            mappings: 1,
        });
    }
    runs
}

/// Draws the whole space, from 0 to the power of two above `last`, in 64 cells, each shaded by its
/// mapped part.
fn strip(runs: &[Run], last: u64) -> String {
    let bits = (64 - last.leading_zeros()).max(12);
    let cell_bits = bits - CELLS.trailing_zeros();
    let mut filled = [0u64; 64];
    for run in runs {
        for cell in (run.start >> cell_bits)..=(run.end >> cell_bits) {
            let cell_start = cell << cell_bits;
            let cell_end = cell_start | ((1u64 << cell_bits) - 1);
            let part = run.end.min(cell_end) - run.start.max(cell_start);
            if let Some(sum) = usize::try_from(cell).ok().and_then(|i| filled.get_mut(i)) {
                *sum = sum.saturating_add(part).saturating_add(1);
            }
        }
    }
    let shades: String = filled
        .iter()
        .map(|&bytes| match bytes {
            0 => ' ',
            _ if bytes >> cell_bits > 0 => '█',
            _ if bytes >> (cell_bits - 1) > 0 => '▓',
            _ if bytes >> (cell_bits.max(4) - 4) > 0 => '▒',
            _ => '░',
        })
        .collect();
    format!(
        "  0 ┃{shades}┃ 2^{bits}   each cell {}\n",
        size(1 << cell_bits)
    )
}

fn line(run: &Run, largest: u64) -> String {
    let rights = [
        if run.permissions.read { 'r' } else { '-' },
        if run.permissions.write { 'w' } else { '-' },
    ];
    let rights: String = rights.into_iter().collect();
    let kind = if run.mmio { " mmio" } else { "" };
    let target = if run.straight {
        format!("→ {:#x}", run.target)
    } else {
        format!("→ {} places", run.mappings)
    };
    format!(
        "{:#018x}  {:<BAR$}  {:>9} {rights} {target}{kind}",
        run.start,
        bar(run.bytes(), largest),
        size(run.bytes()),
    )
}

/// A bar of logarithmic length: runs are of 4 KiB and of GiB.
fn bar(bytes: u64, largest: u64) -> String {
    let bits = |value: u64| u64::from(64 - value.leading_zeros());
    // The scale begins at one page, the smallest mapping.
    let scale = bits(largest).saturating_sub(11).max(1);
    let length = bits(bytes).saturating_sub(11).max(1) * (BAR as u64) / scale;
    "█".repeat(usize::try_from(length.clamp(1, BAR as u64)).unwrap_or(1))
}
