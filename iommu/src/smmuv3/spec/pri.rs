//! Records of the PRI queue (§8).

use super::field::{Field, raw};

raw! {
    /// A record of the PRI queue as it is in the queue.
    RawPageRequest, 2
}

/// StreamID.
pub const SID: Field<RawPageRequest> = Field::new(31, 0);
/// SubstreamID.
pub const SSID: Field<RawPageRequest> = Field::new(51, 32);
/// Reading is asked for.
pub const READ: Field<RawPageRequest> = Field::new(60, 60);
/// Writing is asked for.
pub const WRITE: Field<RawPageRequest> = Field::new(61, 61);
/// Last of its group.
pub const LAST: Field<RawPageRequest> = Field::new(62, 62);
/// There is a SubstreamID.
pub const SSV: Field<RawPageRequest> = Field::new(63, 63);
/// Group.
pub const PRG_INDEX: Field<RawPageRequest> = Field::new(72, 64);
/// Address, in place.
pub const ADDRESS: Field<RawPageRequest> = Field::new(127, 76);
