//! What the tables say, for people who ask.

use serde::{Deserialize, Serialize};

use super::Smmu;
use super::cd::Cd;
use super::spec::{cr0, gbpa, reg};
use super::state::State;
use super::ste::{Stage2, Ste, World};
use super::translate::{Asked, walk_both};
use super::walk::{Want, walk};
use crate::space::ram_blocks;
use crate::{Access, Gpa, Iova, IovaRange, Mapping, Request, StreamId};

/// Most steps of one listing. A step finds a mapping or the end of a gap.
const MAX_STEPS: usize = 1 << 14;

/// What becomes of a stream's accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StreamMode {
    /// They pass untranslated.
    Bypass,
    /// They are aborted.
    Abort,
    /// The configuration is not valid: they are aborted, with an event.
    Invalid,
    /// Stage 1 translates.
    Stage1,
    /// Stage 2 translates.
    Stage2,
    /// Both stages translate.
    Nested,
}

/// How a stream is configured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamState {
    /// What becomes of its accesses without a SubstreamID.
    pub mode: StreamMode,
    /// Its ASID, with stage 1.
    pub asid: Option<u16>,
    /// Its VMID, with stage 1 or 2 of EL1 when stage 2 is offered.
    pub vmid: Option<u16>,
    /// The STE allows ATS.
    pub ats_allowed: bool,
    /// ATS is enabled in the function.
    pub ats_enabled: bool,
    /// Notifiers may have `DEVIOTLB_UNMAP`.
    pub device_iotlb: bool,
}

/// How a stream's accesses without a SubstreamID are translated.
enum View {
    Bypass,
    Blocked,
    Stage1(Box<Cd>, Option<Stage2>),
    Stage2(Stage2),
}

impl State {
    fn stream_ste(&mut self, smmu: &Smmu, stream: StreamId) -> Result<Ste, StreamMode> {
        if !self.registers.enabled(cr0::SMMUEN) {
            let abort = self.registers.get(reg::GBPA) & gbpa::ABORT != 0;
            return Err(if abort {
                StreamMode::Abort
            } else {
                StreamMode::Bypass
            });
        }
        let ste = self
            .ste(&smmu.ram, stream, false)
            .map_err(|_| StreamMode::Invalid)?;
        if !ste.passes {
            Err(StreamMode::Abort)
        } else if ste.is_bypass() {
            Err(StreamMode::Bypass)
        } else {
            Ok(ste)
        }
    }

    fn default_cd(&mut self, smmu: &Smmu, stream: StreamId, ste: &Ste) -> Option<Cd> {
        let stage1 = ste.stage1?;
        let request = Request::untranslated(stream, Iova(0), Access::Read);
        let asked = Asked {
            request: &request,
            update: false,
        };
        self.cd(&smmu.ram, ste, &stage1, 0, asked).ok()
    }

    fn view(&mut self, smmu: &Smmu, stream: StreamId) -> View {
        match self.stream_ste(smmu, stream) {
            Err(StreamMode::Bypass) => View::Bypass,
            Err(_) => View::Blocked,
            Ok(ste) => match (ste.stage1, ste.stage2) {
                (None, Some(stage2)) => View::Stage2(stage2),
                _ => match self.default_cd(smmu, stream, &ste) {
                    Some(cd) => View::Stage1(Box::new(cd), ste.stage2),
                    None => View::Blocked,
                },
            },
        }
    }
}

impl Smmu {
    /// How a connected stream is configured; `None` for others.
    #[must_use]
    pub fn stream_state(&self, stream: StreamId) -> Option<StreamState> {
        let mut state = self.lock();
        let known = state.streams.get(&stream)?;
        let mut answer = StreamState {
            mode: StreamMode::Invalid,
            asid: None,
            vmid: None,
            ats_allowed: false,
            ats_enabled: known.ats_enabled,
            device_iotlb: known.device_iotlb,
        };
        match state.stream_ste(self, stream) {
            Err(mode) => answer.mode = mode,
            Ok(ste) => {
                answer.mode = match (ste.stage1.is_some(), ste.stage2.is_some()) {
                    (true, true) => StreamMode::Nested,
                    (true, false) => StreamMode::Stage1,
                    _ => StreamMode::Stage2,
                };
                answer.ats_allowed = ste.ats;
                let tagged = self.config.stage2() && ste.world == World::El1;
                answer.vmid = tagged.then_some(ste.vmid);
                let cd = state.default_cd(self, stream, &ste);
                answer.asid = cd.map(|cd| cd.asid);
            }
        }
        Some(answer)
    }

