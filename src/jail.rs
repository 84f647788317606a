//! `portcullis jail`: runs another command of this program in a root directory of its own.
//!
//! The root is a tmpfs in a new mount namespace, so it disappears with the command. It has the
//! program, the device nodes, and the files that the command names, at their own paths. The
//! directories of the command's output are the ones of the same path beneath `--root`, so that the
//! host finds socket and log there.

mod cgroup;
mod process;
mod root;

use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use rustix::process::{Resource, Rlimit, geteuid, setrlimit};
use vmm::error::Chain;

use self::cgroup::Cgroup;
use self::root::{Owner, Root};
use crate::run::{Files, RunArgs, ServeArgs};
use crate::streams::print_error;
use crate::usage::{self, USAGE_STATUS};

/// Run a command of this program in a root directory of its own, as an unprivileged user
///
/// Needs root. The options are those of Firecracker's jailer where it has them.
#[derive(Debug, Args)]
pub struct JailArgs {
    /// Directory that becomes the root; it keeps the command's socket, log and other output
    #[arg(long, value_name = "DIR")]
    root: PathBuf,
    /// User of the command, as a number
    #[arg(long, value_name = "UID")]
    uid: u32,
    /// Group of the command, as a number
    #[arg(long, value_name = "GID")]
    gid: u32,
    /// Name of the machine: letters, digits and "-". Only --cgroup makes a control group of it
    #[arg(long, value_name = "ID")]
    id: Option<String>,
    /// Value for a file of the control group (version 2), such as memory.max=600M; give it once
    /// for each
    #[arg(long, value_name = "FILE=VALUE", requires = "id")]
    cgroup: Vec<cgroup::Setting>,
    /// Control group in which --cgroup makes that of the machine
    #[arg(long, value_name = "PATH", default_value = "portcullis")]
    parent_cgroup: PathBuf,
    /// Network namespace to enter
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// Limit of a resource: fsize (bytes of a file) or no-file (open files); give it once for each
    #[arg(long, value_name = "RESOURCE=VALUE")]
    resource_limit: Vec<ResourceLimit>,
    /// Command, after "--": run or serve, with its options
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

/// Limit of a resource of the process.
#[derive(Clone, Copy, Debug)]
struct ResourceLimit {
    resource: Resource,
    value: u64,
}

impl FromStr for ResourceLimit {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').unwrap_or((text, ""));
        let resource = match name {
            "fsize" => Resource::Fsize,
            "no-file" => Resource::Nofile,
            _ => return Err("use fsize=BYTES or no-file=NUMBER".into()),
        };
        let value = value
            .parse()
            .map_err(|_| format!("{name} needs a number"))?;
        Ok(Self { resource, value })
    }
}

/// Command line of the jailed command.
#[derive(Debug, Parser)]
#[command(name = "portcullis")]
struct Jailed {
    #[command(subcommand)]
    command: JailedCommand,
}

#[derive(Debug, Subcommand)]
enum JailedCommand {
    Run(Box<RunArgs>),
    Serve(ServeArgs),
}

/// Runs the command; its exit status is this one's.
pub fn main(args: &JailArgs) -> ExitCode {
    let words = std::iter::once(OsString::from("portcullis")).chain(args.command.iter().cloned());
    let files = match Jailed::try_parse_from(words) {
        Ok(jailed) => match jailed.command {
            JailedCommand::Run(run) => run.files(),
            JailedCommand::Serve(serve) => serve.files(),
        },
        Err(error) => return usage::answer(&error),
    };
    let files = match files {
        Ok(files) => files,
        Err(failure) => return failure.report(),
    };
    if let Err(error) = check(args) {
        print_error(Chain(error.as_ref()));
        return ExitCode::from(USAGE_STATUS);
    }
    jail(args, &files).unwrap_or_else(|error| {
        print_error(Chain(error.as_ref()));
        ExitCode::FAILURE
    })
}

fn check(args: &JailArgs) -> Result<()> {
    ensure!(args.uid != 0, "--uid 0 is root; name an unprivileged user");
    if let Some(id) = &args.id {
        let valid = |byte: u8| byte.is_ascii_alphanumeric() || byte == b'-';
        let is_valid = (1..=64).contains(&id.len()) && id.bytes().all(valid);
        ensure!(
            is_valid,
            "--id has 1 to 64 letters, digits and \"-\"; use another one"
        );
    }
    let plain = |component| matches!(component, Component::Normal(_));
    let is_plain = args.parent_cgroup.components().all(plain);
    ensure!(
        is_plain,
        "--parent-cgroup is a relative path without \"..\""
    );
    ensure!(
        geteuid().is_root(),
        "jail needs root; without it, run the command itself"
    );
    Ok(())
}

fn jail(args: &JailArgs, files: &Files) -> Result<ExitCode> {
    let directory = std::env::current_dir().context("cannot find the current directory")?;
    let root = args.root.canonicalize();
    let root =
        root.with_context(|| format!("--root: {} is missing; make it", args.root.display()))?;
    let program = std::env::current_exe().context("cannot find this program")?;
    for limit in &args.resource_limit {
        let limits = Rlimit {
            current: Some(limit.value),
            maximum: Some(limit.value),
        };
        setrlimit(limit.resource, limits).context("cannot set --resource-limit")?;
    }
    if let Some(path) = &args.netns {
        process::enter_network(path)?;
    }
    let cgroup = match &args.id {
        Some(id) if !args.cgroup.is_empty() => {
            Some(Cgroup::make(&args.parent_cgroup, id, &args.cgroup)?)
        }
        _ => None,
    };
    let left = process::enter_namespaces()?;
    let owner = Owner::new(args.uid, args.gid);
    let mut root = Root::make(&root, owner, left)?;
    for path in &files.directories {
        root.add_directory(&absolute(&directory, path)?)?;
    }
    for (path, is_writable) in &files.files {
        root.add_file(path, &absolute(&directory, path)?, *is_writable)?;
    }
    let start = root.add_program(&program)?;
    root.add_devices()?;
    root.enter(&directory)?;
    process::run(&start, &args.command, owner, cgroup.as_ref())
}

/// The path of a file in the root, which is that in the host.
fn absolute(directory: &Path, path: &Path) -> Result<PathBuf> {
    if path.components().any(|it| it == Component::ParentDir) {
        bail!(
            "{}: a jailed command's paths have no \"..\"",
            path.display()
        );
    }
    Ok(directory.join(path).components().collect())
}
