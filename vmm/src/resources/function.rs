//! The host's resources for each PCI function: image, tap or vhost files. The
//! device that uses them owns them.

use std::io;
use std::sync::Arc;

use devices::error::Chain;
use devices::tap::{Tap, TapError};
use devices::vhost::VhostContext;
use devices::vhost::sys::OpenError;
use devices::vhost::worker::VhostWorker;
use devices::virtio::VirtioDevice;
use devices::virtio::block::{Block, BlockConfig, Image};
use devices::virtio::net::{Net, NetConfig};
use devices::virtio::rng::Rng;
use devices::virtio::vsock::{Vsock, VsockError};
use iommu::GuestRam;

use crate::build_error::BuildError;
use crate::config::ConfigError;
use crate::plan::{DevicePlan, FunctionPlan, MachinePlan};

/// A device that is not yet on a bus.
pub(crate) struct AcquiredFunction {
    /// `None` for the virtio-iommu, which needs no resource of the host.
    pub(crate) device: Option<Box<dyn VirtioDevice>>,
    /// Settings that may be mistakes, one line each.
    pub(crate) warnings: Vec<String>,
}

/// Error of acquiring a function's resources.
pub(crate) enum Refusal {
    /// The host does not have the device, or this user may not open it.
    Unavailable(ConfigError),
    /// Any other fault.
    Fault(BuildError),
}

impl Refusal {
    pub(crate) fn into_error(self) -> BuildError {
        match self {
            Self::Unavailable(error) => error.into(),
            Self::Fault(error) => error,
        }
    }

    fn of_tap(field: String, error: &TapError) -> Self {
        let fault = ConfigError::new(field, Chain(error).to_string());
        match error {
            TapError::NoTun
            | TapError::TunDenied
            | TapError::Missing { .. }
            | TapError::Denied(_) => Self::Unavailable(fault),
            _ => Self::Fault(fault.into()),
        }
    }

    fn of_vhost(field: &str, error: &OpenError) -> Self {
        let fault = ConfigError::new(field, Chain(error).to_string());
        match error {
            OpenError::Missing(_) | OpenError::Denied(_) => Self::Unavailable(fault),
            OpenError::Other { .. } => Self::Fault(fault.into()),
        }
    }
}

impl<E: Into<BuildError>> From<E> for Refusal {
    fn from(error: E) -> Self {
        Self::Fault(error.into())
    }
}

/// Starts the thread that the vhost devices of `plan` share; `None` in a
/// machine without such devices. `ram` is the memory that they access.
///
/// # Errors
/// No file descriptor or thread is available.
pub(crate) fn vhost_context(
    plan: &MachinePlan,
    ram: &Arc<GuestRam>,
) -> io::Result<Option<VhostContext>> {
    let is_vhost =
        |f: &FunctionPlan| matches!(f.device, DevicePlan::Net { .. } | DevicePlan::Vsock { .. });
    if !plan.functions.iter().any(is_vhost) {
        return Ok(None);
    }
    Ok(Some(VhostContext {
        ram: Arc::clone(ram),
        worker: Arc::new(VhostWorker::start()?),
        prefill: plan.iommu.prefill,
        prefetch: plan.iommu.prefetch,
        vcpus: plan.vcpus.into(),
    }))
}

/// Opens the function's resources on the host. `vhost` is the [`vhost_context`]
/// of the machine.
///
/// # Errors
/// A resource is not available; named by its field in the configuration.
pub(crate) fn acquire(
    plan: &FunctionPlan,
    vhost: Option<&VhostContext>,
) -> Result<AcquiredFunction, Refusal> {
    let vhost = || vhost.ok_or(io::Error::from(io::ErrorKind::NotFound));
    let mut warnings = Vec::new();
    let id = &plan.id;
    let device: Option<Box<dyn VirtioDevice>> = match &plan.device {
        DevicePlan::VirtioIommu => None,
        DevicePlan::Block {
            path,
            read_only,
            queues,
            flush,
        } => {
            let image = Image::open(path, *read_only).map_err(|error| {
                ConfigError::of_file(format!("drives[{id}].path_on_host"), path, &error)
            })?;
            let named = |warning| format!("drives[{id}]: {} {warning}", path.display());
            warnings.extend(image.doubts().into_iter().map(named));
            let config = BlockConfig {
                id: id.clone(),
                queues: *queues,
                flush: *flush,
            };
            Some(Box::new(Block::new(&config, image)?))
        }
        DevicePlan::Net {
            tap,
            mac,
            mtu,
            pairs,
        } => {
            let config = NetConfig {
                id: id.clone(),
                mac: mac.octets(),
                mtu: *mtu,
                pairs: *pairs,
            };
            Some(Box::new(net(tap, config, vhost()?)?))
        }
        DevicePlan::Vsock { cid } => {
            let vsock = Vsock::new(*cid, vhost()?).map_err(|error| match &error {
                VsockError::Open(open) => Refusal::of_vhost("vsock.guest_cid", open),
                _ => ConfigError::new("vsock.guest_cid", Chain(&error).to_string()).into(),
            })?;
            Some(Box::new(vsock))
        }
        DevicePlan::Entropy => Some(Box::new(Rng::new()?)),
    };
    Ok(AcquiredFunction { device, warnings })
}

/// Opens the tap and the host's vhost-net.
fn net(tap: &str, config: NetConfig, context: &VhostContext) -> Result<Net, Refusal> {
    let field = format!("network-interfaces[{}]", config.id);
    let pairs = usize::from(config.pairs);
    let tap = Tap::open(tap, pairs, config.mtu)
        .map_err(|error| Refusal::of_tap(format!("{field}.host_dev_name"), &error))?;
    Net::new(config, tap, context).map_err(|error| Refusal::of_vhost(&field, &error))
}
