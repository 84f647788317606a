//! `portcullis run`, `serve` and `check`.

use std::env;
use std::error::Error;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use api::{Limits, Server, Socket};
use clap::Args;
use vmm::action::{Action, ActionError, Configure, Lifecycle};
use vmm::config::{
    Argument, BootSource, ConfigError, CpuCount, Drive, Entropy, Iommu, LogLevel, Logger,
    MemorySize, NetworkInterface, Sandbox, Serial, User, VmConfig, Vsock,
};
use vmm::controller::Controller;
use vmm::error::Chain;
use vmm::plan::MachinePlan;
use vmm::sandbox::{self, SandboxError, directories::Purpose};
use vmm::{console, host_file, inspect, logger};

use crate::notify::ServiceManager;
use crate::streams::{self, print_error};

use crate::usage::USAGE_STATUS;

/// Upper bound on a configuration file, in bytes: more than a machine with all devices needs.
const MAX_CONFIG: usize = 1 << 20;

/// Boot a machine and connect its serial console to standard input and output
/// (Ctrl-a x quits)
#[derive(Debug, Args)]
#[command(after_help = RUN_STATUS)]
pub struct RunArgs {
    /// Kernel: on x86_64 a vmlinux or a bzImage; on aarch64 an Image, as it is or
    /// compressed with gzip or zstd, or an EFI zboot vmlinuz with such a payload
    #[arg(long, value_name = "FILE")]
    kernel: Option<PathBuf>,
    /// Initial ramdisk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,
    /// Kernel command line, instead of one that gives a console
    #[arg(long, value_name = "STRING")]
    cmdline: Option<String>,
    /// Virtual processors, 1 to 32 [default: 1]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    cpus: Option<CpuCount>,
    /// Guest memory: 512M, 2G, or a number of MiB [default: 512M]
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true)]
    memory: Option<MemorySize>,
    #[arg(long, value_name = "MODEL", help = keyed::<Iommu>(
        "IOMMU in front of the PCI devices: none, virtio-iommu, or smmuv3 (aarch64), \
         then its keys [default: none]"
    ))]
    iommu: Option<Iommu>,
    #[arg(long, value_name = "DISK", help = keyed::<Drive>(
        "Disk, as pairs of key and value; give it once for each"
    ))]
    disk: Vec<Drive>,
    #[arg(long, value_name = "NET", help = keyed::<NetworkInterface>(
        "Network interface, as pairs of key and value; give it once for each"
    ))]
    net: Vec<NetworkInterface>,
    #[arg(long, value_name = "VSOCK", help = keyed::<Vsock>("Socket device, as pairs of key and value"))]
    vsock: Option<Vsock>,
    #[arg(long, value_name = "SERIAL", help = keyed::<Serial>(
        "File for the output of the serial console, as pairs of key and value, in place of \
         standard output; no keyboard then"
    ))]
    serial: Option<Serial>,
    /// Source of entropy
    #[arg(long)]
    rng: bool,
    /// Machine as JSON; the options above replace what it says, devices add to it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Serve the API at this Unix socket while the guest runs
    #[arg(long, value_name = "PATH")]
    api_socket: Option<PathBuf>,
    #[command(flatten)]
    sandbox: SandboxArgs,
    #[command(flatten)]
    log: LogArgs,
}

/// The help text of `run` after the options.
const RUN_STATUS: &str = "\
Pairs of key and value are separated by commas: path=disk.img,readonly=on. A comma that
belongs to a value is written twice.

Exit status:
  0  the guest powered off, or was stopped
  1  the host or the monitor failed
  2  the command line or the configuration cannot be used
  3  the guest reset
  4  the guest crashed
  148  a thread of the monitor made a forbidden system call";

/// The help text of an option whose value has keys.
fn keyed<T: Argument>(what: &str) -> String {
    format!("{what}{}", T::help())
}

/// Wait for the API to configure and start a machine
#[derive(Debug, Args)]
pub struct ServeArgs {
    /// Unix socket to serve the API at
    #[arg(long, value_name = "PATH")]
    api_socket: PathBuf,
    /// Machine as JSON, to begin with
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    #[command(flatten)]
    sandbox: SandboxArgs,
    #[command(flatten)]
    log: LogArgs,
}

/// Validate a machine, print how it would be built, and start nothing
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Machine as JSON
    #[arg(long, value_name = "FILE")]
    config: PathBuf,
}

