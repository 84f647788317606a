//! Configuration and mappings of a stream, for the API.

use serde::{Deserialize, Serialize};

use super::address::{Address, Ipa};
use super::cd::Cd;
use super::spec::{cr0, gbpa, reg};
use super::ste::{Stage2, Ste, StreamWorld};
use super::translate::{TranslationContext, Translator, walk_both};
use super::walk::{Cause, Leaf, WalkFault, WalkRequest, walk_stage2};
use crate::addr::{Gpa, Iova, IovaRange, StreamId};
use crate::mapping::{Access, Mapping, Perm};
use crate::ram::GuestRam;
use crate::ram::ram_blocks;
use crate::translate::Request;

/// Upper bound on descriptors per listing. A walk counts as [`WALK`], each
/// neighbour that a gap or a run extends over as one.
const MAX_DESCRIPTORS: u64 = 1 << 18;
const WALK: u64 = 16;
/// Upper bound on neighbours that a walk reads.
const NEIGHBOURS: u64 = 512;

/// Treatment of a stream's accesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum StreamMode {
    /// Accesses pass untranslated.
    Bypass,
    /// Accesses are aborted.
    Abort,
    /// The configuration is not valid: accesses are aborted with an event.
    Invalid,
    /// Stage 1 translates.
    Stage1,
    /// Stage 2 translates.
    Stage2,
    /// Both stages translate.
    Nested,
}

/// Configuration of a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamState {
    /// Treatment of accesses without a SubstreamID.
    pub mode: StreamMode,
    /// ASID of the CD; `None` without stage 1.
    pub asid: Option<u16>,
    /// VMID of the STE; `None` outside of EL1 or when stage 2 is not offered.
    pub vmid: Option<u16>,
    /// The STE allows ATS (EATS).
    pub ats_allowed: bool,
    /// The enable bit of the function's ATS capability is set.
    pub ats_enabled: bool,
    /// `DEVIOTLB_UNMAP` is delivered to notifiers.
    pub device_iotlb: bool,
}

/// Translation of a stream's accesses without a SubstreamID.
pub(super) enum View {
    Bypass,
    Blocked,
    Stage1(Box<Cd>, Option<Stage2>),
    Stage2(Stage2),
}

impl Translator<'_> {
    fn stream_ste(&mut self, stream: StreamId) -> Result<Ste, StreamMode> {
        if !self.registers.enabled(cr0::SMMUEN) {
            let abort = self.registers.get(reg::GBPA) & gbpa::ABORT != 0;
            return Err(if abort {
                StreamMode::Abort
            } else {
                StreamMode::Bypass
            });
        }
        let ste = self.ste(stream, false).map_err(|_| StreamMode::Invalid)?;
        if !ste.passes {
            Err(StreamMode::Abort)
        } else if ste.is_bypass() {
            Err(StreamMode::Bypass)
        } else {
            Ok(ste)
        }
    }

    fn default_cd(&mut self, stream: StreamId, ste: &Ste) -> Option<Cd> {
        let stage1 = ste.stage1?;
        let request = Request::untranslated(stream, Iova(0), Access::Read);
        let context = TranslationContext {
            request: &request,
            update: false,
        };
        self.cd(ste, &stage1, 0, context).ok()
    }

    pub(super) fn view(&mut self, stream: StreamId) -> View {
        match self.stream_ste(stream) {
            Err(StreamMode::Bypass) => View::Bypass,
            Err(_) => View::Blocked,
            Ok(ste) => match (ste.stage1, ste.stage2) {
                (None, Some(stage2)) => View::Stage2(stage2),
                _ => match self.default_cd(stream, &ste) {
                    Some(cd) => View::Stage1(Box::new(cd), ste.stage2),
                    None => View::Blocked,
                },
            },
        }
    }

    /// Configuration of a connected stream; `None` for others.
    pub(super) fn stream_state(&mut self, stream: StreamId) -> Option<StreamState> {
        if !self.streams.contains(stream) {
            return None;
        }
        let mut answer = StreamState {
            mode: StreamMode::Invalid,
            asid: None,
            vmid: None,
            ats_allowed: false,
            ats_enabled: self.streams.ats_enabled(stream),
            device_iotlb: self.streams.device_iotlb(stream),
        };
        match self.stream_ste(stream) {
            Err(mode) => answer.mode = mode,
            Ok(ste) => {
                answer.mode = match (ste.stage1.is_some(), ste.stage2.is_some()) {
                    (true, true) => StreamMode::Nested,
                    (true, false) => StreamMode::Stage1,
                    _ => StreamMode::Stage2,
                };
                answer.ats_allowed = ste.ats;
                let tagged = self.config.stage2() && ste.world == StreamWorld::El1;
                answer.vmid = tagged.then_some(ste.vmid);
                let cd = self.default_cd(stream, &ste);
                answer.asid = cd.map(|cd| cd.asid);
            }
        }
        Some(answer)
    }
}

