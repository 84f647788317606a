//! Development tasks: `cargo xtask guest | lab | build | …`.

mod arch;
mod bench;
mod check;
mod clients;
mod cpio;
mod debian;
mod demo;
mod fuzz;
mod guest;
mod kernel;
mod lab;
mod machine;
mod native;
mod packages;
mod paths;
mod product;
#[path = "../../tests/support/slowness.rs"]
mod slowness;
mod userland;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};

use arch::Arch;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Development tasks of portcullis")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Build portcullis, prepare a guest and boot it
    Demo {
        /// Architecture of the guest
        #[arg(long, default_value_t = Arch::native())]
        arch: Arch,
        #[command(flatten)]
        place: machine::PlaceArgs,
    },
    /// Run all tests; boot tests on both architectures
    Test(check::TestArgs),
    /// Count lines of code, long files, `unsafe` blocks and cycles of modules
    Lines(check::LinesArgs),
    /// Measure start-up and the vhost IOTLB, and print tables; decides no test
    Bench(bench::BenchArgs),
    /// Fuzz what takes the bytes of a guest or of a client
    Fuzz(fuzz::FuzzArgs),
    /// Prepare guest kernels and initramfs images from the distribution's packages
    Guest {
        /// Architecture of the guest
        #[arg(long, default_value_t = Arch::native())]
        arch: Arch,
    },
    /// Run a command in the lab: an emulated host that has KVM and vhost
    Lab(LabArgs),
    /// Build a static portcullis binary
    Build {
        /// Architecture to build for
        #[arg(long, default_value_t = Arch::native())]
        arch: Arch,
        /// Optimize
        #[arg(long)]
        release: bool,
    },
}

#[derive(clap::Args)]
struct LabArgs {
    /// Architecture of the emulated host
    #[arg(long, default_value_t = Arch::native())]
    arch: Arch,
    /// Directory copied to /share; what CMD changes there is copied back
    #[arg(long)]
    share: Option<PathBuf>,
    /// Processors of the emulated host (x86_64 is reliable with one only)
    #[arg(long)]
    cpus: Option<u8>,
    /// Memory of the emulated host in MiB
    #[arg(long, default_value_t = 4096)]
    memory: u32,
    /// Seconds before the emulated host is ended; exit status 124 then
    #[arg(long, default_value_t = 600)]
    timeout: u64,
    /// Count instructions in place of real time: a run repeats, and takes about ten times as long
    #[arg(long)]
    virtual_time: bool,
    /// Take no portcullis binary along
    #[arg(long)]
    no_build: bool,
    /// Command and arguments; an interactive shell when absent
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    match run(Cli::parse().task) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Demo { arch, place } => demo::run(arch, place),
        Task::Test(args) => check::run(&args),
        Task::Lines(args) => check::lines(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Fuzz(args) => fuzz::run(&args),
        Task::Guest { arch } => {
            let images = guest::prepare(arch)?;
            println!("{}", images.dir.display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Build { arch, release } => {
            let profile = if release {
                product::Profile::Release
            } else {
                product::Profile::Dev
            };
            println!("{}", product::build(arch, profile)?.display());
            Ok(ExitCode::SUCCESS)
        }
        Task::Lab(args) => {
            let mut job = lab::Job::new(args.arch);
            if !args.no_build {
                let binary = product::build(args.arch, product::Profile::Dev)?;
                job.programs.push(("portcullis".to_owned(), binary));
            }
            job.share = args.share;
            job.memory_mib = args.memory;
            job.virtual_time = args.virtual_time.then_some(1);
            job.cpus = args.cpus.unwrap_or(job.cpus);
            job.timeout = Duration::from_secs(args.timeout);
            job.command = args.command;
            lab::run(&job, &mut |_| {}).map(ExitCode::from)
        }
    }
}
