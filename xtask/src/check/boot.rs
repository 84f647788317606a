//! Boot tests: built for an architecture, and run where it has a KVM.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::tally::{Listener, Tally};
use crate::arch::Arch;
use crate::cpio::Archive;
use crate::lab;
use crate::machine::Place;
use crate::native;
use crate::paths;
use crate::product::{self, Profile, Toolchain};

/// The feature that boot tests need, so that `cargo test` leaves them out.
const FEATURE: &str = "boot-tests";
/// Unit tests that are also run where the boot tests are: of the code that differs between
/// architectures or talks to KVM.
const UNIT_TESTS: [&str; 2] = ["arch", "vmm"];
/// Seconds that one test program may take.
const PROGRAM_LIMIT_S: u32 = 2400;
/// Longest silence of a test program on a quiet machine. The boot tests say once a minute that they
/// go on, so silence means a hung host.
const SILENCE: Duration = Duration::from_secs(240);
/// How often the emulated host is started for one architecture.
const LAB_STARTS: u32 = 6;

/// Which boot tests, and how they are shown.
#[derive(Clone)]
pub struct Request {
    /// Architecture of the guests.
    pub arch: Arch,
    /// Only the tests whose program or own name contains this.
    pub only: Option<String>,
    /// Only these programs, if some are chosen.
    pub chosen: Option<BTreeSet<String>>,
    /// Ignored tests too.
    pub long: bool,
    /// Time for all of them.
    pub limit: Duration,
    /// Other tests run at the same time: each line names the architecture.
    pub labelled: bool,
}

/// What a run needs: everything is built.
pub struct Programs {
    tests: Vec<(String, PathBuf)>,
    binary: PathBuf,
    tools: PathBuf,
    filter: String,
}

impl Request {
    /// What is in front of each line of output.
    fn label(&self) -> String {
        if self.labelled {
            format!("[{}] ", self.arch)
        } else {
            String::new()
        }
    }

    /// Builds everything that the tests need.
    pub fn build(&self) -> Result<Programs> {
        let toolchain = Toolchain::find(self.arch)?;
        let binary = product::build(self.arch, Profile::Dev)?;
        let mut tests = test_programs(&toolchain, self.only.is_none())?;
        if let Some(chosen) = &self.chosen {
            tests.retain(|(name, _)| chosen.contains(name));
        }
        let mut filter = String::new();
        if let Some(only) = self.only.as_deref() {
            if tests.iter().any(|(name, _)| name.contains(only)) {
                tests.retain(|(name, _)| name.contains(only));
            } else {
                only.clone_into(&mut filter);
            }
        }
        if self.long {
            filter += " --include-ignored";
        }
        if tests.is_empty() {
            bail!("there are none");
        }
        Ok(Programs {
            tests,
            binary,
            tools: guest_tools(self.arch, &toolchain)?,
            filter,
        })
    }

    /// Runs the tests at `place`.
    pub fn run(&self, place: Place, programs: Programs) -> Result<Tally> {
        let mut counted = match place {
            Place::Native => self.run_natively(programs)?,
            Place::Lab => self.run_in_lab(programs)?,
        };
        if counted.passed + counted.failed == 0 {
            counted.fail(format!("boot tests on {}: no test was run", self.arch));
        }
        Ok(counted)
    }

    /// One start of the emulated host serves all programs. It is not perfectly
    /// reliable: where it dies or falls silent it is started again for what has not
    /// ended yet, a bounded number of times, and each is reported.
    fn run_in_lab(&self, programs: Programs) -> Result<Tally> {
        let Programs {
            mut tests,
            binary,
            tools,
            filter,
        } = programs;
        let mut job = lab::Job::new(self.arch);
        job.guest_tools = Some(tools);
        job.timeout = self.limit;
        job.silence = Some(SILENCE);
        job.scaled = true;
        job.label = self.label();
        let mut all = Tally::default();
        let mut starts_left = LAB_STARTS;
        loop {
            let script = script(self.arch, &tests, &filter);
            job.command = ["sh", "-c", &script].map(str::to_owned).to_vec();
            job.programs.clone_from(&tests);
            job.programs.push(("portcullis".to_owned(), binary.clone()));
            let mut listener = Listener::default();
            let ended = lab::run(&job, &mut |line| listener.line(line));
            let done = listener.ended;
            let counted = listener.finish();
            let failed = counted.failed;
            all.add(counted);
            starts_left -= 1;
            let why = match ended {
                Ok(0) => return Ok(all),
                Ok(_) if failed != 0 => return Ok(all),
                Ok(status) => format!("the lab ended with {status}"),
                Err(error) => format!("{error:#}"),
            };
            tests.drain(..done.min(tests.len()));
            if starts_left == 0 || tests.is_empty() {
                all.fail(format!("boot tests on {}: {why}", self.arch));
                return Ok(all);
            }
            println!(
                "\n{}{why}: starting the emulated host again for the rest",
                job.label
            );
            all.retries += 1;
        }
    }

