//! Replies to actions.

use super::error::ActionError;
use super::metrics::MetricFamily;
use super::report::{EndpointInfo, IommuInfo, MappingsPage};
use super::state::MachineState;
use crate::config::{Sandbox, VmConfig};
use serde::{Deserialize, Serialize};

/// Identity and state of a machine (`GET /`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceInfo {
    /// The monitor's name.
    pub app_name: String,
    /// The machine's name.
    pub id: String,
    /// State of the machine.
    pub state: MachineState,
    /// The monitor's version.
    pub vmm_version: String,
    /// Confinement of the process.
    pub sandbox: Sandbox,
}

/// Reply to an [`Action`](super::Action) that succeeded.
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// The action is done and returns no data.
    Done,
    /// To [`Query::InstanceInfo`](super::Query::InstanceInfo).
    InstanceInfo(InstanceInfo),
    /// To [`Query::Version`](super::Query::Version): the monitor's version.
    Version(String),
    /// To [`Query::VmConfig`](super::Query::VmConfig).
    VmConfig(Box<VmConfig>),
    /// To [`Query::Metrics`](super::Query::Metrics).
    Metrics(Vec<MetricFamily>),
    /// To [`Query::Iommu`](super::Query::Iommu).
    Iommu(IommuInfo),
    /// To [`Query::Endpoint`](super::Query::Endpoint).
    Endpoint(Box<EndpointInfo>),
    /// To [`Query::Mappings`](super::Query::Mappings).
    Mappings(MappingsPage),
}

/// Result of an action.
pub type Outcome = Result<Reply, ActionError>;
