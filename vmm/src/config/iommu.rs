//! The IOMMU of a machine.

use super::error::{ConfigError, require};
use ::iommu::smmuv3::Stages;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Model of the IOMMU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IommuModel {
    /// None: devices use guest physical addresses.
    #[default]
    None,
    /// virtio 1.2 §5.13, on both architectures.
    VirtioIommu,
    /// Arm's IHI 0070, on aarch64.
    #[serde(rename = "smmuv3")]
    Smmuv3,
}

impl fmt::Display for IommuModel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.serialize(f)
    }
}

/// The IOMMU (`PUT /iommu`). Every device is behind it, except those with `"iommu": false`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Iommu {
    /// Model of the IOMMU.
    pub model: IommuModel,
    /// SMMUv3 only: offers ATS (`IDR0.ATS`, and the capability on each device), so that the
    /// guest invalidates device caches itself.
    pub ats: bool,
    /// SMMUv3 only: the stages offered.
    pub stage: Stages,
    /// Sends each new mapping to vhost, which then does not miss it. Only a model that is notified
    /// of mappings (virtio-iommu) can do so.
    pub prefill: bool,
    /// Answers a miss of vhost together with the buffers that are available on the queue, up to 256
    /// entries.
    pub prefetch: bool,
}

impl Default for Iommu {
    fn default() -> Self {
        Self {
            model: IommuModel::None,
            ats: false,
            stage: Stages::One,
            prefill: true,
            prefetch: true,
        }
    }
}

impl Iommu {
    /// Checks that the options belong to the model and the model to this architecture.
    pub(crate) fn validate(&self) -> Result<(), ConfigError> {
        self.validate_on(std::env::consts::ARCH)
    }

    pub(super) fn validate_on(&self, architecture: &str) -> Result<(), ConfigError> {
        let smmu = self.model == IommuModel::Smmuv3;
        require(
            !smmu || architecture == "aarch64",
            "model",
            "smmuv3 exists on aarch64 only; use virtio-iommu here",
        )?;
        require(
            smmu || !self.ats,
            "ats",
            "belongs to the model smmuv3; remove it or change the model",
        )?;
        require(
            smmu || self.stage == Stages::One,
            "stage",
            "belongs to the model smmuv3; remove it or change the model",
        )
    }
}
