//! All tests: formatting, lints, unit tests, and boot tests on both architectures.
//!
//! The labs of both architectures and the tests without a guest run side by side. The boot tests
//! are built first: the whole takes as long as building them and the longer lab.

mod boot;
mod changed;
mod dependencies;
mod documents;
mod host;
mod lines;
mod modules;
mod sources;
mod tally;
mod tokens;

use std::process::ExitCode;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, Scope, ScopedJoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::lab;
use crate::machine::{Place, PlaceArgs};
use boot::{Programs, Request};
use changed::Selection;
use host::Priority;
pub use lines::LinesArgs;
use tally::{Tally, title};

/// What to test, and where.
#[derive(clap::Args)]
pub struct TestArgs {
    /// Only what needs no guest: formatting, lints, unit tests
    #[arg(long)]
    quick: bool,
    /// Only what reads the source: documents against the code, cycles of modules, length of
    /// files, licences and duplicates of dependencies
    #[arg(long, conflicts_with_all = ["quick", "only", "changed", "long"])]
    documents: bool,
    /// Boot tests of one architecture only
    #[arg(long)]
    arch: Option<Arch>,
    /// Only the boot tests whose program or own name contains this
    #[arg(long, conflicts_with = "quick")]
    only: Option<String>,
    /// Only what the changes since the branch left main concern, the working tree's too
    #[arg(long, conflicts_with_all = ["quick", "only"])]
    changed: bool,
    /// Boot tests too that take long and differ little from others, and larger transfers
    #[arg(long, conflicts_with = "quick")]
    long: bool,
    /// Run the machines with `--sandbox log`; each logged call fails its test
    #[arg(long, conflicts_with = "quick")]
    log_forbidden: bool,
    /// Minutes for the boot tests of one architecture
    #[arg(long, default_value_t = 75)]
    minutes: u64,
    #[command(flatten)]
    place: PlaceArgs,
}

impl TestArgs {
    /// The requested boot tests, the architecture with the most of them first.
    fn boot_tests(&self, selection: Option<&Selection>) -> Vec<Request> {
        let none = self.quick || selection.is_some_and(|chosen| chosen.programs.is_empty());
        let archs = match self.arch {
            _ if none => Vec::new(),
            Some(arch) => vec![arch],
            None => vec![Arch::Aarch64, Arch::X86_64],
        };
        let labelled = self.only.is_none() || archs.len() > 1;
        let request = |arch| Request {
            arch,
            only: self.only.clone(),
            chosen: selection.map(|selection| selection.programs.clone()),
            long: self.long,
            log_forbidden: self.log_forbidden,
            limit: Duration::from_secs(self.minutes * 60),
            labelled,
        };
        archs.into_iter().map(request).collect()
    }
}

/// Runs the tests and prints their counts.
pub fn run(args: &TestArgs) -> Result<ExitCode> {
    let started = Instant::now();
    let mut tally = Tally::default();
    if args.documents {
        source(&mut tally);
        return Ok(report(&tally, started));
    }
    let selection = if args.changed {
        Some(selection()?)
    } else {
        None
    };
    let requests = args.boot_tests(selection.as_ref());
    thread::scope(|scope| {
        if args.only.is_none() {
            host::formatting(&mut tally);
            source(&mut tally);
        }
        // Prepares images that are not in the cache, while the programs are built.
        let labs: Vec<_> = requests
            .iter()
            .map(|request| BootTests::start(scope, request, args.place))
            .collect();
        let labs: Vec<_> = labs.into_iter().map(BootTests::build).collect();
        if args.only.is_none() {
            let priority = if labs.is_empty() {
                Priority::Normal
            } else {
                Priority::BehindLabs
            };
            without_guests(args, selection.as_ref(), priority, &mut tally);
        }
        for lab in labs {
            lab.finish(&mut tally);
        }
    });
    Ok(report(&tally, started))
}

/// Prints lines of code, long files and cycles of modules.
pub fn lines(args: &LinesArgs) -> Result<ExitCode> {
    lines::run(args)
}

/// Checks that only read the source and the list of dependencies.
fn source(tally: &mut Tally) {
    documents::check(tally);
    modules::check(tally);
    lines::check(tally);
    dependencies::check(tally);
}

