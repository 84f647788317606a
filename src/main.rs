//! The command line.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))] // They panic.

mod ctl;
mod jail;
mod notify;
mod run;
mod streams;
mod usage;

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
    Run(Box<run::RunArgs>),
    Serve(run::ServeArgs),
    Check(run::CheckArgs),
    Jail(jail::JailArgs),
    /// Ask a running machine, or tell it what to do
    Ctl(ctl::CtlArgs),
}

fn main() -> ExitCode {
    vmm::signals::survive_file_size_limit();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage::answer(&error),
    };
    match cli.command {
        Command::Run(args) => run::run(*args),
        Command::Serve(args) => run::serve(args),
        Command::Check(args) => run::check(&args),
        Command::Jail(args) => jail::main(&args),
        Command::Ctl(args) => ctl::main(&args),
    }
}

#[cfg(test)]
mod tests;