#[derive(Debug, Args)]
struct SandboxArgs {
    /// Confinement of this process: on, log (makes forbidden system calls, and logs them), or off
    /// [default: on]
    #[arg(long, value_name = "MODE")]
    sandbox: Option<Sandbox>,
    /// Directory in which PUT /logger and PUT /metrics may name files while the guest runs, besides
    /// those of the configured log and metrics; give it once for each
    #[arg(long, value_name = "DIR")]
    allow_dir: Vec<PathBuf>,
    /// User to change to once the host's files and devices are open: numbers or names
    #[arg(long, value_name = "UID[:GID]")]
    user: Option<User>,
    /// Inherited descriptor to leave open; give it once for each
    #[arg(long, value_name = "N")]
    keep_fd: Vec<RawFd>,
}

#[derive(Debug, Args)]
struct LogArgs {
    /// off, error, warning, info, debug or trace
    #[arg(long, value_name = "LEVEL", default_value = "warning")]
    log_level: LogLevel,
    /// Append the log to this file instead of standard error
    #[arg(long, value_name = "FILE")]
    log_file: Option<PathBuf>,
}

/// Runs a machine until it ends; its ending gives the exit status.
pub fn run(args: RunArgs) -> ExitCode {
    finish(try_run(args))
}

fn try_run(args: RunArgs) -> Result<ExitCode, Failure> {
    args.sandbox.harden()?;
    args.log.apply()?;
    let socket = args.api_socket.clone();
    let mut controller = new_controller(&args.log)?;
    let config = args.into_config()?;
    execute(&mut controller, configure(config), caused)?;
    controller.prepare_sandbox().map_err(not_confined)?;
    // Before the guest's first instruction: without a socket no guest has run, and no guest runs
    // whose socket cannot be created.
    let server = socket.map(|path| start_server(&path, &mut controller));
    let server = server.transpose()?;
    let manager = ServiceManager::connect();
    execute(&mut controller, Action::Lifecycle(Lifecycle::Start), caused)?;
    serve_until_end(controller, server, manager)
}

/// Serves the API until the machine it configures ends.
pub fn serve(args: ServeArgs) -> ExitCode {
    finish(try_serve(args))
}

fn try_serve(args: ServeArgs) -> Result<ExitCode, Failure> {
    args.sandbox.harden()?;
    args.log.apply()?;
    let mut controller = new_controller(&args.log)?;
    let config = served_config(args.config.as_deref(), args.sandbox)?;
    execute(&mut controller, configure(config), |error| {
        match &args.config {
            Some(path) => caused_in(path)(error),
            None => caused(error),
        }
    })?;
    controller.prepare_sandbox().map_err(not_confined)?;
    let server = start_server(&args.api_socket, &mut controller)?;
    serve_until_end(controller, Some(server), ServiceManager::connect())
}

/// Prints the plan of the configured machine.
pub fn check(args: &CheckArgs) -> ExitCode {
    finish(try_check(args))
}

fn try_check(args: &CheckArgs) -> Result<ExitCode, Failure> {
    let config = read_config(&args.config)?;
    let name = caused_in(&args.config);
    let plan = MachinePlan::resolve(&config).map_err(&name)?;
    let findings = inspect::machine(&plan, &config).map_err(|error| failed(error, &name))?;
    streams::print_line(&format!("{:#}", inspect::description(&plan)));
    for warning in &findings.warnings {
        print_error(format!("warning: {warning}"));
    }
    for line in &findings.not_examined {
        print_error(format!("not examined: {line}"));
    }
    Ok(ExitCode::SUCCESS)
}

/// The configuration with which `serve` starts.
fn served_config(path: Option<&Path>, sandbox: SandboxArgs) -> Result<VmConfig, Failure> {
    let mut config = path.map(read_config).transpose()?.unwrap_or_default();
    sandbox.apply_to(&mut config)?;
    Ok(config)
}

fn new_controller(log: &LogArgs) -> Result<Controller, Failure> {
    console::end_process_on_panic();
    let mut controller = Controller::new().map_err(anyhow::Error::from)?;
    if let Some(path) = &log.log_file {
        keep_accessible(&mut controller, path, Purpose::Files)?;
    }
    Ok(controller)
}

/// Keeps the directory of `path` accessible to the confined process.
fn keep_accessible(controller: &mut Controller, path: &Path, purpose: Purpose) -> Result<()> {
    let kept = controller.allow_beside(path, purpose);
    kept.with_context(|| format!("cannot open the directory of {}", path.display()))
}

