//! Boot tests: built for an architecture, and run where it has a KVM.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::tally::{Listener, Tally};
use crate::arch::Arch;
use crate::cpio::Archive;
use crate::lab;
use crate::machine::Place;
use crate::native;
use crate::paths;
use crate::product::{self, Toolchain};

/// The feature that boot tests require, so that `cargo test` leaves them out.
const FEATURE: &str = "boot-tests";
/// Packages whose unit tests also run where the boot tests run: their code differs between
/// architectures or uses KVM.
const UNIT_TESTS: [&str; 2] = ["arch", "vmm"];
/// Time limit of one test program on a quiet machine, in seconds.
const PROGRAM_LIMIT_S: u32 = 3600;
/// Sets `slowness`, a whole number from 1 to 6, from the start time of the emulated host.
const SLOWNESS: &str = "slowness=${PORTCULLIS_HOST_START_SECONDS:-0}\n\
                        slowness=$((${slowness%.*} / 6))\n\
                        [ $slowness -ge 1 ] || slowness=1\n\
                        [ $slowness -le 6 ] || slowness=6\n";
/// Longest silence of a test program on a quiet machine. The boot tests print a line at least once
/// a minute, so silence means a hung host.
const SILENCE: Duration = Duration::from_secs(240);
/// Upper bound on the starts of the emulated host for one architecture.
const LAB_STARTS: u32 = 6;

/// A run of boot tests, and its output.
#[derive(Clone)]
pub struct Request {
    /// Architecture of the guests.
    pub arch: Arch,
    /// Run only tests whose program or own name contains this.
    pub only: Option<String>,
    /// Run only these programs, if some are chosen.
    pub chosen: Option<BTreeSet<String>>,
    /// Run ignored tests too.
    pub long: bool,
    /// Let forbidden system calls pass; each one fails its test.
    pub log_forbidden: bool,
    /// Time limit of all tests.
    pub limit: Duration,
    /// Label each line with the architecture, because other tests run at the same time.
    pub labelled: bool,
}

/// Built programs of a run.
pub struct Programs {
    tests: Vec<(String, PathBuf)>,
    binary: PathBuf,
    tools: PathBuf,
    filter: String,
}

impl Request {
    /// Label at the start of each line of output.
    fn label(&self) -> String {
        if self.labelled {
            format!("[{}] ", self.arch)
        } else {
            String::new()
        }
    }

