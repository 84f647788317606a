//! All tests: formatting, lints, unit tests, and boot tests on both architectures.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::arch::Arch;
use crate::clients;
use crate::cpio::Archive;
use crate::lab;
use crate::machine::{Place, PlaceArgs};
use crate::native;
use crate::paths;
use crate::product::{self, Profile, Toolchain};

/// The feature that boot tests need, so that `cargo test` leaves them out.
const FEATURE: &str = "boot-tests";
/// All features, for the lints.
const LINTED: &str = "boot-tests,bench";
/// Unit tests that are also run where the boot tests are: of the code that differs between
/// architectures or talks to KVM.
const UNIT_TESTS: [&str; 2] = ["arch", "vmm"];
/// How long one test program may take.
const PROGRAM_LIMIT_S: u32 = 2400;
/// Longest silence of a test program: longer than the boot tests wait for anything before they say
/// that a guest did not come up, so that silence means a hung host.
const SILENCE: Duration = Duration::from_secs(240);
/// How often the emulated host is started for one architecture.
const LAB_STARTS: u32 = 6;

/// What to test, and where.
#[derive(clap::Args)]
pub struct TestArgs {
    /// Only what needs no guest: formatting, lints, unit tests
    #[arg(long)]
    quick: bool,
    /// Boot tests of one architecture only
    #[arg(long)]
    arch: Option<Arch>,
    /// Only the boot tests whose program or own name contains this
    #[arg(long, conflicts_with = "quick")]
    only: Option<String>,
    /// Boot tests too that take long and differ little from others
    #[arg(long, conflicts_with = "quick")]
    long: bool,
    /// Minutes for the boot tests of one architecture
    #[arg(long, default_value_t = 50)]
    minutes: u64,
    #[command(flatten)]
    place: PlaceArgs,
}

/// What has been counted so far.
#[derive(Default, Debug, PartialEq)]
struct Tally {
    passed: u32,
    failed: u32,
    retries: u32,
    failures: Vec<String>,
    /// What was not done, and why.
    left_out: Vec<String>,
}

impl Tally {
    fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.retries += other.retries;
        self.failures.extend(other.failures);
        self.left_out.extend(other.left_out);
    }

    fn fail(&mut self, what: String) {
        self.failed += 1;
        self.failures.push(what);
    }

    fn leave_out(&mut self, what: String) {
        println!("left out: {what}");
        self.left_out.push(what);
    }

    /// Counts one thing by whether it worked.
    fn count(&mut self, what: &str, worked: bool) {
        if worked {
            self.passed += 1;
        } else {
            self.fail(what.to_owned());
        }
    }
}

