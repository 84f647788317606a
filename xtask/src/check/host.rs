//! Checks that need no guest: formatting, lints, unit tests, clients of the API.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use super::boot;
use super::tally::{Listener, Tally, title};
use crate::arch::Arch;
use crate::clients;
use crate::fuzz;
use crate::native;
use crate::paths;
use crate::product::{self, Profile, Toolchain};

/// All features, which the lints enable.
const LINTED: &str = "boot-tests,bench";

/// Priority of the compiler.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// The default priority.
    Normal,
    /// Only the processor time that the labs leave: the whole takes as long as the longer lab.
    BehindLabs,
}

impl Priority {
    /// Returns the command with this priority.
    fn of(self, command: Command) -> Command {
        match self.wrapper() {
            [] => command,
            wrapper => native::wrapped(wrapper, &command),
        }
    }

    /// Program and arguments that set the priority of a command.
    fn wrapper(self) -> &'static [&'static str] {
        match self {
            Priority::Normal => &[],
            Priority::BehindLabs => &["nice", "-n", "10"],
        }
    }
}

/// Checks the formatting.
pub fn formatting(tally: &mut Tally) {
    title("formatting");
    let mut fmt = Command::new(product::cargo());
    fmt.current_dir(paths::workspace())
        .args(["fmt", "--all", "--", "--check"]);
    tally.count("formatting", succeeds(fmt));
}

/// Runs clippy for one architecture.
pub fn lints(arch: Arch, priority: Priority, tally: &mut Tally) {
    let what = format!("lints for {arch}");
    title(&what);
    let toolchain = match Toolchain::find(arch) {
        Ok(toolchain) => toolchain,
        Err(error) => return tally.fail_by(&what, &error),
    };
    if !toolchain.has_clippy() {
        return tally.leave_out(format!(
            "{what}: the compiler is the distribution's and has no clippy"
        ));
    }
    let mut clippy = toolchain.cargo("clippy");
    clippy.args(["--workspace", "--all-targets", "--features", LINTED]);
    clippy.args(["--", "-D", "warnings"]);
    tally.count(&what, succeeds(priority.of(clippy)));
}

/// Builds and runs the unit tests of these packages, or of all. Returns the `portcullis` that was
/// built with them.
pub fn unit_tests(
    of: Option<&BTreeSet<String>>,
    priority: Priority,
    tally: &mut Tally,
) -> Option<PathBuf> {
    const WHAT: &str = "unit tests";
    title(WHAT);
    let mut binary = None;
    let mut run = || -> Result<Tally> {
        // The tests have time limits: only the compiler has the low priority.
        let built = product::built(priority.of(unit_test_command(of)?).arg("--no-run"))?;
        binary = built
            .into_iter()
            .find(|program| program.name == "portcullis" && !program.is_test)
            .map(|program| program.path);
        let mut all = counted(unit_test_command(of)?.arg("--no-fail-fast"))?;
        if of.is_none() {
            let arch = Arch::native();
            let mut examples = boot::cargo_test(&Toolchain::find(arch)?, arch)?;
            all.add(counted(examples.args(["--doc", "--no-fail-fast"]))?);
        }
        Ok(all)
    };
    match run() {
        Ok(counted) => tally.add(counted),
        Err(error) => tally.fail_by(WHAT, &error),
    }
    binary
}

fn unit_test_command(of: Option<&BTreeSet<String>>) -> Result<Command> {
    let Some(packages) = of else {
        return boot::cargo_unit_tests();
    };
    let mut cargo = Toolchain::find(Arch::native())?.cargo("test");
    cargo.args(packages.iter().flat_map(|name| ["--package", name]));
    Ok(cargo)
}

/// Runs every interleaving of two threads at an IOMMU's gate.
pub fn loom_tests(priority: Priority, tally: &mut Tally) {
    const WHAT: &str = "every interleaving of a device's access and an invalidation (loom)";
    title(WHAT);
    let mut loom = Command::new(product::cargo());
    loom.current_dir(paths::workspace())
        .args(["test", "--package", "iommu", "--lib", "--target-dir"])
        .arg(paths::target().join("loom"))
        .args(["--", "loom"])
        .env("RUSTFLAGS", "--cfg loom");
    match counted(&mut priority.of(loom)) {
        Ok(counted) if counted.passed + counted.failed == 0 => {
            tally.fail(format!("{WHAT}: none was run"));
        }
        Ok(counted) => tally.add(counted),
        Err(error) => tally.fail_by(WHAT, &error),
    }
}

/// Runs every fuzz target on its saved inputs, without a search.
pub fn fuzz_seeds(priority: Priority, tally: &mut Tally) {
    const WHAT: &str = "fuzz targets on their saved inputs";
    title(WHAT);
    if let Some(reason) = fuzz::obstacle() {
        return tally.leave_out(format!("{WHAT}: {reason}"));
    }
    let targets = fuzz::build(priority.wrapper()).and_then(|()| fuzz::targets());
    match targets {
        Ok(targets) => {
            for target in targets {
                let what = format!("fuzz target {}", target.name);
                tally.count(&what, target.run_seeds());
            }
        }
        Err(error) => tally.fail_by(WHAT, &error),
    }
}

/// Sends requests to `binary` by a third-party client. Without its packages they are left out, and
/// the end of the report repeats that.
pub fn client_tests(binary: Option<PathBuf>, tally: &mut Tally) {
    const WHAT: &str = "requests generated from the API's document";
    title(WHAT);
    match clients::environment() {
        Ok(environment) => {
            let binary = binary.map_or_else(|| product::build(Arch::native(), Profile::Dev), Ok);
            let agree =
                binary.and_then(|binary| clients::agree_with_document(&environment, &binary));
            tally.count(WHAT, agree);
        }
        Err(error) => tally.leave_out(format!("{WHAT}: {error:#}")),
    }
}

/// Runs a command that runs tests, and returns their counts; an error if it fails and no test did.
fn counted(command: &mut Command) -> Result<Tally> {
    let mut listener = Listener::default();
    let worked = native::listen(command, "", &mut |line| listener.line(line))?;
    let counted = listener.finish();
    anyhow::ensure!(
        worked || counted.failed != 0,
        "building or running them failed"
    );
    Ok(counted)
}

fn succeeds(mut command: Command) -> Result<bool> {
    let name = command.get_program().display().to_string();
    Ok(command
        .status()
        .with_context(|| format!("cannot run {name}"))?
        .success())
}