fn start_server(path: &Path, controller: &mut Controller) -> Result<Server, Failure> {
    let socket = Socket::bind(path).map_err(caused)?;
    keep_accessible(controller, path, Purpose::Removal)?;
    let server = Server::start(socket, controller.client(), Limits::default());
    Ok(server.context("cannot serve the API")?)
}

fn serve_until_end(
    controller: Controller,
    server: Option<Server>,
    mut manager: ServiceManager,
) -> Result<ExitCode, Failure> {
    manager.ready();
    let ending = controller.run();
    manager.stopping();
    drop(server);
    match ending.status() {
        1 => Err(Failure::Other(anyhow!("{ending}"))),
        4 => {
            print_error(&ending);
            Ok(ExitCode::from(4))
        }
        status => Ok(ExitCode::from(status)),
    }
}

impl RunArgs {
    /// Reads the configuration file, if any, and applies the options to it.
    fn into_config(self) -> Result<VmConfig, Failure> {
        let mut config = match &self.config {
            Some(path) => read_config(path)?,
            None => VmConfig::default(),
        };
        if let Some(kernel) = self.kernel {
            let source = config.boot_source.get_or_insert_with(BootSource::default);
            source.kernel_image_path = utf8("--kernel", kernel)?;
        }
        match &mut config.boot_source {
            Some(source) => {
                if let Some(initrd) = self.initrd {
                    source.initrd_path = Some(utf8("--initrd", initrd)?);
                }
                source.typed = self.cmdline.is_some();
                source.boot_args = self.cmdline.or(source.boot_args.take());
            }
            None => return Err(usage("no kernel: give --kernel FILE or --config FILE")),
        }
        let machine = &mut config.machine_config;
        machine.vcpu_count = self.cpus.map_or(machine.vcpu_count, CpuCount::get);
        machine.mem_size_mib = self.memory.map_or(machine.mem_size_mib, MemorySize::mib);
        config.iommu = self.iommu.unwrap_or(config.iommu);
        config.drives.extend(self.disk);
        config.network_interfaces.extend(self.net);
        config.vsock = self.vsock.or(config.vsock);
        config.serial = self.serial.or(config.serial);
        self.sandbox.apply_to(&mut config)?;
        config.name_devices();
        if self.rng {
            config.entropy.get_or_insert_with(Entropy::default);
        }
        Ok(config)
    }
}

/// Files that a command opens by path.
#[derive(Debug, Default)]
pub struct Files {
    /// Files that are read, and written where the flag says so.
    pub files: Vec<(PathBuf, bool)>,
    /// Directories in which files and the API socket are made.
    pub directories: Vec<PathBuf>,
}

impl Files {
    fn of(config: &VmConfig) -> Self {
        let mut files = Self::default();
        if let Some(source) = &config.boot_source {
            files.read(&source.kernel_image_path);
            source.initrd_path.iter().for_each(|path| files.read(path));
        }
        for drive in &config.drives {
            let path = PathBuf::from(&drive.path_on_host);
            files.files.push((path, !drive.is_read_only));
        }
        let serial = config.serial.as_ref();
        let log = config.logger.as_ref();
        let metrics = config.metrics.as_ref();
        let outputs = [
            serial.and_then(|serial| serial.serial_out_path.as_ref()),
            log.and_then(|logger| logger.log_path.as_ref()),
            metrics.map(|metrics| &metrics.metrics_path),
        ];
        outputs
            .into_iter()
            .flatten()
            .for_each(|path| files.make(Path::new(path)));
        files
            .directories
            .extend(config.allow_dirs.iter().map(PathBuf::from));
        files
    }

    fn read(&mut self, path: impl Into<PathBuf>) {
        self.files.push((path.into(), false));
    }

    fn make(&mut self, path: &Path) {
        let directory = path.parent().unwrap_or(Path::new("/"));
        self.directories.push(directory.to_owned());
    }
}

impl RunArgs {
    /// Files of the command.
    ///
    /// # Errors
    /// The configuration file cannot be used.
    pub fn files(self) -> Result<Files, Failure> {
        let read = self.config.clone();
        let made = [self.api_socket.clone(), self.log.log_file.clone()];
        let mut files = Files::of(&self.into_config()?);
        read.into_iter().for_each(|path| files.read(path));
        made.iter().flatten().for_each(|path| files.make(path));
        Ok(files)
    }
}

