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
/// Read permission is requested.
pub(crate) const READ: Field<RawPageRequest> = Field::new(60, 60);
/// Write permission is requested.
pub(crate) const WRITE: Field<RawPageRequest> = Field::new(61, 61);
/// Last of its group.
pub(crate) const LAST: Field<RawPageRequest> = Field::new(62, 62);
/// SSID is valid.
pub(crate) const SSV: Field<RawPageRequest> = Field::new(63, 63);
/// Page request group index.
pub(crate) const PRG_INDEX: Field<RawPageRequest> = Field::new(72, 64);
/// Address, in place.
pub(crate) const ADDRESS: Field<RawPageRequest> = Field::new(127, 76);
