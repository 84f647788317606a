//! Instructions of one operation of an IOMMU model, counted by callgrind on this machine.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

use crate::paths;
use crate::product;

/// Executions of an operation in one run of `iommu/examples/model_cost.rs`.
const REPEATS: u64 = 200;
/// Mappings of a domain by which the operations of `BY_MAPPINGS` are measured.
const MAPPINGS: [u64; 3] = [1, 1_000, 1_000_000];
/// Streams by which the operations of `BY_STREAMS` are measured, with 1000 mappings.
const STREAMS: [u64; 3] = [1, 8, 31];

/// Operations of the program, and their names in the tables.
const BY_MAPPINGS: [(&str, &str); 13] = [
    ("nothing", "an operation that does nothing"),
    ("dma-open", "`DmaView`, opened and dropped"),
    ("dma-hit", "`DmaView`, a slice of a cached page"),
    ("dma-read", "`DmaView`, 8 bytes of a cached page"),
    ("ram-read", "8 bytes of RAM without translation"),
    ("translate", "virtio-iommu, translation"),
    ("fault", "virtio-iommu, translation that faults"),
    ("map", "virtio-iommu, MAP of a page"),
    ("unmap", "virtio-iommu, UNMAP of a page"),
    ("attach", "virtio-iommu, ATTACH"),
    ("smmuv3-hit", "SMMUv3, TLB hit"),
    ("smmuv3-second", "SMMUv3, TLB hit at the second use"),
    ("smmuv3-miss", "SMMUv3, TLB miss"),
];
const BY_STREAMS: [(&str, &str); 5] = [
    ("map", "virtio-iommu, MAP of a page"),
    ("unmap", "virtio-iommu, UNMAP of a page"),
    ("smmuv3-hit", "SMMUv3, TLB hit"),
    ("smmuv3-tlbi", "SMMUv3, TLBI and SYNC"),
    ("smmuv3-tlbi-16", "SMMUv3, 16 TLBI and SYNC"),
];

/// Prints both tables in Markdown.
pub fn run() -> Result<ExitCode> {
    let mut cargo = Command::new(product::cargo());
    cargo
        .current_dir(paths::workspace())
        .args(["build", "--release", "--package", "iommu"])
        .args(["--example", "model_cost"])
        // callgrind finds the function `measured` by its symbol, which the profile strips.
        .args(["--config", "profile.release.strip=false"]);
    let built = product::built(&mut cargo)?;
    let program = &built.first().context("cargo built no program")?.path;
    println!("| instructions, by mappings | 1 | 10^3 | 10^6 |\n|---|---|---|---|");
    for (operation, name) in BY_MAPPINGS {
        row(program, operation, name, MAPPINGS.map(|count| (count, 1)))?;
    }
    println!("\n| instructions, by streams | 1 | 8 | 31 |\n|---|---|---|---|");
    for (operation, name) in BY_STREAMS {
        row(
            program,
            operation,
            name,
            STREAMS.map(|count| (1_000, count)),
        )?;
    }
    Ok(ExitCode::SUCCESS)
}

fn row(program: &Path, operation: &str, name: &str, cases: [(u64, u64); 3]) -> Result<()> {
    let mut line = format!("| {name} |");
    for (mappings, streams) in cases {
        let count = instructions(program, operation, mappings, streams)?;
        line += &format!(" {count} |");
    }
    println!("{line}");
    Ok(())
}

/// Instructions of one execution of the operation.
fn instructions(program: &Path, operation: &str, mappings: u64, streams: u64) -> Result<u64> {
    let mut valgrind = Command::new("valgrind");
    valgrind
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .args(["--toggle-collect=model_cost::measured*"])
        .arg(program)
        .args([operation, &mappings.to_string(), &streams.to_string()]);
    let output = valgrind.output().context("cannot run valgrind")?;
    let log = String::from_utf8_lossy(&output.stderr);
    let line = log.lines().find(|line| line.contains("Collected :"));
    let count = line.and_then(|line| line.split_whitespace().last()?.parse::<u64>().ok());
    let counted = count.filter(|count| output.status.success() && *count != 0);
    let counted = counted.with_context(|| format!("callgrind counted nothing:\n{log}"))?;
    Ok(counted / REPEATS)
}
