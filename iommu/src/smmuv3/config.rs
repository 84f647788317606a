//! What an SMMU offers.

use serde::{Deserialize, Serialize};

/// Bits of a StreamID: a PCI requester ID.
pub(super) const STREAM_BITS: u32 = 16;
/// Bits of a SubstreamID: a PASID.
pub(super) const SUBSTREAM_BITS: u32 = 20;

/// Which stages are offered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stages {
    /// Stage 1 only.
    #[default]
    One,
    /// Stage 2 only.
    Two,
    /// Both, also nested.
    Nested,
}

/// Bits of a physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum AddressSize {
    /// 44 bits.
    Bits44,
    /// 48 bits.
    #[default]
    Bits48,
    /// 52 bits, with 64 KiB granules; virtual addresses too.
    Bits52,
}

/// Configuration that is fixed while the machine runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SmmuConfig {
    /// Which stages are offered.
    pub stages: Stages,
    /// ATS is offered.
    pub ats: bool,
    /// PRI is offered; needs ATS.
    pub pri: bool,
    /// Bits of a physical address.
    pub address_size: AddressSize,
}

impl SmmuConfig {
    /// Whether stage 1 is offered.
    #[must_use]
    pub const fn stage1(&self) -> bool {
        !matches!(self.stages, Stages::Two)
    }

    /// Whether stage 2 is offered.
    #[must_use]
    pub const fn stage2(&self) -> bool {
        !matches!(self.stages, Stages::One)
    }

    /// Whether the EL2 regimes are offered; they come with both stages.
    #[must_use]
    pub const fn hyp(&self) -> bool {
        matches!(self.stages, Stages::Nested)
    }

    /// Whether PRI is offered.
    #[must_use]
    pub const fn pri(&self) -> bool {
        self.ats && self.pri
    }

    /// Bits of a physical address, and of an intermediate one.
    #[must_use]
    pub const fn address_bits(&self) -> u32 {
        match self.address_size {
            AddressSize::Bits44 => 44,
            AddressSize::Bits48 => 48,
            AddressSize::Bits52 => 52,
        }
    }

    /// Bits of a SubstreamID.
    #[must_use]
    pub const fn substream_bits(&self) -> u32 {
        if self.stage1() { SUBSTREAM_BITS } else { 0 }
    }
}