    fn run_natively(&self, programs: Programs) -> Result<Tally> {
        let script = script(self.arch, &programs.tests, &programs.filter);
        let mut files = programs.tests;
        files.push(("portcullis".to_owned(), programs.binary));
        let mut command = native::command(self.arch, &files, Some(&programs.tools), self.limit)?;
        command.args(["sh", "-c", &script]);
        let mut listener = Listener::default();
        let worked = native::listen(&mut command, &self.label(), &mut |line| listener.line(line))?;
        let mut counted = listener.finish();
        if !worked && counted.failed == 0 {
            counted.fail(format!("boot tests on {}: ended early", self.arch));
        }
        Ok(counted)
    }
}

/// Runs the programs one after the other; what it prints besides, [`Listener`] understands.
fn script(arch: Arch, programs: &[(String, PathBuf)], filter: &str) -> String {
    let mut script = String::from("worst=0; : > \"$PORTCULLIS_RETRIES\"\n");
    for (name, _) in programs {
        script += &format!(
            "echo '== {name} on {arch}'\n\
             timeout -s KILL {PROGRAM_LIMIT_S} {name} --test-threads=1 {filter}\n\
             status=$?; echo \"== status $status\"; [ $status = 0 ] || worst=1\n"
        );
    }
    script
        + "while read -r line; do echo \"== retry $line\"; done < \"$PORTCULLIS_RETRIES\"\n\
              exit $worst\n"
}

/// The test programs that need [`FEATURE`], by their packages.
fn boot_test_names() -> Result<Vec<(String, Vec<String>)>> {
    let needs_feature = |target: &&Value| {
        let features = target["required-features"].as_array();
        features.is_some_and(|names| names.iter().any(|name| name == FEATURE))
    };
    let mut packages = Vec::new();
    for package in product::metadata()? {
        let name = package["name"].as_str().context("package without a name")?;
        let targets = package["targets"].as_array().into_iter().flatten();
        let targets = targets.filter(needs_feature);
        let tests: Vec<_> = targets
            .filter_map(|target| target["name"].as_str().map(str::to_owned))
            .collect();
        if !tests.is_empty() {
            packages.push((name.to_owned(), tests));
        }
    }
    Ok(packages)
}

/// Builds the boot tests, and some unit tests if asked, and returns the programs by name.
fn test_programs(toolchain: &Toolchain, units: bool) -> Result<Vec<(String, PathBuf)>> {
    let mut programs = Vec::new();
    for (package, tests) in boot_test_names()? {
        let mut cargo = toolchain.cargo("test");
        cargo.args(["--no-run", "--package", &package, "--features", FEATURE]);
        for name in tests {
            cargo.args(["--test", &name]);
        }
        programs.extend(product::built(&mut cargo, "test")?);
    }
    if units {
        let mut cargo = toolchain.cargo("test");
        cargo.args(["--no-run", "--lib"]);
        for package in UNIT_TESTS {
            cargo.args(["--package", package]);
        }
        let built = product::built(&mut cargo, "lib")?;
        programs.splice(
            0..0,
            built
                .into_iter()
                .map(|(name, path)| (format!("unit-{name}"), path)),
        );
    }
    Ok(programs)
}

/// The programs that run in guests (packages below `tests/`), as an initramfs segment.
fn guest_tools(arch: Arch, toolchain: &Toolchain) -> Result<PathBuf> {
    let mut archive = Archive::default();
    let tests = paths::workspace().join("tests");
    for package in product::metadata()? {
        let manifest = package["manifest_path"].as_str().unwrap_or_default();
        if !Path::new(manifest).starts_with(&tests) {
            continue;
        }
        let name = package["name"].as_str().context("package without a name")?;
        let mut cargo = toolchain.cargo("build");
        for (name, path) in product::built(cargo.args(["--bins", "--package", name]), "bin")? {
            archive.copy(&format!("usr/bin/{name}"), &path)?;
        }
    }
    let path = paths::target().join(format!("guest-tools-{arch}.cpio"));
    archive.write(&path)?;
    Ok(path)
}
