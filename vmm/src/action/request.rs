//! Requests to the controller.

use super::error::ActionError;
use super::state::MachineState;
use crate::config::{
    BootSource, ConfigError, Drive, Entropy, Iommu, Logger, MachineConfig, MachineConfigUpdate,
    Metrics, NetworkInterface, Serial, VmConfig, Vsock,
};

/// Upper bound on the mappings of one [`MappingsPage`](super::MappingsPage).
pub const MAX_MAPPINGS_PAGE: u32 = 1000;

/// A request to the controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Changes the configuration. Only before the start, except for log and metrics.
    Configure(Box<Configure>),
    /// Starts, pauses, resumes or ends the machine.
    Lifecycle(Lifecycle),
    /// Reads state and changes nothing. Possible in every state.
    Query(Query),
}

/// A change to the configuration. A device whose identifier exists already is replaced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Configure {
    /// Replaces the whole configuration: the command line's change.
    All(Box<VmConfig>),
    /// Replaces processors and memory.
    MachineConfig(MachineConfig),
    /// Changes some fields of processors and memory.
    MachineConfigUpdate(MachineConfigUpdate),
    /// Sets kernel, initial ramdisk and command line.
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
    /// Sets the output of the serial console.
    Serial(Serial),
    /// Sets the log. Possible in every state; takes effect at once.
    Logger(Logger),
    /// Sets the metrics file. Possible in every state; takes effect at once.
    Metrics(Metrics),
}

/// A change of the machine's state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lifecycle {
    /// Builds the machine and runs it.
    Start,
    /// Pauses the vCPUs. Without effect on a paused machine.
    Pause,
    /// Resumes the vCPUs. Without effect on a running machine.
    Resume,
    /// Ends the machine and the monitor, in any state; the exit status is 0.
    Stop,
    /// Asks the guest to shut down, as pressing Ctrl-Alt-Del or the power button does.
    SendCtrlAltDel,
    /// Writes the metrics to their file now.
    FlushMetrics,
}

/// A request that reads state; each variant names its reply.
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
        /// Upper bound on the mappings of the page, 1 to [`MAX_MAPPINGS_PAGE`], inclusive.
        limit: u32,
    },
}

impl Action {
    /// Creates a configuration action.
    pub fn configure(change: Configure) -> Self {
        Self::Configure(Box::new(change))
    }

    /// Name of the action, as a noun for logs and errors.
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

    /// Refuses an action that `state` does not permit. The controller calls it first.
    ///
    /// # Errors
    /// [`ActionError::WrongState`].
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
    /// Name of the changed section, as a noun for logs and errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::All(_) => "configuring",
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

    /// Applies the change to `config` and validates the whole machine.
    ///
    /// # Errors
    /// A value is refused; `config` is unchanged.
    pub fn apply_to(self, config: &mut VmConfig) -> Result<(), ConfigError> {
        let mut changed = config.clone();
        match self {
            Self::All(config) => changed = *config,
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
