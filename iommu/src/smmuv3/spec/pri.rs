//! Records of the PRI queue (§8).

use super::field::{Field, raw};

raw! {
    /// A record of the PRI queue as it is in the queue.
    RawPageRequest, 2
}

/// StreamID.
pub(crate) const SID: Field<RawPageRequest> = Field::new(31, 0);
/// SubstreamID.
pub(crate) const SSID: Field<RawPageRequest> = Field::new(51, 32);
/// Reading is asked for.
pub(crate) const READ: Field<RawPageRequest> = Field::new(60, 60);
/// Writing is asked for.
pub(crate) const WRITE: Field<RawPageRequest> = Field::new(61, 61);
/// Last of its group.
pub(crate) const LAST: Field<RawPageRequest> = Field::new(62, 62);
/// There is a SubstreamID.
pub(crate) const SSV: Field<RawPageRequest> = Field::new(63, 63);
/// Group.
pub(crate) const PRG_INDEX: Field<RawPageRequest> = Field::new(72, 64);
/// Address, in place.
pub(crate) const ADDRESS: Field<RawPageRequest> = Field::new(127, 76);
