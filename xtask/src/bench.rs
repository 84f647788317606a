//! All measurements: the program `tests/bench`, run where guests run, and its tables.

mod models;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, bail};

use crate::arch::Arch;
use crate::lab;
use crate::machine::{Place, PlaceArgs};
use crate::native;
use crate::product::{self, Profile, Toolchain};

/// Upper bound on starts of the emulated host.
const LAB_STARTS: u32 = 5;
/// Number of ends of the host during one measurement after which that is given up.
const ENDS: u32 = 2;
/// Longest silence: longer than any transfer takes.
const SILENCE: Duration = Duration::from_secs(450);

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
    let place = args.place.decide(args.arch)?;
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
    let place = match place {
        Place::Native => "on this machine",
        Place::Lab => "in the lab, whose clock says little",
    };
    println!(
        "\nRelease build, {}, {place}:\n{}",
        args.arch,
        report.tables()
    );
    if report.rows.is_empty() {
        bail!("nothing was measured");
    }
    Ok(if complete {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
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
    let mut complete = true;
    for _ in 0..LAB_STARTS {
        let before = report.done.len();
        job.command = vec!["bench".to_owned()];
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

/// Parsed output of the program.
#[derive(Default)]
struct Report {
    /// Rows of tables, each with the header of its table.
    rows: Vec<(String, String)>,
    /// Measurements that are not to be repeated.
    done: Vec<String>,
    /// The measurement in progress.
    begun: Option<String>,
    /// Measurements during which the host ended, once for each end.
    ends: Vec<String>,
    header: Option<String>,
}

impl Report {
    fn line(&mut self, line: &str) {
        if let Some(header) = self.header.take() {
            self.rows.push((header, line.to_owned()));
        } else if let Some(header) = line.strip_prefix("== row ") {
            self.header = Some(header.to_owned());
        } else if let Some(name) = line.strip_prefix("== begin ") {
            self.begun = Some(name.to_owned());
        } else if let Some(name) = line.strip_prefix("== done ") {
            self.begun = None;
            self.done.push(name.to_owned());
        }
    }

    /// Records that the host has ended. False if the measurement in progress is given up.
    fn interrupted(&mut self) -> bool {
        self.header = None;
        let Some(name) = self.begun.take() else {
            return true;
        };
        self.ends.push(name.clone());
        let ends = self.ends.iter().filter(|ended| **ended == name).count();
        if ends < ENDS as usize {
            return true;
        }
        println!("not measured: {name}, under which the emulated host ended {ENDS} times");
        self.done.push(name);
        false
    }

    /// The tables in Markdown, in the order of their first lines.
    fn tables(&self) -> String {
        let mut text = String::new();
        let mut headers: Vec<&str> = Vec::new();
        for (header, _) in &self.rows {
            if !headers.contains(&header.as_str()) {
                headers.push(header);
            }
        }
        for header in headers {
            let columns = header.matches('|').count().saturating_sub(1);
            text += &format!("\n{header}\n|{}\n", "---|".repeat(columns));
            for (_, row) in self.rows.iter().filter(|(of, _)| of == header) {
                text += &format!("{row}\n");
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report_of(lines: &str) -> Report {
        let mut report = Report::default();
        lines.lines().for_each(|line| report.line(line));
        report
    }

    #[test]
    fn rows_are_gathered_by_their_tables() {
        let report = report_of(
            "== begin one\nbooting\n== row | a | b |\n| 1 | 2 |\n== row | c |\n| 3 |\n\
             == row | a | b |\n| 4 | 5 |\n== done one",
        );
        let tables = "\n| a | b |\n|---|---|\n| 1 | 2 |\n| 4 | 5 |\n\n| c |\n|---|\n| 3 |\n";
        assert_eq!(report.tables(), tables);
        assert_eq!(report.done, ["one"]);
    }

    #[test]
    fn a_measurement_that_ends_the_host_twice_is_given_up() {
        let mut report = report_of("== begin one\n== done one\n== begin two\n== row | a |");
        assert!(report.interrupted());
        assert_eq!(report.done, ["one"]);
        report.line("== begin two");
        assert!(report.rows.is_empty(), "half a row is none");
        assert!(!report.interrupted());
        assert_eq!(report.done, ["one", "two"]);
    }
}
