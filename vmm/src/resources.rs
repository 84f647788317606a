//! The host's resources for a machine: opened, allocated and created in one
//! step, before they are connected.

mod boot;
mod function;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use arch::Cache;
use devices::host_file;
use iommu::GuestRam;

pub(crate) use self::boot::BootFiles;
pub(crate) use self::function::{AcquiredFunction, Refusal, acquire, vhost_context};
use crate::build_error::BuildError;
use crate::config::{ConfigError, HugePages};
use crate::console::Output;
use crate::kvm::{self, Vcpu, Vm};
use crate::plan::{Console, MachinePlan};

/// The resources of one machine, released when dropped.
pub(crate) struct HostResources {
    pub(crate) boot: BootFiles,
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) vm: Arc<Vm>,
    /// vCPUs that are not set up yet.
    pub(crate) vcpus: Vec<Vcpu>,
    /// Caches of the vCPUs, from [`Vcpu::caches`].
    pub(crate) caches: Vec<Cache>,
    /// Random bytes for the guest, which may have no other source of entropy.
    pub(crate) seed: [u8; 32],
    pub(crate) output: Arc<Output>,
    /// The devices of [`MachinePlan::functions`], in their order.
    pub(crate) functions: Vec<AcquiredFunction>,
}

impl HostResources {
    /// Opens every file, device, tap, vhost file and image of `plan`, allocates
    /// the guest's RAM and creates the VM.
    ///
    /// # Errors
    /// The first resource that is not available, by its field in the
    /// configuration.
    pub(crate) fn acquire(plan: &MachinePlan) -> Result<Self, BuildError> {
        let boot = BootFiles::open(&plan.boot.kernel, plan.boot.initrd.as_deref())?;
        let ram = Arc::new(allocate_ram(plan)?);
        let (vm, vcpus) = Vm::new(&ram, u32::from(plan.vcpus))?;
        let (file, room) = open_output(&plan.console)?;
        let output = Output::start(file, room).map_err(BuildError::Console)?;
        let mut seed = [0; 32];
        devices::random::fill(&mut seed)?;
        let vhost = vhost_context(plan, &ram)?;
        let mut functions = Vec::new();
        for function in &plan.functions {
            let acquired = acquire(function, vhost.as_ref()).map_err(Refusal::into_error)?;
            for warning in &acquired.warnings {
                log::warn!("{warning}");
            }
            functions.push(acquired);
        }
        Ok(Self {
            boot,
            ram,
            caches: vcpus.first().map_or_else(Vec::new, Vcpu::caches),
            vm,
            vcpus,
            seed,
            output,
            functions,
        })
    }
}

fn allocate_ram(plan: &MachinePlan) -> Result<GuestRam, kvm::Error> {
    let huge = plan.huge_pages == HugePages::TwoMib;
    kvm::allocate(&plan.memory, plan.mem_backing, huge)
}

/// Opens the console's output. Returns the number of bytes that it may still
/// receive, if that is limited.
fn open_output(console: &Console) -> Result<(File, Option<u64>), BuildError> {
    match console {
        Console::Stdio => {
            let copy = io::stdout().as_fd().try_clone_to_owned();
            let file = copy.map(File::from).map_err(BuildError::Console)?;
            Ok((file, None))
        }
        Console::File { path, max_bytes } => {
            let field = "serial.serial_out_path";
            let opened = host_file::open_output(path);
            let file = opened.map_err(|error| ConfigError::of_file(field, path, &error))?;
            let metadata = file.metadata().map_err(BuildError::Console)?;
            if max_bytes.is_some() && !metadata.is_file() {
                let problem = format!("{} is no regular file; leave it out", path.display());
                return Err(ConfigError::new("serial.serial_out_max_mib", problem).into());
            }
            let room = max_bytes.map(|max| max.saturating_sub(metadata.len()));
            Ok((file, room))
        }
    }
}