/// Lists up to `limit` mappings from `from` on, as [`Smmu::mappings`](super::Smmu::mappings)
/// describes.
pub(super) fn mappings(
    ram: &GuestRam,
    view: &View,
    from: Iova,
    limit: usize,
) -> (Vec<Mapping>, Option<Iova>) {
    let mut found = Vec::new();
    if let View::Bypass = view {
        let mut blocks = ram_blocks(ram).filter(|block| block.iova.last() >= from);
        found.extend(blocks.by_ref().take(limit));
        return (found, blocks.next().map(|block| block.iova.first()));
    }
    let (mut next, mut read) = (Some(from), 0);
    while let Some(at) = next
        && found.len() < limit
        && read < MAX_DESCRIPTORS
    {
        let step = step(ram, view, at.0);
        read += WALK + step.neighbours;
        // A page without permissions is no mapping.
        let permits = |mapping: &Mapping| !mapping.perm.is_empty();
        found.extend(step.mapping.filter(permits));
        next = step.last.checked_add(1).map(Iova);
    }
    (found, next)
}

/// The mapping or the gap at `address`.
fn step(ram: &GuestRam, view: &View, address: u64) -> Step {
    match view {
        View::Bypass | View::Blocked => Step::gap(u64::MAX),
        View::Stage2(stage2) => {
            match walk_any_access(|request| walk_stage2(ram, stage2, Ipa(address), request)) {
                Ok(leaf) => Step::leaf(0, &leaf),
                Err(fault) => Step::fault(0, address, &fault),
            }
        }
        View::Stage1(cd, stage2) => {
            let Some(table_input) = cd.table_input(address) else {
                return Step::gap(gap_end(cd, address));
            };
            if table_input.canonical() != address {
                // An alias of a mapping that is listed already.
                return Step::gap(gap_end(cd, address));
            }
            match walk_any_access(|request| walk_both(ram, &table_input, stage2.as_ref(), request))
            {
                Ok(leaf) => Step::leaf(table_input.base, &leaf),
                // A gap of stage 2 is in intermediate physical addresses.
                Err(fault) if fault.stage2 => Step {
                    neighbours: NEIGHBOURS,
                    ..Step::gap(address | 0xfff)
                },
                Err(fault) => Step::fault(table_input.base, table_input.input.0, &fault),
            }
        }
    }
}

/// A part of a listing.
struct Step {
    mapping: Option<Mapping>,
    /// Last address of the mapping or gap, inclusive.
    last: u64,
    /// Neighbours of a descriptor that were read.
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

    fn leaf<I: Address>(base: u64, leaf: &Leaf<I, Gpa>) -> Self {
        let (first, last) = (leaf.first.bits(), leaf.last.bits());
        let neighbours = (last - first) >> leaf.shift;
        let (first, last) = (base | first, base | last);
        Self {
            mapping: mapping(first, last, leaf.output, leaf.perm),
            last,
            neighbours,
        }
    }

    /// The gap at `input`, whose walk faults.
    fn fault(base: u64, input: u64, fault: &WalkFault) -> Self {
        Self {
            neighbours: fault.beyond.checked_shr(fault.span).unwrap_or(0),
            ..Self::gap(base | gap_of(fault, input))
        }
    }
}

/// Walks for a read, then for a write if reading is not permitted.
fn walk_any_access<I>(
    walk: impl Fn(WalkRequest) -> Result<Leaf<I, Gpa>, WalkFault>,
) -> Result<Leaf<I, Gpa>, WalkFault> {
    let request = |access| WalkRequest {
        access,
        update: false,
        run: true,
        gap: true,
    };
    match walk(request(Access::Read)) {
        Err(fault) if fault.cause == Cause::Permission => walk(request(Access::Write)),
        found => found,
    }
}

/// The last input address whose walk has the same fault as that of `input`.
fn gap_of(fault: &WalkFault, input: u64) -> u64 {
    let span = 1_u64
        .checked_shl(fault.span)
        .map_or(u64::MAX, |size| size - 1);
    (input | span).saturating_add(fault.beyond)
}

/// The last address of the gap around `address`: between the TTB0 and TTB1
/// regions, in a disabled one, or in aliases of the TTB0 region.
fn gap_end(cd: &Cd, address: u64) -> u64 {
    let Some(high) = cd.high.filter(|high| !high.disabled) else {
        return u64::MAX;
    };
    let first = u64::MAX << high.table.input_bits;
    if address < first { first - 1 } else { u64::MAX }
}

fn mapping(first: u64, last: u64, gpa: Gpa, perm: Perm) -> Option<Mapping> {
    Some(Mapping {
        iova: IovaRange::new(Iova(first), Iova(last)).ok()?,
        gpa,
        perm,
    })
}