/// Runs the tests and says how many passed.
pub fn run(args: &TestArgs) -> Result<ExitCode> {
    let started = Instant::now();
    let mut tally = Tally::default();
    if args.only.is_none() {
        static_checks(&mut tally)?;
        unit_tests(&mut tally)?;
        client_tests(&mut tally)?;
    }
    if !args.quick {
        for arch in args.arch.map_or(Arch::ALL.to_vec(), |arch| vec![arch]) {
            match boot_tests(arch, args) {
                Ok(counted) => tally.add(counted),
                Err(error) => {
                    eprintln!("xtask: boot tests on {arch}: {error:#}");
                    tally.fail(format!("boot tests on {arch}"));
                }
            }
        }
    }
    println!();
    for what in &tally.left_out {
        println!("left out: {what}");
    }
    for failure in &tally.failures {
        println!("failed: {failure}");
    }
    println!("{} boots had to be tried again", tally.retries);
    println!("all took {:.0} s", started.elapsed().as_secs_f32());
    println!("{} passed, {} failed", tally.passed, tally.failed);
    Ok(if tally.failed == 0 && tally.passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn title(text: &str) {
    println!("\n== {text}");
}

fn static_checks(tally: &mut Tally) -> Result<()> {
    title("formatting");
    let mut fmt = Command::new(product::cargo());
    fmt.current_dir(paths::workspace())
        .args(["fmt", "--all", "--", "--check"]);
    tally.count("formatting", succeeds(&mut fmt)?);
    for arch in Arch::ALL {
        title(&format!("lints for {arch}"));
        let toolchain = Toolchain::find(arch)?;
        if !toolchain.has_clippy() {
            tally.leave_out(format!(
                "lints for {arch}: the compiler is the distribution's and has no clippy"
            ));
            continue;
        }
        let mut clippy = toolchain.cargo("clippy");
        clippy.args(["--workspace", "--all-targets", "--features", LINTED]);
        tally.count(
            &format!("lints for {arch}"),
            succeeds(clippy.args(["--", "-D", "warnings"]))?,
        );
    }
    Ok(())
}

fn unit_tests(tally: &mut Tally) -> Result<()> {
    title("unit tests");
    let mut tests = Toolchain::find(Arch::native())?.cargo("test");
    let mut listener = Listener::default();
    let worked = native::listen(tests.args(["--workspace", "--no-fail-fast"]), &mut |line| {
        listener.line(line)
    })?;
    let counted = listener.finish();
    if !worked && counted.failed == 0 {
        tally.fail("unit tests: building or running them".to_owned());
    }
    tally.add(counted);

    title("every interleaving of a device's access and an invalidation (loom)");
    let mut loom = Command::new(product::cargo());
    loom.current_dir(paths::workspace())
        .args(["test", "--package", "iommu", "--lib", "--target-dir"])
        .arg(paths::target().join("loom"))
        .args(["--", "loom"])
        .env("RUSTFLAGS", "--cfg loom");
    let mut listener = Listener::default();
    let worked = native::listen(&mut loom, &mut |line| listener.line(line))?;
    let counted = listener.finish();
    if counted.passed == 0 || !worked && counted.failed == 0 {
        tally.fail("loom tests: building or running them".to_owned());
    }
    tally.add(counted);
    Ok(())
}

/// What others wrote for the API. Only for want of their packages is it left out, and that is
/// said at the end once more.
fn client_tests(tally: &mut Tally) -> Result<()> {
    const WHAT: &str = "requests generated from the API's document";
    title(WHAT);
    match clients::environment() {
        Ok(environment) => tally.count(WHAT, clients::agree_with_document(&environment)?),
        Err(error) => tally.leave_out(format!("{WHAT}: {error:#}")),
    }
    Ok(())
}

/// Builds and runs everything that needs a guest of `arch` or its KVM.
fn boot_tests(arch: Arch, args: &TestArgs) -> Result<Tally> {
    title(&format!("boot tests on {arch}"));
    let place = args.place.decide(arch)?;
    let toolchain = Toolchain::find(arch)?;
    let binary = product::build(arch, Profile::Dev)?;
    let mut tests = test_programs(&toolchain, args.only.is_none())?;
    let mut filter = String::new();
    if let Some(only) = args.only.as_deref() {
        if tests.iter().any(|(name, _)| name.contains(only)) {
            tests.retain(|(name, _)| name.contains(only));
        } else {
            only.clone_into(&mut filter);
        }
    }
    if args.long {
        filter += " --include-ignored";
    }
    if tests.is_empty() {
        bail!("there are none");
    }
    let tools = guest_tools(arch, &toolchain)?;
    let limit = Duration::from_secs(args.minutes * 60);
    let mut counted = match place {
        Place::Native => {
            let script = script(arch, &tests, &filter);
            let mut programs = tests;
            programs.push(("portcullis".to_owned(), binary));
            run_natively(arch, &programs, &tools, &script, limit)?
        }
        Place::Lab => run_in_lab(arch, tests, &binary, tools, &filter, limit)?,
    };
    if counted.passed + counted.failed == 0 {
        counted.fail(format!("boot tests on {arch}: no test was run"));
    }
    Ok(counted)
}

/// One start of the emulated host serves all programs. It is not perfectly
/// reliable: where it dies or falls silent it is started again for what has not
/// ended yet, a bounded number of times, and each is reported.
fn run_in_lab(
    arch: Arch,
    mut tests: Vec<(String, PathBuf)>,
    binary: &Path,
    tools: PathBuf,
    filter: &str,
    limit: Duration,
) -> Result<Tally> {
    let mut job = lab::Job::new(arch);
    job.guest_tools = Some(tools);
    job.timeout = limit;
    job.silence = Some(SILENCE);
    let mut all = Tally::default();
    let mut starts_left = LAB_STARTS;
    loop {
        let script = script(arch, &tests, filter);
        job.command = ["sh", "-c", &script].map(str::to_owned).to_vec();
        job.programs.clone_from(&tests);
        job.programs
            .push(("portcullis".to_owned(), binary.to_owned()));
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
            all.fail(format!("boot tests on {arch}: {why}"));
            return Ok(all);
        }
        println!("\n{why}: starting the emulated host again for the rest");
        all.retries += 1;
    }
}

fn run_natively(
    arch: Arch,
    programs: &[(String, PathBuf)],
    tools: &Path,
    script: &str,
    limit: Duration,
) -> Result<Tally> {
    let mut command = native::command(arch, programs, Some(tools), limit)?;
    command.args(["sh", "-c", script]);
    let mut listener = Listener::default();
    let worked = native::listen(&mut command, &mut |line| listener.line(line))?;
    let mut counted = listener.finish();
    if !worked && counted.failed == 0 {
        counted.fail(format!("boot tests on {arch}: ended early"));
    }
    Ok(counted)
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

/// Counts what test programs say about themselves.
#[derive(Default)]
struct Listener {
    tally: Tally,
    program: String,
    failures_before: u32,
    /// Programs that have ended.
    ended: usize,
}

impl Listener {
    fn line(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.tally.passed += count_of(counts, "passed");
            self.tally.failed += count_of(counts, "failed");
        } else if let Some(rest) = line.strip_prefix("---- ")
            && let Some(name) = rest.strip_suffix(" stdout ----")
        {
            // The line of the result itself may be in pieces: tests say what they do.
            self.tally.failures.push(format!("{name} {}", self.program));
        } else if let Some(rest) = line.strip_prefix("== ") {
            if let Some(status) = rest.strip_prefix("status ") {
                self.ended += 1;
                if status != "0" && self.tally.failed == self.failures_before {
                    self.tally
                        .fail(format!("{}: ended with {status}", self.program));
                }
            } else if rest.starts_with("retry ") {
                self.tally.retries += 1;
            } else {
                self.program = format!("({rest})");
                self.failures_before = self.tally.failed;
            }
        }
    }

    fn finish(self) -> Tally {
        self.tally
    }
}

/// The number before `word` in `ok. 3 passed; 0 failed; …`.
fn count_of(text: &str, word: &str) -> u32 {
    let before = text.split_once(word).map_or("", |(before, _)| before);
    before
        .split_whitespace()
        .last()
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

/// The test programs that need [`FEATURE`], by their packages.
fn boot_test_names() -> Result<Vec<(String, Vec<String>)>> {
    let needs_feature = |target: &&Value| {
        let features = target["required-features"].as_array();
        features.is_some_and(|names| names.iter().any(|name| name == FEATURE))
    };
    let mut packages = Vec::new();
    for package in metadata()? {
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
    for package in metadata()? {
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

/// The packages of the workspace, as cargo describes them.
fn metadata() -> Result<Vec<Value>> {
    let mut cargo = Command::new(product::cargo());
    cargo
        .current_dir(paths::workspace())
        .args(["metadata", "--no-deps", "--format-version", "1"]);
    let text = crate::packages::output(&mut cargo)?;
    let value: Value = serde_json::from_str(&text).context("cargo metadata")?;
    Ok(value["packages"].as_array().cloned().unwrap_or_default())
}

fn succeeds(command: &mut Command) -> Result<bool> {
    let name = command.get_program().display().to_string();
    Ok(command
        .status()
        .with_context(|| format!("cannot run {name}"))?
        .success())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(lines: &str) -> Tally {
        let mut listener = Listener::default();
        lines.lines().for_each(|line| listener.line(line));
        listener.finish()
    }

    #[test]
    fn results_of_several_programs_add_up() {
        let tally = heard(
            "== boot on x86_64\ntest power_off ... ok\ntest reset ... \n--- a part\nFAILED\n\
             ---- reset stdout ----\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured\n== status 101\n\
             == net on x86_64\ntest result: ok. 4 passed; 0 failed; 0 ignored\n== status 0\n\
             == retry ping: boot 1: time is up",
        );
        assert_eq!((tally.passed, tally.failed, tally.retries), (5, 1, 1));
        assert_eq!(tally.failures, ["reset (boot on x86_64)"]);
    }

    #[test]
    fn a_program_that_dies_without_a_result_counts_as_a_failure() {
        let tally = heard("== boot on x86_64\ntest power_off ...\n== status 137");
        assert_eq!((tally.passed, tally.failed), (0, 1));
    }
}
