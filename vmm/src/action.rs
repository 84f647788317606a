//! Actions on a machine and the replies to them, as plain data.
//!
//! The API thread and the command line create [`Action`]s. The controller, on the event loop, takes
//! them from an [`Inbox`] and answers each with a [`Reply`] or an [`ActionError`]. These types
//! contain neither HTTP nor KVM.

mod channel;
mod error;
mod metrics;
mod reply;
mod report;
mod request;
mod state;

pub use channel::{Call, Client, Inbox, SendError, channel};
pub use error::ActionError;
pub(crate) use metrics::metrics_json;
pub use metrics::{MetricFamily, MetricKind, Sample};
pub use reply::{InstanceInfo, Outcome, Reply};
pub use report::{
    Ats, DeviceKind, EndpointCounters, EndpointInfo, EndpointState, Feature, Hex, IommuInfo,
    Mapping, MappingsPage, Permissions, Registration, RegistrationKind,
};
pub use request::{Action, Configure, Lifecycle, MAX_MAPPINGS_PAGE, Query};
pub use state::MachineState;

#[cfg(test)]
mod tests;