/// Selects the tests of the changes, and prints the selection with its reasons.
fn selection() -> Result<Selection> {
    let selection = changed::choose(&changed::paths()?, &changed::packages()?, &boot::names()?);
    title("changes, and what they concern");
    for reason in &selection.reasons {
        println!("{reason}");
    }
    println!("altogether: {}", selection.describe());
    Ok(selection)
}

/// Runs the tests that need no guest, or the selected ones.
fn without_guests(
    args: &TestArgs,
    selection: Option<&Selection>,
    priority: Priority,
    tally: &mut Tally,
) {
    let chosen = |part: fn(&Selection) -> bool| selection.is_none_or(part);
    if chosen(|selection| selection.lints) {
        for arch in Arch::ALL {
            host::lints(arch, priority, tally);
        }
    }
    let mut binary = None;
    if chosen(|selection| !selection.units.is_empty()) {
        let packages = selection.map(|selection| &selection.units);
        binary = host::unit_tests(packages, priority, tally);
    }
    if chosen(|selection| selection.loom) {
        host::loom_tests(priority, tally);
    }
    // They are compiled with other flags, which takes a while.
    if !args.quick && chosen(|selection| selection.fuzz) {
        host::fuzz_seeds(priority, tally);
    }
    if chosen(|selection| selection.clients) {
        host::client_tests(binary, tally);
    }
}

fn report(tally: &Tally, started: Instant) -> ExitCode {
    println!();
    for what in &tally.left_out {
        println!("left out: {what}");
    }
    for failure in &tally.failures {
        println!("failed: {failure}");
    }
    let longest = tally.longest();
    if !longest.is_empty() {
        println!("longest:");
    }
    for (duration, name) in longest {
        println!("{:6.0} s  {name}", duration.as_secs_f32());
    }
    println!("{} boots had to be tried again", tally.retries);
    println!("all took {:.0} s", started.elapsed().as_secs_f32());
    println!("{} passed, {} failed", tally.passed, tally.failed);
    if tally.failed == 0 && tally.passed > 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

/// Boot tests of one architecture, on a thread that waits for their programs.
struct BootTests<'a, 'scope> {
    request: &'a Request,
    programs: mpsc::Sender<Programs>,
    thread: ScopedJoinHandle<'scope, Result<Tally>>,
}

/// Boot tests whose programs are built or failed to build.
struct Started<'a, 'scope> {
    request: &'a Request,
    built: Result<()>,
    thread: ScopedJoinHandle<'scope, Result<Tally>>,
}

impl<'a, 'scope> BootTests<'a, 'scope> {
    /// Starts the thread.
    fn start(scope: &'scope Scope<'scope, 'a>, request: &'a Request, place: PlaceArgs) -> Self
    where
        'a: 'scope,
    {
        let (sender, programs) = mpsc::channel();
        let thread = scope.spawn(move || run_when_built(request, place, &programs));
        Self {
            request,
            programs: sender,
            thread,
        }
    }

    /// Builds the programs and sends them to the thread.
    fn build(self) -> Started<'a, 'scope> {
        title(&format!(
            "building the boot tests for {}",
            self.request.arch
        ));
        let built = self.request.build().map(|programs| {
            // An error means that the receiving thread has ended early; it reports the reason.
            let _ = self.programs.send(programs);
        });
        Started {
            request: self.request,
            built,
            thread: self.thread,
        }
    }
}

impl Started<'_, '_> {
    /// Waits for the tests and adds their counts to `tally`.
    fn finish(self, tally: &mut Tally) {
        let what = format!("boot tests on {}", self.request.arch);
        let ended = self.thread.join();
        match (self.built, ended) {
            (Err(error), _) => tally.fail_by(&what, &error),
            (Ok(()), Ok(Ok(counted))) => tally.add(counted),
            (Ok(()), Ok(Err(error))) => tally.fail_by(&what, &error),
            (Ok(()), Err(_)) => tally.fail(what),
        }
    }
}

/// Prepares the place for boot tests, waits for their programs and runs them.
fn run_when_built(
    request: &Request,
    place: PlaceArgs,
    programs: &Receiver<Programs>,
) -> Result<Tally> {
    let place = place.decide(request.arch)?;
    if place == Place::Lab {
        lab::prepare(request.arch)?;
    }
    let programs = programs.recv().context("their programs are not built")?;
    request.run(place, programs)
}
