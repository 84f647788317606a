//! Fault reports (§5.13.6.9).

use super::spec;
use crate::{Access, Iova, StreamId};

/// A fault report as the event queue carries it (§5.13.6.9).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FaultReport {
    /// [`spec::fault::REASON_DOMAIN`] or [`spec::fault::REASON_MAPPING`].
    pub reason: u8,
    /// Who did it.
    pub endpoint: StreamId,
    /// What it wanted to do.
    pub access: Access,
    /// Where.
    pub address: Iova,
}

impl FaultReport {
    /// The bytes of the report.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; spec::fault::SIZE] {
        let access = match self.access {
            Access::Read => spec::fault::READ,
            Access::Write => spec::fault::WRITE,
        };
        let mut bytes = [0; spec::fault::SIZE];
        let fields = u32::from(self.reason)
            .to_le_bytes()
            .into_iter()
            .chain((access | spec::fault::ADDRESS).to_le_bytes())
            .chain(self.endpoint.0.to_le_bytes())
            .chain([0; 4])
            .chain(self.address.0.to_le_bytes());
        for (byte, value) in bytes.iter_mut().zip(fields) {
            *byte = value;
        }
        bytes
    }
}

/// Takes fault reports to the event queue. Called with the stream's gate held
/// and no lock of the model: it must not translate.
pub trait FaultSink: Send + Sync {
    /// Reports, or drops the report when the driver left no buffer for it.
    fn report(&self, report: &FaultReport);
}
