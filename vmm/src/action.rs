//! What can be asked of a machine, and what it answers, as plain data.
//!
//! The API thread and the command line make [`Action`]s; the controller, on the event loop,
//! takes them from an [`Inbox`] and answers each with a [`Reply`] or an [`ActionError`]. Neither
//! side knows the other's types: no HTTP here, no KVM there.

mod channel;
mod error;
mod metrics;
mod reply;
mod report;
mod request;
mod state;

pub use channel::{Call, Client, Inbox, SendError, channel};
pub use error::ActionError;
pub use metrics::{MetricFamily, MetricKind, Sample, metrics_json};
pub use reply::{InstanceInfo, Outcome, Reply};
pub use report::{
    Ats, DeviceKind, EndpointCounters, EndpointInfo, EndpointState, Feature, Hex, IommuInfo,
    Mapping, MappingsPage, Permissions, Registration, RegistrationKind,
};
pub use request::{Action, Configure, Lifecycle, MAX_MAPPINGS_PAGE, Query};
pub use state::MachineState;

#[cfg(test)]
mod tests;
