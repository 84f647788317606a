//! Checks the files and devices of the host that a configuration names.
//!
//! A missing file is refused when it is configured, as Firecracker does, and
//! not only when the machine starts. [`machine`] checks more, for `portcullis
//! check`: it acquires what a start acquires, and releases it.

use std::io;
use std::path::Path;
use std::sync::Arc;

use devices::host_file;
use devices::virtio::block::Image;
use iommu::GuestRam;
use serde_json::{Value, json};
use vm_memory::GuestAddress;

use crate::action::{Configure, Hex};
use crate::build_error::BuildError;
use crate::config::{BootSource, ConfigError, Drive, Serial, VmConfig};
use crate::plan::{Console, DevicePlan, FunctionPlan, MachinePlan};
use crate::resources::{BootFiles, Refusal, acquire, vhost_context};
use crate::sandbox::directories::Directories;

const CONSOLE_FIELD: &str = "serial.serial_out_path";

/// Refuses a change that names an unusable file. Opens what exists, creates
/// nothing, takes no lock. The controller opens log and metrics at once.
///
/// # Errors
/// The file cannot be used; named by its field.
pub(crate) fn change(change: &Configure) -> Result<(), ConfigError> {
    match change {
        Configure::All(config) => {
            config.boot_source.iter().try_for_each(boot_source)?;
            config.drives.iter().try_for_each(image)?;
            Directories::default().allow_configured(config)?;
            config.serial.iter().try_for_each(console)
        }
        Configure::BootSource(source) => boot_source(source),
        Configure::Drive(drive) => image(drive),
        Configure::Serial(serial) => console(serial),
        _ => Ok(()),
    }
}

fn boot_source(source: &BootSource) -> Result<(), ConfigError> {
    let initrd = source.initrd_path.as_deref().map(Path::new);
    BootFiles::open(Path::new(&source.kernel_image_path), initrd).map(drop)
}

fn image(drive: &Drive) -> Result<(), ConfigError> {
    let path = Path::new(&drive.path_on_host);
    Image::check(path, drive.is_read_only).map_err(|error| {
        let field = format!("drives[{}].path_on_host", drive.drive_id);
        ConfigError::of_file(field, path, &error)
    })
}

fn console(serial: &Serial) -> Result<(), ConfigError> {
    match &serial.serial_out_path {
        Some(path) => existing_output(CONSOLE_FIELD, Path::new(path)).map(drop),
        None => Ok(()),
    }
}

/// Whether an output exists. One that exists and cannot be appended to is
/// refused.
fn existing_output(field: &str, path: &Path) -> Result<bool, ConfigError> {
    if !path.exists() {
        return Ok(false);
    }
    let opened = host_file::open_output(path);
    opened.map_err(|error| ConfigError::of_file(field, path, &error))?;
    Ok(true)
}

/// Result of [`machine`] for a machine that can be built.
#[derive(Debug, Default)]
pub struct Findings {
    /// Settings that may be mistakes, one line each.
    pub warnings: Vec<String>,
    /// Resources that only a start can check, one line each.
    pub not_examined: Vec<String>,
}

/// Acquires and releases the resources of a start that are available without
/// one, all at once: kernel, initial ramdisk, images with their locks, taps,
/// vhost devices. Creates nothing but missing taps, which are removed again.
///
/// # Errors
/// The first resource that cannot be used, named by its field.
pub fn machine(plan: &MachinePlan, config: &VmConfig) -> Result<Findings, BuildError> {
    let mut findings = Findings::default();
    BootFiles::open(&plan.boot.kernel, plan.boot.initrd.as_deref())?;
    acquire_functions(plan, &mut findings)?;
    let console = match &plan.console {
        Console::File { path, .. } => Some((CONSOLE_FIELD, path.as_path())),
        Console::Stdio => None,
    };
    let log = config.logger.as_ref().and_then(|it| it.log_path.as_ref());
    let metrics = config.metrics.as_ref().map(|it| &it.metrics_path);
    let log = log.map(|path| ("logger.log_path", Path::new(path)));
    let metrics = metrics.map(|path| ("metrics.metrics_path", Path::new(path)));
    for (field, path) in [console, log, metrics].into_iter().flatten() {
        if !existing_output(field, path)? {
            let line = format!("{field}: {} does not exist and is not made", path.display());
            findings.not_examined.push(line);
        }
    }
    let rest = "KVM, guest memory and what the kernel file contains";
    findings.not_examined.push(rest.to_owned());
    Ok(findings)
}

/// Acquires the resources of all functions at once, so that two functions with
/// the same resource are refused, and releases them.
fn acquire_functions(plan: &MachinePlan, findings: &mut Findings) -> Result<(), BuildError> {
    // A vhost file needs a memory table; one page is enough.
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 4096)]).map_err(io::Error::other)?;
    let vhost = vhost_context(plan, &Arc::new(ram))?;
    let mut acquired = Vec::new();
    for function in &plan.functions {
        match acquire(function, vhost.as_ref()) {
            Ok(function) => acquired.push(function),
            Err(Refusal::Unavailable(why)) => findings.not_examined.push(why.to_string()),
            Err(Refusal::Fault(error)) => return Err(error),
        }
    }
    let warnings = acquired.into_iter().flat_map(|function| function.warnings);
    findings.warnings.extend(warnings);
    Ok(())
}

/// The plan as `portcullis check` prints it.
#[must_use]
pub fn description(plan: &MachinePlan) -> Value {
    let memory = plan.memory.iter();
    let memory = memory.map(|range| json!({"base": Hex(range.base), "size": Hex(range.size)}));
    let boot = &plan.boot;
    json!({
        "vcpus": plan.vcpus,
        "memory": memory.collect::<Vec<_>>(),
        "mem_backing": plan.mem_backing,
        "huge_pages": plan.huge_pages,
        "boot": {"kernel": boot.kernel, "initrd": boot.initrd, "cmdline": boot.cmdline},
        "console": match &plan.console {
            Console::Stdio => json!("stdio"),
            Console::File { path, max_bytes } => {
                json!({"file": {"path": path, "max_bytes": max_bytes}})
            }
        },
        "iommu": plan.iommu,
        "functions": plan.functions.iter().map(function).collect::<Vec<_>>(),
    })
}

fn function(plan: &FunctionPlan) -> Value {
    let device = match &plan.device {
        DevicePlan::VirtioIommu => json!("virtio-iommu"),
        DevicePlan::Block {
            path,
            read_only,
            queues,
            flush,
        } => json!({"block": {
            "path": path, "read_only": read_only, "queues": queues, "flush": flush
        }}),
        DevicePlan::Net {
            tap,
            mac,
            mtu,
            pairs,
        } => json!({"net": {
            "tap": tap, "mac": mac.to_string(), "mtu": mtu, "pairs": pairs
        }}),
        DevicePlan::Vsock { cid } => json!({"vsock": {"cid": cid}}),
        DevicePlan::Entropy => json!("entropy"),
    };
    json!({"slot": plan.slot, "id": plan.id, "iommu": plan.iommu, "device": device})
}

#[cfg(test)]
mod tests;
