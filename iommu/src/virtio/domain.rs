//! Domains (virtio 1.2 §5.13.1).

use std::collections::BTreeSet;

use super::mappings::Mappings;
use crate::addr::StreamId;

/// A domain. It exists while an endpoint is attached to it.
#[derive(Clone, Debug, Default)]
pub(super) struct Domain {
    /// Addresses are guest-physical; there are no mappings.
    pub bypass: bool,
    /// Endpoints that are attached.
    pub endpoints: BTreeSet<StreamId>,
    /// Mappings of the domain.
    pub mappings: Mappings,
}
