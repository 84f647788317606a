//! What needs no guest: formatting, lints, unit tests, clients of the API.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Context, Result};

use super::tally::{Listener, Tally, title};
use crate::arch::Arch;
use crate::clients;
use crate::native;
use crate::paths;
use crate::product::{self, Toolchain};

/// All features, for the lints.
const LINTED: &str = "boot-tests,bench";

/// How much of the machine the compiler may use.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Priority {
    /// As much as anything else.
    Normal,
    /// What the labs leave: the whole takes as long as the longer lab does.
    BehindLabs,
}

impl Priority {
    /// The command, at this priority.
    fn of(self, command: Command) -> Command {
        match self {
            Priority::Normal => command,
            Priority::BehindLabs => native::wrapped(&["nice", "-n", "10"], &command),
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

/// Builds and runs the unit tests of these packages, or of all.
pub fn unit_tests(of: Option<&BTreeSet<String>>, priority: Priority, tally: &mut Tally) {
    const WHAT: &str = "unit tests";
    title(WHAT);
    let tests = |more: &[&str]| -> Result<Command> {
        let mut tests = Toolchain::find(Arch::native())?.cargo("test");
        match of {
            Some(packages) => tests.args(packages.iter().flat_map(|name| ["--package", name])),
            None => tests.arg("--workspace"),
        };
        tests.args(more);
        Ok(tests)
    };
    let run = || -> Result<Tally> {
        if priority == Priority::BehindLabs {
            // The tests themselves wait for things with a time limit.
            let built = succeeds(priority.of(tests(&["--no-run"])?))?;
            anyhow::ensure!(built, "they cannot be built");
        }
        counted(&mut tests(&["--no-fail-fast"])?)
    };
    match run() {
        Ok(counted) => tally.add(counted),
        Err(error) => tally.fail_by(WHAT, &error),
    }
}

/// Every interleaving of what two threads do with an IOMMU's gate.
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

/// Requests by a client that others wrote. Without its packages they are left out, and the end of
/// the report repeats that.
pub fn client_tests(tally: &mut Tally) {
    const WHAT: &str = "requests generated from the API's document";
    title(WHAT);
    match clients::environment() {
        Ok(environment) => tally.count(WHAT, clients::agree_with_document(&environment)),
        Err(error) => tally.leave_out(format!("{WHAT}: {error:#}")),
    }
}

/// Runs a command that runs tests, and counts them; an error if it fails and no test did.
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
