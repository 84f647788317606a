//! What the tables say, for people who ask.

use serde::{Deserialize, Serialize};

use super::Smmu;
use super::cd::Cd;
use super::spec::{cr0, gbpa, reg};
use super::state::State;
use super::ste::{Stage2, Ste, World};
use super::translate::{Asked, walk_both};
use super::walk::{Cause, Leaf, Stop, Want, walk};
use crate::ram::ram_blocks;
use crate::{Access, Gpa, Iova, IovaRange, Mapping, Request, StreamId};

/// Descriptors after which a listing ends. A walk counts as [`WALK`], and the
/// neighbours that a gap or a run extends over as one each.
const MAX_DESCRIPTORS: u64 = 1 << 18;
const WALK: u64 = 16;
/// Neighbours that a walk looks at, at most.
const NEIGHBOURS: u64 = 512;

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
        let (mut next, mut read) = (Some(from), 0);
        while let Some(at) = next
            && found.len() < limit
            && read < MAX_DESCRIPTORS
        {
            let step = self.look(&view, at.0);
            read += WALK + step.neighbours;
            // A page that permits nothing is no mapping.
            let permits = |mapping: &Mapping| mapping.perm != crate::Perm::NONE;
            found.extend(step.mapping.filter(permits));
            next = step.last.checked_add(1).map(Iova);
        }
        (found, next)
    }

    /// What is at `address`.
    fn look(&self, view: &View, address: u64) -> Step {
        match view {
            View::Bypass | View::Blocked => Step::gap(u64::MAX),
            View::Stage2(stage2) => {
                match look(|want| walk(&self.ram, &stage2.table, None, address, want)) {
                    Ok(leaf) => Step::leaf(0, &leaf),
                    Err(stop) => Step::stop(0, address, &stop),
                }
            }
            View::Stage1(cd, stage2) => {
                let Some(place) = cd.place(address) else {
                    return Step::gap(gap_end(cd, address));
                };
                if place.canonical() != address {
                    // An alias of what is listed already.
                    return Step::gap(gap_end(cd, address));
                }
                match look(|want| walk_both(&self.ram, &place, stage2.as_ref(), want)) {
                    Ok(leaf) => Step::leaf(place.base, &leaf),
                    // A gap of stage 2 says nothing of input addresses.
                    Err(stop) if stop.stage2 => Step {
                        neighbours: NEIGHBOURS,
                        ..Step::gap(address | 0xfff)
                    },
                    Err(stop) => Step::stop(place.base, place.input, &stop),
                }
            }
        }
    }
}

/// A part of a listing.
struct Step {
    mapping: Option<Mapping>,
    /// The last address for which that is so.
    last: u64,
    /// Neighbours of a descriptor that were looked at.
    neighbours: u64,
}

impl Step {
    const fn gap(last: u64) -> Self {
        Self {
            mapping: None,
            last,
            neighbours: 0,
        }
    }

    fn leaf(base: u64, leaf: &Leaf) -> Self {
        let (first, last) = (base | leaf.first, base | leaf.last);
        Self {
            mapping: mapping(first, last, leaf.output, leaf.perm),
            last,
            neighbours: (leaf.last - leaf.first) >> leaf.shift,
        }
    }

    /// A walk of `input` that stops.
    fn stop(base: u64, input: u64, stop: &Stop) -> Self {
        Self {
            neighbours: stop.beyond.checked_shr(stop.span).unwrap_or(0),
            ..Self::gap(base | gap_of(stop, input))
        }
    }
}

/// Walks for a read or, where that is not permitted, for a write.
fn look(walk: impl Fn(Want) -> Result<Leaf, Stop>) -> Result<Leaf, Stop> {
    let want = |access| Want {
        access,
        update: false,
        run: true,
        gap: true,
    };
    match walk(want(Access::Read)) {
        Err(stop) if stop.cause == Cause::Permission => walk(want(Access::Write)),
        found => found,
    }
}

/// The last input address for which a walk of `input` stops alike.
fn gap_of(stop: &Stop, input: u64) -> u64 {
    let span = 1_u64
        .checked_shl(stop.span)
        .map_or(u64::MAX, |size| size - 1);
    (input | span).saturating_add(stop.beyond)
}

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
