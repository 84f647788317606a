//! Requests to the controller.

use super::error::ActionError;
use super::state::MachineState;
use crate::config::{
    BootSource, ConfigError, Drive, Entropy, Iommu, Logger, MachineConfig, MachineConfigUpdate,
    Metrics, NetworkInterface, Serial, VmConfig, Vsock,
};

/// Most mappings one [`MappingsPage`] can hold.
pub const MAX_MAPPINGS_PAGE: u32 = 1000;

/// A request to the controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Changes what the machine will be. Possible before it starts, but for log and metrics.
    Configure(Box<Configure>),
    /// Starts, holds, releases or ends the machine.
    Lifecycle(Lifecycle),
    /// Asks, and changes nothing. Possible in every state.
    Query(Query),
}

/// A change to the configuration. A device whose identifier exists already is replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Configure {
    /// Replaces processors and memory.
    MachineConfig(MachineConfig),
    /// Changes some fields of processors and memory.
    MachineConfigUpdate(MachineConfigUpdate),
    /// Sets what to boot.
    BootSource(BootSource),
    /// Sets the IOMMU.
    Iommu(Iommu),
    /// Adds or replaces a drive.
    Drive(Drive),
    /// Adds or replaces a network interface.
    NetworkInterface(NetworkInterface),
    /// Sets the vsock device.
    Vsock(Vsock),
    /// Sets the entropy device.
    Entropy(Entropy),
    /// Sets where the console goes.
    Serial(Serial),
    /// Sets the log. Possible in every state; takes effect at once.
    Logger(Logger),
    /// Sets where metrics are written. Possible in every state; takes effect at once.
    Metrics(Metrics),
}

/// A step in the life of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifecycle {
    /// Builds the machine and runs it.
    Start,
    /// Holds the processors. Without effect on a paused machine.
    Pause,
    /// Releases the processors. Without effect on a running machine.
    Resume,
    /// Ends the machine and the monitor, in any state; the exit status is 0.
    Stop,
    /// Asks the guest to shut down, as pressing Ctrl-Alt-Del or the power button does.
    SendCtrlAltDel,
    /// Writes the metrics to their file now.
    FlushMetrics,
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Query {
    /// [`Reply::InstanceInfo`](super::Reply::InstanceInfo).
    InstanceInfo,
    /// [`Reply::Version`](super::Reply::Version).
    Version,
    /// [`Reply::VmConfig`](super::Reply::VmConfig).
    VmConfig,
    /// [`Reply::Metrics`](super::Reply::Metrics).
    Metrics,
    /// [`Reply::Iommu`](super::Reply::Iommu).
    Iommu,
    /// [`Reply::Endpoint`](super::Reply::Endpoint). Names an endpoint as [`IommuInfo::find`](super::IommuInfo::find) reads it.
    Endpoint(String),
    /// [`Reply::Mappings`](super::Reply::Mappings).
    Mappings {
        /// Names an endpoint as [`IommuInfo::find`](super::IommuInfo::find) reads it.
        endpoint: String,
        /// Only mappings that start above this IOVA; from the lowest if left out.
        after: Option<u64>,
        /// Most mappings to return, 1 to [`MAX_MAPPINGS_PAGE`].
        limit: u32,
    },
}

impl Action {
    /// A configuration action.
    pub fn configure(change: Configure) -> Self {
        Self::Configure(Box::new(change))
    }

    /// What is asked, as a noun for logs and errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Configure(change) => change.name(),
            Self::Lifecycle(Lifecycle::Start) => "starting",
            Self::Lifecycle(Lifecycle::Pause) => "pausing",
            Self::Lifecycle(Lifecycle::Resume) => "resuming",
            Self::Lifecycle(Lifecycle::Stop) => "stopping",
            Self::Lifecycle(Lifecycle::SendCtrlAltDel) => "Ctrl-Alt-Del",
            Self::Lifecycle(Lifecycle::FlushMetrics) => "flushing metrics",
            Self::Query(_) => "a query",
        }
    }

    /// Refuses what cannot be done in `state`. The controller calls it before all else.
    pub fn check_state(&self, state: MachineState) -> Result<(), ActionError> {
        let possible = match self {
            Self::Configure(change) => match **change {
                Configure::Logger(_) | Configure::Metrics(_) => true,
                _ => state == MachineState::NotStarted,
            },
            Self::Lifecycle(Lifecycle::Start) => state == MachineState::NotStarted,
            Self::Lifecycle(Lifecycle::Pause | Lifecycle::Resume) => {
                state != MachineState::NotStarted
            }
            Self::Lifecycle(Lifecycle::SendCtrlAltDel) => state == MachineState::Running,
            Self::Lifecycle(Lifecycle::Stop | Lifecycle::FlushMetrics) | Self::Query(_) => true,
        };
        if possible {
            Ok(())
        } else {
            Err(ActionError::WrongState {
                action: self.name(),
                state,
            })
        }
    }
}

impl Configure {
    /// What is changed, as a noun for logs and errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::MachineConfig(_) | Self::MachineConfigUpdate(_) => "changing machine-config",
            Self::BootSource(_) => "changing boot-source",
            Self::Iommu(_) => "changing iommu",
            Self::Drive(_) => "changing drives",
            Self::NetworkInterface(_) => "changing network-interfaces",
            Self::Vsock(_) => "changing vsock",
            Self::Entropy(_) => "changing entropy",
            Self::Serial(_) => "changing serial",
            Self::Logger(_) => "changing logger",
            Self::Metrics(_) => "changing metrics",
        }
    }

    /// Makes the change in `config`, or leaves `config` untouched and says why. The whole
    /// machine is validated with the change in it.
    pub fn apply_to(self, config: &mut VmConfig) -> Result<(), ConfigError> {
        let mut changed = config.clone();
        match self {
            Self::MachineConfig(machine_config) => changed.machine_config = machine_config,
            Self::MachineConfigUpdate(update) => {
                changed.machine_config = update.applied_to(&config.machine_config);
            }
            Self::BootSource(boot_source) => changed.boot_source = Some(boot_source),
            Self::Iommu(iommu) => changed.iommu = iommu,
            Self::Drive(drive) => {
                let same = |known: &Drive| known.drive_id == drive.drive_id;
                let index = changed.drives.iter().position(same);
                replace_or_push(&mut changed.drives, index, drive);
            }
            Self::NetworkInterface(interface) => {
                let interfaces = &mut changed.network_interfaces;
                let same = |known: &NetworkInterface| known.iface_id == interface.iface_id;
                let index = interfaces.iter().position(same);
                replace_or_push(interfaces, index, interface);
            }
            Self::Vsock(vsock) => changed.vsock = Some(vsock),
            Self::Entropy(entropy) => changed.entropy = Some(entropy),
            Self::Serial(serial) => changed.serial = Some(serial),
            Self::Logger(logger) => changed.logger = Some(logger),
            Self::Metrics(metrics) => changed.metrics = Some(metrics),
        }
        changed.validate()?;
        *config = changed;
        Ok(())
    }
}

fn replace_or_push<T>(items: &mut Vec<T>, index: Option<usize>, item: T) {
    match index.and_then(|index| items.get_mut(index)) {
        Some(known) => *known = item,
        None => items.push(item),
    }
}
