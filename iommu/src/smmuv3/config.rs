//! Features of an SMMU that its identification registers report (IHI 0070
//! §6.3.1 to §6.3.6).

use std::fmt;

use serde::{Deserialize, Serialize};

/// Bits of a StreamID: a PCI requester ID.
pub(super) const STREAM_BITS: u32 = 16;
/// Bits of a SubstreamID: a PASID.
pub(super) const SUBSTREAM_BITS: u32 = 20;

/// Stages of translation (IDR0.S1P, IDR0.S2P).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Stages {
    /// Stage 1 only.
    #[default]
    #[serde(rename = "1")]
    One,
    /// Stage 2 only.
    #[serde(rename = "2")]
    Two,
    /// Both, also nested.
    #[serde(rename = "nested")]
    Nested,
}

/// The number of the stage, or `nested`.
impl fmt::Display for Stages {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::One => "1",
            Self::Two => "2",
            Self::Nested => "nested",
        })
    }
}

/// Size of a physical address (IDR5.OAS).
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
    /// Stages of translation (IDR0.S1P, IDR0.S2P).
    pub stages: Stages,
    /// IDR0.ATS: translation requests of functions are served.
    pub ats: bool,
    /// IDR0.PRI: page requests of functions are queued. Has no effect without
    /// `ats`.
    pub pri: bool,
    /// Size of a physical address (IDR5.OAS).
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

    /// Whether the EL2 regimes are offered (IDR0.Hyp): with both stages.
    #[must_use]
    pub const fn hyp(&self) -> bool {
        matches!(self.stages, Stages::Nested)
    }

    /// Whether PRI is offered: it needs ATS too.
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
