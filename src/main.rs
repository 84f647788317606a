//! The command line.

mod ctl;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// A small KVM microVM monitor whose devices reach guest memory only through the guest's own
/// IOMMU.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Ask a running machine, or tell it what to do
    Ctl(ctl::CtlArgs),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Command::Ctl(args) => ctl::main(&args),
    }
}
