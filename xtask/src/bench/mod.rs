//! All measurements: the program `tests/bench`, run where guests run, and its tables.

mod figures;
mod models;
mod peer;
mod report;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Result, bail, ensure};

use crate::arch::Arch;
use crate::lab;
use crate::machine::{Place, PlaceArgs};
use crate::native;
use crate::packages;
use crate::paths;
use crate::product::{self, Profile, Toolchain};
use figures::Run;
use report::Report;

/// Upper bound on starts of the emulated host.
const LAB_STARTS: u32 = 5;
/// Longest silence: longer than any transfer takes.
const SILENCE: Duration = Duration::from_secs(450);

/// Time limit of a wait for a guest in virtual time, in seconds; a boot takes 2.
const VIRTUAL_TIME_WAIT: &str = "PORTCULLIS_TEST_SECONDS=30";

/// A monitor to compare with.
#[derive(clap::ValueEnum, Clone, Copy)]
enum Peer {
    /// The distribution's QEMU.
    Qemu,
}

/// What to measure, and where.
#[derive(clap::Args)]
pub struct BenchArgs {
    /// Architecture of the guests
    #[arg(long, default_value_t = Arch::native())]
    arch: Arch,
    /// Minutes for each start of the emulated host
    #[arg(long, default_value_t = 60)]
    minutes: u64,
    #[command(flatten)]
    place: PlaceArgs,
    /// Count instructions in place of real time: all figures repeat
    #[arg(long, conflicts_with = "native")]
    virtual_time: bool,
    /// Measure this monitor too, in the same start of the emulated host
    #[arg(long)]
    peer: Option<Peer>,
    /// Print the ratio to each figure of an earlier run: a file from target/bench
    #[arg(long, value_name = "OLD.json")]
    compare: Option<PathBuf>,
    /// Only what has one of these in its name: start-up, iotlb, smmuv3,ats=on, …; "models" for the
    /// IOMMU models alone, by callgrind on this machine
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

/// Measures and prints tables in Markdown. Fails if a measurement fails.
pub fn run(args: &BenchArgs) -> Result<ExitCode> {
    if args.names == ["models"] {
        return models::run();
    }
    let old = args.compare.as_deref().map(Run::read).transpose()?;
    let place = match args.virtual_time {
        true => Place::Lab,
        false => args.place.decide(args.arch)?,
    };
    ensure!(
        args.peer.is_none() || place == Place::Lab,
        "--peer: the peer runs in the lab only (--lab)"
    );
    let binary = product::build(args.arch, Profile::Release)?;
    let mut cargo = Toolchain::find(args.arch)?.cargo("test");
    cargo.args(["--no-run", "--package", "portcullis", "--features", "bench"]);
    let built = product::built(cargo.args(["--test", "bench"]))?;
    let tests = built.into_iter().filter(|program| program.kind == "test");
    let mut programs: Vec<_> = tests.map(|program| (program.name, program.path)).collect();
    programs.push(("portcullis".to_owned(), binary));
    let limit = Duration::from_secs(args.minutes * 60);
    let mut report = Report::default();
    let complete = match place {
        Place::Native => {
            let mut command = native::command(args.arch, &programs, None, limit)?;
            command.arg("bench").args(&args.names);
            native::listen(&mut command, "", &mut |line| report.line(line))?
        }
        Place::Lab => in_lab(args, &programs, limit, &mut report)?,
    };
    let place = match (place, args.virtual_time) {
        (Place::Native, _) => "on this machine",
        (Place::Lab, false) => "in the lab, whose clock is not reliable",
        (Place::Lab, true) => "in the lab, in virtual time",
    };
    let run = Run {
        arch: args.arch.to_string(),
        commit: commit(),
        place: place.to_owned(),
        figures: std::mem::take(&mut report.figures),
    };
    println!("\nRelease build of {}, {}, {place}:", run.commit, run.arch);
    println!("{}{}", report.tables(), run.table());
    if let Some(old) = old {
        println!("{}", run.comparison(&old));
    }
    if report.is_empty() && run.figures.is_empty() {
        bail!("nothing was measured");
    }
    let kind = ["", "-virtual-time"][usize::from(args.virtual_time)];
    let path = paths::target().join(format!("bench/{}{kind}.json", args.arch));
    run.write(&path)?;
    println!("figures: {}", path.display());
    Ok(if complete {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Short hash of the checked-out commit, with a mark if files are changed.
fn commit() -> String {
    let mut git = Command::new("git");
    git.current_dir(paths::workspace())
        .args(["describe", "--always", "--dirty"]);
    packages::output(&mut git).map_or_else(|_| "unknown".to_owned(), |text| text.trim().to_owned())
}

/// One start of the emulated host serves all measurements. If it ends early, it is started again
/// for the remaining ones. True if all are done.
fn in_lab(
    args: &BenchArgs,
    programs: &[(String, PathBuf)],
    limit: Duration,
    report: &mut Report,
) -> Result<bool> {
    let mut job = lab::Job::new(args.arch);
    job.programs = programs.to_vec();
    job.timeout = limit;
    job.silence = Some(SILENCE);
    if args.peer.is_some() {
        peer::add(&mut job.files, args.arch)?;
    }
    let mut complete = true;
    for start in 1..=LAB_STARTS {
        let before = report.done.len();
        job.command = Vec::new();
        if args.virtual_time {
            // What ended the host would repeat with the same seed.
            job.virtual_time = Some(start);
            job.command = vec!["env".to_owned(), VIRTUAL_TIME_WAIT.to_owned()];
        }
        job.command.push("bench".to_owned());
        job.command.extend(args.peer.map(|_| "--peer".to_owned()));
        let done = report.done.iter().map(|name| format!("--done={name}"));
        job.command.extend(done);
        job.command.extend(args.names.iter().cloned());
        let error = match lab::run(&job, &mut |line| report.line(line)) {
            // All are done, some of them in the earlier starts.
            Ok(2) if before > 0 => return Ok(complete),
            Ok(status) => return Ok(complete && status == 0),
            Err(error) => error,
        };
        println!("\n{error:#}: starting the emulated host again for the rest");
        complete &= report.interrupted();
    }
    println!("the emulated host was started {LAB_STARTS} times: that is enough");
    Ok(false)
}