impl ServeArgs {
    /// Files of the command. Those that clients name later are not among them.
    ///
    /// # Errors
    /// The configuration file cannot be used.
    pub fn files(self) -> Result<Files, Failure> {
        let mut files = Files::of(&served_config(self.config.as_deref(), self.sandbox)?);
        self.config.into_iter().for_each(|path| files.read(path));
        files.make(&self.api_socket);
        self.log.log_file.iter().for_each(|path| files.make(path));
        Ok(files)
    }
}

impl SandboxArgs {
    /// The first act of the process.
    fn harden(&self) -> Result<(), Failure> {
        let named = env::args_os().flat_map(|argument| sandbox::named_descriptors(&argument));
        let keep: Vec<RawFd> = named.chain(self.keep_fd.iter().copied()).collect();
        match sandbox::harden(&keep) {
            Err(error) if self.sandbox != Some(Sandbox::Off) => Err(not_confined(error)),
            _ => Ok(()),
        }
    }

    /// Replaces the configured mode and user if they are given, and adds the directories.
    fn apply_to(self, config: &mut VmConfig) -> Result<(), Failure> {
        config.sandbox = self.sandbox.unwrap_or(config.sandbox);
        config.user = self.user.or(config.user);
        for path in self.allow_dir {
            config.allow_dirs.push(utf8("--allow-dir", path)?);
        }
        Ok(())
    }
}

impl LogArgs {
    fn apply(&self) -> Result<(), Failure> {
        let path = self.log_file.clone();
        let settings = Logger {
            log_path: path.map(|path| utf8("--log-file", path)).transpose()?,
            level: Some(self.log_level),
            ..Logger::default()
        };
        logger::start();
        logger::configure(&settings)
            .map_err(|error| usage(format!("--log-file: {}", error.problem)))
    }
}

fn read_config(path: &Path) -> Result<VmConfig, Failure> {
    let text = host_file::read_text(path, MAX_CONFIG)
        .map_err(|error| usage(format!("{} {}", path.display(), Chain(&error))))?;
    VmConfig::from_json(&text).map_err(caused_in(path))
}

/// Converts a path to text, since the configuration is JSON.
fn utf8(flag: &str, path: PathBuf) -> Result<String, Failure> {
    path.into_os_string().into_string().map_err(|path| {
        let path = path.to_string_lossy();
        usage(format!("{flag}: {path} is not UTF-8; rename the file"))
    })
}

/// Error without an ending of the guest.
pub enum Failure {
    /// The command line or the configuration cannot be used.
    Usage(String),
    /// Any other error.
    Other(anyhow::Error),
}

impl Failure {
    /// Prints the error. Returns the exit status for it.
    pub fn report(self) -> ExitCode {
        match self {
            Self::Usage(message) => {
                print_error(&message);
                ExitCode::from(USAGE_STATUS)
            }
            Self::Other(error) => {
                print_error(Chain(error.as_ref()));
                ExitCode::FAILURE
            }
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Other(error)
    }
}

fn usage(message: impl Into<String>) -> Failure {
    Failure::Usage(message.into())
}

/// An error of the command line or the configuration, with its reason.
fn caused(error: impl Error) -> Failure {
    Failure::Usage(Chain(&error).to_string())
}

/// Adds the file at `path` to an error.
fn caused_in(path: &Path) -> impl Fn(ConfigError) -> Failure {
    move |error| usage(format!("{}: {}", path.display(), Chain(&error)))
}

fn configure(config: VmConfig) -> Action {
    Action::configure(Configure::All(Box::new(config)))
}

/// Performs an action; `named` adds the source of a refused value.
fn execute(
    controller: &mut Controller,
    action: Action,
    named: impl Fn(ConfigError) -> Failure,
) -> Result<(), Failure> {
    let outcome = controller.execute(action);
    outcome.map(drop).map_err(|error| failed(error, named))
}

/// Converts the error of an action; `named` adds the source of a refused value.
fn failed(error: impl Into<ActionError>, named: impl Fn(ConfigError) -> Failure) -> Failure {
    match error.into() {
        ActionError::Invalid(error) => named(error),
        other => Failure::Other(other.into()),
    }
}

fn not_confined(error: SandboxError) -> Failure {
    Failure::Other(error.into())
}

fn finish(outcome: Result<ExitCode, Failure>) -> ExitCode {
    console::restore_terminal();
    logger::finish();
    outcome.unwrap_or_else(Failure::report)
}