    /// Builds all programs of the tests.
    pub fn build(&self) -> Result<Programs> {
        let toolchain = Toolchain::find(self.arch)?;
        let units = self.only.is_none();
        let (mut tests, binary) = test_programs(&toolchain, self.arch, units)?;
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

    /// Runs the tests at `place`, and returns their counts.
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

    /// One start of the emulated host serves all programs. The host is not perfectly reliable: if
    /// it ends early or falls silent, it is started again for the programs that have not ended yet,
    /// a bounded number of times, and each start is reported.
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
            let script = self.script(&tests, &filter);
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
        let script = self.script(&programs.tests, &programs.filter);
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

    /// The shell script that runs the programs in order; [`Listener`] parses its additional lines.
    fn script(&self, programs: &[(String, PathBuf)], filter: &str) -> String {
        let arch = self.arch;
        let mut script = SLOWNESS.to_owned() + "worst=0; : > \"$PORTCULLIS_RETRIES\"\n";
        if self.long {
            script += "export PORTCULLIS_LONG=1\n";
        }
        if self.log_forbidden {
            script += "export PORTCULLIS_TEST_SANDBOX=log\n";
        }
        for (name, _) in programs {
            script += &format!(
                "echo '== {name} on {arch}'\n\
                 timeout -s KILL $(({PROGRAM_LIMIT_S} * slowness)) {name} --test-threads=1 {filter}\n\
                 status=$?; echo \"== status $status\"; [ $status = 0 ] || worst=1\n"
            );
        }
        script
            + "while read -r line; do echo \"== retry $line\"; done < \"$PORTCULLIS_RETRIES\"\n\
                  exit $worst\n"
    }
}

/// Packages with test programs that require [`FEATURE`], those programs, and the test programs that
/// require no feature.
struct TestNames {
    packages: Vec<String>,
    boot: Vec<String>,
    others: Vec<String>,
}

impl TestNames {
    fn read() -> Result<Self> {
        let (mut packages, mut boot, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for package in product::metadata()? {
            let before = boot.len();
            for target in package["targets"].as_array().into_iter().flatten() {
                let name = target["name"].as_str().context("target without a name")?;
                let needs = target["required-features"].as_array();
                if needs.is_some_and(|needs| needs.iter().any(|name| name == FEATURE)) {
                    boot.push(name.to_owned());
                } else if target["kind"][0] == "test" && needs.is_none() {
                    others.push(name.to_owned());
                }
            }
            if boot.len() > before {
                let name = package["name"].as_str().context("package without a name")?;
                packages.push(name.to_owned());
            }
        }
        Ok(Self {
            packages,
            boot,
            others,
        })
    }
}

/// Names of all boot test programs, with the unit tests that run beside them.
pub fn names() -> Result<Vec<String>> {
    let mut names = TestNames::read()?.boot;
    names.extend(UNIT_TESTS.map(|name| format!("unit-{name}")));
    Ok(names)
}

/// A cargo command that builds or runs tests, always with the packages and features of all tests of
/// the architecture: other ones would compile the same crates again.
pub fn cargo_test(toolchain: &Toolchain, arch: Arch) -> Result<Command> {
    let mut cargo = toolchain.cargo("test");
    if arch == Arch::native() {
        // Unit tests of all packages run here.
        cargo.arg("--workspace");
    } else {
        let packages = TestNames::read()?.packages;
        let units = UNIT_TESTS.map(str::to_owned);
        for name in packages.iter().chain(&units) {
            cargo.args(["--package", name]);
        }
    }
    cargo.args(["--features", FEATURE]);
    Ok(cargo)
}

/// A cargo command for the tests of this machine's architecture that need no guest.
pub fn cargo_unit_tests() -> Result<Command> {
    let arch = Arch::native();
    let mut cargo = cargo_test(&Toolchain::find(arch)?, arch)?;
    cargo.args(["--lib", "--bins"]);
    let others = TestNames::read()?.others;
    cargo.args(others.iter().flat_map(|name| ["--test", name]));
    Ok(cargo)
}

/// Builds the boot tests and, on request, some unit tests. Returns the programs by name, and the
/// `portcullis` that they test.
fn test_programs(
    toolchain: &Toolchain,
    arch: Arch,
    units: bool,
) -> Result<(Vec<(String, PathBuf)>, PathBuf)> {
    let mut cargo = cargo_test(toolchain, arch)?;
    cargo.arg("--no-run");
    cargo.args(
        TestNames::read()?
            .boot
            .iter()
            .flat_map(|name| ["--test", name]),
    );
    if units {
        cargo.arg("--lib");
    }
    let mut programs = Vec::new();
    let mut binary = None;
    for program in product::built(&mut cargo)? {
        let name = program.name;
        match (program.kind.as_str(), program.is_test) {
            ("test", true) => programs.push((name, program.path)),
            ("lib", true) if UNIT_TESTS.contains(&name.as_str()) => {
                programs.push((format!("unit-{name}"), program.path));
            }
            ("bin", false) if name == "portcullis" => binary = Some(program.path),
            _ => {}
        }
    }
    // Short programs first show an early failure.
    programs.sort_by_key(|(name, _)| (!name.starts_with("unit-"), name.clone()));
    let binary = binary.context("cargo has built no portcullis beside its tests")?;
    Ok((programs, binary))
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
        for program in product::built(cargo.args(["--bins", "--package", name]))? {
            archive.copy(&format!("usr/bin/{}", program.name), &program.path)?;
        }
    }
    let path = paths::target().join(format!("guest-tools-{arch}.cpio"));
    archive.write(&path)?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_of_a_program_follows_the_start_of_its_host() {
        for (start, expected) in [("", "1"), ("5.30", "1"), ("18.04", "3"), ("112", "6")] {
            let mut shell = Command::new("sh");
            shell.args(["-c", &format!("{SLOWNESS}echo $slowness")]);
            if start.is_empty() {
                shell.env_remove("PORTCULLIS_HOST_START_SECONDS");
            } else {
                shell.env("PORTCULLIS_HOST_START_SECONDS", start);
            }
            let printed = crate::packages::output(&mut shell).unwrap();
            assert_eq!(printed.trim(), expected, "after a start of {start:?} s");
        }
    }
}