    /// Up to `limit` mappings of a stream from `from` on, in order, and the
    /// address to go on from if there may be more. One call takes a bounded
    /// number of steps: where the tables have many gaps it may find fewer
    /// mappings than `limit`, or none, with more to come. A mapping is a run as
    /// [`translate`](crate::Iommu::translate) would answer it for reading or,
    /// where that is not permitted, for writing.
    #[must_use]
    pub fn mappings(
        &self,
        stream: StreamId,
        from: Iova,
        limit: usize,
    ) -> (Vec<Mapping>, Option<Iova>) {
        let view = self.lock().view(self, stream);
        let mut found = Vec::new();
        if let View::Bypass = view {
            let mut blocks = ram_blocks(&self.ram).filter(|block| block.iova.last() >= from);
            found.extend(blocks.by_ref().take(limit));
            return (found, blocks.next().map(|block| block.iova.first()));
        }
        let mut next = Some(from);
        for _ in 0..MAX_STEPS {
            let Some(at) = next.filter(|_| found.len() < limit) else {
                break;
            };
            let (mapping, last) = self.look(&view, at.0);
            // A page that permits nothing is no mapping.
            found.extend(mapping.filter(|mapping| mapping.perm != crate::Perm::NONE));
            next = last.checked_add(1).map(Iova);
        }
        (found, next)
    }

    /// What is at `address`, and the last address for which that is so.
    fn look(&self, view: &View, address: u64) -> (Option<Mapping>, u64) {
        let span = |input: u64, bits: u32| input | ((1_u64 << bits) - 1);
        match view {
            View::Bypass | View::Blocked => (None, u64::MAX),
            View::Stage2(stage2) => {
                let mut result = Err(64);
                for want in LOOKS {
                    let walked = walk(&self.ram, &stage2.table, None, address, want);
                    result = walked.map_err(|stop| stop.span);
                    if result.is_ok() {
                        break;
                    }
                }
                match result {
                    Ok(leaf) => (
                        mapping(leaf.first, leaf.last, leaf.output, leaf.perm),
                        leaf.last,
                    ),
                    Err(64) => (None, u64::MAX),
                    Err(bits) => (None, span(address, bits)),
                }
            }
            View::Stage1(cd, stage2) => {
                let Some(place) = cd.place(address) else {
                    return (None, gap_end(cd, address));
                };
                if place.canonical() != address {
                    // An alias of what is listed already.
                    return (None, gap_end(cd, address));
                }
                let mut result = Err(12);
                for want in LOOKS {
                    let walked = walk_both(&self.ram, &place, stage2.as_ref(), want);
                    // A gap of stage 2 says nothing of input addresses.
                    let bits = |stop: super::walk::Stop| if stop.stage2 { 12 } else { stop.span };
                    result = walked.map_err(bits);
                    if result.is_ok() {
                        break;
                    }
                }
                match result {
                    Ok(leaf) => {
                        let (first, last) = (place.base | leaf.first, place.base | leaf.last);
                        (mapping(first, last, leaf.output, leaf.perm), last)
                    }
                    Err(bits) => (None, place.base | span(place.input, bits)),
                }
            }
        }
    }
}

const LOOKS: [Want; 2] = [
    Want {
        access: Access::Read,
        update: false,
        run: true,
    },
    Want {
        access: Access::Write,
        update: false,
        run: true,
    },
];

/// The last address of the gap that `address` lies in: between the halves, in
/// one that is disabled, or in aliases of the lower one.
fn gap_end(cd: &Cd, address: u64) -> u64 {
    let Some(high) = cd.high.filter(|high| !high.disabled) else {
        return u64::MAX;
    };
    let first = u64::MAX << high.table.input_bits;
    if address < first { first - 1 } else { u64::MAX }
}

fn mapping(first: u64, last: u64, output: u64, perm: crate::Perm) -> Option<Mapping> {
    Some(Mapping {
        iova: IovaRange::new(Iova(first), Iova(last)).ok()?,
        gpa: Gpa(output),
        perm,
    })
}
