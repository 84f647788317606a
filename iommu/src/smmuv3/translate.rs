//! The translation procedure (IHI 0070 §15, with the order of §7.3.22).

use super::address::{Address, Ipa, Va};
use super::caches::Caches;
use super::cd::{Cd, TableInput};
use super::config::{STREAM_BITS, SmmuConfig, Stages};
use super::event::{Event, EventKind};
use super::queue::read_raw;
use super::registers::Registers;
use super::spec::cd::{L1_V, L2PTR as L1_CD_POINTER, RawL1Cd};
use super::spec::ste::{L2PTR as L1_STE_POINTER, RawL1Std, SPAN};
use super::spec::{Raw, cr0, cr2, gbpa, reg, strtab};
use super::ste::{DefaultSubstream, Stage1, Stage2, Ste};
use super::streams::Streams;
use super::tlb::{Entry, Tag, TagSummary};
use super::walk::{Class, Leaf, WalkFault, WalkRequest, through_stage2, walk_stage1, walk_stage2};
use crate::addr::{Gpa, Iova, IovaRange, StreamId};
use crate::mapping::{Access, Mapping};
use crate::ram::GuestRam;
use crate::ram::identity_around;
use crate::translate::{FaultReason, Request, RequestKind};

/// Error of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Failure {
    /// The reason that all models share.
    pub(super) reason: FaultReason,
    /// The event; `None` where the specification defines none.
    pub(super) event: Option<Event>,
    /// Whether the event is recorded in the event queue.
    pub(super) record: bool,
    /// Whether the transaction stalls (§3.12.2).
    pub(super) stall: bool,
}

impl Failure {
    const fn silent(reason: FaultReason) -> Self {
        Self {
            reason,
            event: None,
            record: false,
            stall: false,
        }
    }

    const fn event(event: Event) -> Self {
        Self {
            reason: event.kind.reason(),
            event: Some(event),
            record: true,
            stall: false,
        }
    }
}

/// A request and the permitted side effects of its translation.
#[derive(Clone, Copy)]
pub(super) struct TranslationContext<'a> {
    pub(super) request: &'a Request,
    /// Whether flags in descriptors, the caches and the statistics may be
    /// updated. The translation is recorded as held by the stream's consumers
    /// in any case: a lookup may be a prefetch.
    pub(super) update: bool,
}

impl TranslationContext<'_> {
    const fn walk(&self) -> WalkRequest {
        WalkRequest {
            access: self.request.access,
            update: self.update,
            run: true,
            gap: false,
        }
    }

    const fn is_ats(&self) -> bool {
        matches!(self.request.kind, RequestKind::AtsTranslation)
    }
}

/// Translates requests by the registers and the guest's memory, and fills the
/// caches from them.
pub(super) struct Translator<'a> {
    pub(super) config: &'a SmmuConfig,
    pub(super) ram: &'a GuestRam,
    pub(super) registers: &'a Registers,
    pub(super) caches: &'a mut Caches,
    pub(super) streams: &'a mut Streams,
}

impl Translator<'_> {
    /// Translates a request.
    pub(super) fn resolve(&mut self, context: TranslationContext) -> Result<Mapping, Failure> {
        let request = context.request;
        if !self.registers.enabled(cr0::SMMUEN) {
            return self.unmanaged(context);
        }
        let ste = match self.ste(request.stream, context.update) {
            Ok(ste) => ste,
            Err(event) => return Err(self.apply_record_policy(Failure::event(event), context)),
        };
        if !ste.passes {
            return Err(Failure::silent(FaultReason::Aborted));
        }
        if context.is_ats() && !ste.ats {
            let event = Event::configuration(EventKind::FBadAtsTreq);
            return Err(Failure::event(event));
        }
        let outcome = match select_substream(&ste, request.substream) {
            Err(kind) => Err(Failure::event(Event::configuration(kind))),
            Ok(None) => self.without_stage1(&ste, context),
            Ok(Some((stage1, index))) => self.with_stage1(&ste, stage1, index, context),
        };
        outcome.map_err(|failure| self.apply_record_policy(failure, context))
    }

    /// Decides whether events about configuration are recorded: C_BAD_STREAMID
    /// with CR2.RECINVSID, those of ATS requests with CR2.REC_CFG_ATS
    /// (§3.9.1.2). Faults of translation of ATS requests are never recorded.
    fn apply_record_policy(&self, failure: Failure, context: TranslationContext) -> Failure {
        let Some(event) = failure.event else {
            return failure;
        };
        let mut record = failure.record;
        if event.kind == EventKind::CBadStreamid {
            record &= self.registers.cr2(cr2::RECINVSID);
        }
        if context.is_ats() {
            record &= !event.kind.is_translation_related() && self.registers.cr2(cr2::REC_CFG_ATS);
        }
        Failure {
            record,
            stall: failure.stall && !context.is_ats(),
            ..failure
        }
    }

    /// Handles accesses while `SMMUEN` is 0 (§6.3.9.6, §6.3.14).
    fn unmanaged(&self, context: TranslationContext) -> Result<Mapping, Failure> {
        if context.is_ats() {
            let event = Event::configuration(EventKind::FBadAtsTreq);
            return Err(Failure::event(event));
        }
        if self.registers.get(reg::GBPA) & gbpa::ABORT != 0 {
            return Err(Failure::silent(FaultReason::Aborted));
        }
        if context.request.iova.0 >> self.config.address_bits() != 0 {
            return Err(Failure::silent(FaultReason::AddressSize));
        }
        Ok(identity_around(self.ram, context.request.iova))
    }

    /// The STE of a stream (§3.3.1, §5.1). With `update` a valid one is cached.
    pub(super) fn ste(&mut self, stream: StreamId, update: bool) -> Result<Ste, Event> {
        if let Some(known) = self.caches.ste(stream) {
            return Ok(known);
        }
        let address = self.ste_address(stream)?;
        let raw =
            read_raw(self.ram, address).ok_or(Event::fetch(EventKind::FSteFetch, address.0))?;
        let parsed = Ste::parse(&raw, self.config, self.registers.get(reg::CR2))
            .map_err(|_| Event::configuration(EventKind::CBadSte))?;
        if update {
            self.caches.insert_ste(stream, parsed);
        }
        Ok(parsed)
    }

    fn ste_address(&self, stream: StreamId) -> Result<Gpa, Event> {
        let bad_stream = Event::configuration(EventKind::CBadStreamid);
        let cfg = self.registers.get(reg::STRTAB_BASE_CFG);
        let base = self.registers.get64(reg::STRTAB_BASE) & strtab::ADDRESS;
        // LOG2SIZE as written aligns the table; capped at IDR1.SIDSIZE it
        // limits StreamIDs (§6.3.24, §6.3.25).
        let literal = cfg & strtab::LOG2SIZE;
        let log2size = literal.min(STREAM_BITS);
        let index = u64::from(stream.0);
        if index >> log2size != 0 {
            return Err(bad_stream);
        }
        if cfg >> strtab::FMT != strtab::FMT_2_LEVEL {
            return Ok(Gpa(aligned(base, literal + 6) + index * 64));
        }
        let split = match cfg >> strtab::SPLIT & 0x1f {
            split @ (8 | 10) => split,
            _ => 6,
        };
        let level_1 = literal.saturating_sub(split);
        let address = Gpa(aligned(base, level_1 + 3) + (index >> split) * 8);
        let descriptor: RawL1Std =
            read_raw(self.ram, address).ok_or(Event::fetch(EventKind::FSteFetch, address.0))?;
        let span = SPAN.of32(&descriptor);
        if span == 0 || span > 11 || span > split + 1 {
            return Err(bad_stream);
        }
        let entry = index & ((1 << split) - 1);
        if entry >> (span - 1) != 0 {
            return Err(bad_stream);
        }
        let table = L1_STE_POINTER.in_place(&descriptor) & !((64 << (span - 1)) - 1);
        Ok(Gpa(table + entry * 64))
    }

    /// The CD at `index` of a stream (§5.3, §5.4). A valid one is cached if
    /// `context` permits updates.
    pub(super) fn cd(
        &mut self,
        ste: &Ste,
        stage1: &Stage1,
        index: u32,
        context: TranslationContext,
    ) -> Result<Cd, Failure> {
        let stream = context.request.stream;
        if let Some(known) = self.caches.cd(stream, index) {
            return Ok(known);
        }
        let fetch = CdFetch {
            ram: self.ram,
            ste,
            address_bits: self.config.address_bits(),
            update: context.update,
        };
        let address = fetch.address(stage1, index)?;
        let raw = fetch.read(address)?;
        let parsed = Cd::parse(&raw, self.config, stage1, ste.world)
            .map_err(|_| Failure::event(Event::configuration(EventKind::CBadCd)))?;
        if context.update {
            self.caches.insert_cd(stream, index, parsed);
        }
        Ok(parsed)
    }

    /// Translates through stage 2 alone, or bypasses both stages.
    fn without_stage1(
        &mut self,
        ste: &Ste,
        context: TranslationContext,
    ) -> Result<Mapping, Failure> {
        let iova = context.request.iova;
        if iova.0 >> self.config.address_bits() != 0 {
            let event = Event::configuration(EventKind::FAddrSize);
            return Err(Failure::event(event));
        }
        let Some(stage2) = &ste.stage2 else {
            return Ok(identity_around(self.ram, iova));
        };
        let tag = tag(ste, Stages::Two, 0);
        if let Some(entry) = self.cached(&tag, iova.0, context) {
            let held = self.caches.summary(&tag);
            return self.answer(context, (tag, held), entry, 0, true);
        }
        // Without stage 1 the input address is intermediate physical.
        let leaf = walk_stage2(self.ram, stage2, Ipa(iova.0), context.walk())
            .map_err(|fault| stage2_failure(stage2, &Event::walk(&fault)))?;
        let held = TagSummary {
            global: false,
            aliases: false,
            shift: leaf.shift,
            grouped: leaf.grouped,
        };
        self.insert(context, tag, entry_of(&leaf), held, 0)
    }

    /// Translates through stage 1 with the CD at `index`, and stage 2 if any.
    fn with_stage1(
        &mut self,
        ste: &Ste,
        stage1: &Stage1,
        index: u32,
        context: TranslationContext,
    ) -> Result<Mapping, Failure> {
        let request = context.request;
        let cd = self.cd(ste, stage1, index, context)?;
        let stages = if ste.stage2.is_some() {
            Stages::Nested
        } else {
            Stages::One
        };
        let tag = tag(ste, stages, cd.asid);
        let fault = |event: Event| Failure {
            record: cd.record || cd.stall,
            stall: cd.stall,
            ..Failure::event(event)
        };
        let Some(table_input) = cd.table_input(request.iova.0) else {
            let event = Event::configuration(EventKind::FTranslation);
            return Err(fault(event));
        };
        let alias = request.iova.0 ^ table_input.canonical();
        if let Some(entry) = self.cached(&tag, table_input.canonical(), context) {
            let mut held = self.caches.summary(&tag);
            held.aliases |= cd.has_aliases();
            return self.answer(context, (tag, held), entry, alias, true);
        }
        let failure = |walk_fault: WalkFault| {
            let event = Event::walk(&walk_fault);
            match &ste.stage2 {
                Some(stage2) if walk_fault.stage2 => stage2_failure(stage2, &event),
                _ if event.kind.is_translation_related() => fault(event),
                _ => Failure::event(event),
            }
        };
        let leaf = walk_both(self.ram, &table_input, ste.stage2.as_ref(), context.walk())
            .map_err(failure)?;
        let held = TagSummary {
            global: leaf.global,
            aliases: cd.has_aliases(),
            shift: leaf.shift,
            grouped: leaf.grouped,
        };
        let entry = Entry {
            first: table_input.base | leaf.first.0,
            last: table_input.base | leaf.last.0,
            ..entry_of(&leaf)
        };
        self.insert(context, tag, entry, held, alias)
    }

    fn cached(&mut self, tag: &Tag, address: u64, context: TranslationContext) -> Option<Entry> {
        let access = context.request.access;
        if context.update {
            self.caches.find(tag, address, access)
        } else {
            self.caches.peek(tag, address, access)
        }
    }

    fn insert(
        &mut self,
        context: TranslationContext,
        tag: Tag,
        entry: Entry,
        held: TagSummary,
        alias: u64,
    ) -> Result<Mapping, Failure> {
        let held = if context.update {
            self.caches.insert(tag, entry, held)
        } else {
            held.and(self.caches.summary(&tag))
        };
        self.answer(context, (tag, held), entry, alias, false)
    }

    /// Records the translation as held by the stream's consumers and returns
    /// it. The second use of a translation, a hit, adds it to the answers that need
    /// no state lock.
    fn answer(
        &mut self,
        context: TranslationContext,
        (tag, held): (Tag, TagSummary),
        entry: Entry,
        alias: u64,
        is_hit: bool,
    ) -> Result<Mapping, Failure> {
        self.streams.record(context.request, tag, held);
        let range = IovaRange::new(Iova(entry.first ^ alias), Iova(entry.last ^ alias));
        let answer = Mapping {
            iova: range.map_err(|_| Failure::silent(FaultReason::AddressSize))?,
            gpa: entry.output,
            perm: entry.perm,
        };
        if is_hit && context.update {
            self.streams.cache(context.request, &answer);
        }
        Ok(answer)
    }

    /// Checks whether the function of `stream` may have a device IOTLB now. The
    /// error is the reason for the log and the API.
    pub(super) fn device_iotlb(&mut self, stream: StreamId) -> Result<(), &'static str> {
        if !self.config.ats {
            Err("ATS is not offered")
        } else if !self.streams.ats_enabled(stream) {
            Err("ATS is not enabled in the function")
        } else if !self.registers.enabled(cr0::SMMUEN) {
            Err("the SMMU is not enabled")
        } else {
            match self.ste(stream, false) {
                Ok(ste) if ste.ats => Ok(()),
                Ok(_) => Err("STE.EATS does not allow ATS"),
                Err(_) => Err("the stream has no valid STE"),
            }
        }
    }
}

/// `address` with its lowest `bits` cleared; 0 for 64 bits and more.
fn aligned(address: u64, bits: u32) -> u64 {
    address & u64::MAX.checked_shl(bits).unwrap_or(0)
}

fn tag(ste: &Ste, stages: Stages, asid: u16) -> Tag {
    Tag {
        world: ste.world,
        vmid: ste.vmid,
        stages,
        asid,
    }
}

fn entry_of<I: Address>(leaf: &Leaf<I, Gpa>) -> Entry {
    Entry {
        first: leaf.first.bits(),
        last: leaf.last.bits(),
        output: leaf.output,
        perm: leaf.perm,
    }
}

/// The failure for a fault of stage 2 (§5.5).
fn stage2_failure(stage2: &Stage2, event: &Event) -> Failure {
    let failure = Failure::event(*event);
    if event.kind.is_translation_related() {
        Failure {
            record: stage2.record || stage2.stall,
            stall: stage2.stall,
            ..failure
        }
    } else {
        failure
    }
}

/// The index of an access's CD; `None` when stage 1 is bypassed (§5.2 S1DSS,
/// §7.3.7, §7.3.9).
fn select_substream(
    ste: &Ste,
    substream: Option<u32>,
) -> Result<Option<(&Stage1, u32)>, EventKind> {
    let Some(stage1) = &ste.stage1 else {
        return match substream {
            None => Ok(None),
            Some(_) => Err(EventKind::CBadSubstreamid),
        };
    };
    let bits = stage1.substream_bits;
    match (substream, stage1.default_substream) {
        (Some(index), _) if bits == 0 || index >> bits != 0 => Err(EventKind::CBadSubstreamid),
        (Some(0), DefaultSubstream::Zero) => Err(EventKind::FStreamDisabled),
        (Some(index), _) => Ok(Some((stage1, index))),
        (None, _) if bits == 0 => Ok(Some((stage1, 0))),
        (None, DefaultSubstream::Zero) => Ok(Some((stage1, 0))),
        (None, DefaultSubstream::Bypass) => Ok(None),
        (None, DefaultSubstream::Terminate) => Err(EventKind::FStreamDisabled),
    }
}

/// Walks stage 1 and, in a nested configuration, stage 2 for its result.
pub(super) fn walk_both(
    ram: &GuestRam,
    from: &TableInput,
    stage2: Option<&Stage2>,
    request: WalkRequest,
) -> Result<Leaf<Va, Gpa>, WalkFault> {
    let one = walk_stage1(ram, from.region, stage2, from.input, request)?;
    let Some(stage2) = stage2 else {
        return Ok(one.physical());
    };
    let (va, ipa) = (from.input, one.output_of(from.input));
    let two = walk_stage2(ram, stage2, ipa, request)?;
    // The intersection of both runs around the address.
    let below = (va.0 - one.first.0).min(ipa.0 - two.first.0);
    let beyond = (one.last.0 - va.0).min(two.last.0 - ipa.0);
    Ok(Leaf {
        first: Va(va.0 - below),
        last: Va(va.0 + beyond),
        output: Gpa(two.output_of(ipa).0 - below),
        perm: one.perm & two.perm,
        ..one.physical()
    })
}

/// Reads a CD and its level 1 descriptor, through stage 2 if that translates.
struct CdFetch<'a> {
    ram: &'a GuestRam,
    ste: &'a Ste,
    address_bits: u32,
    update: bool,
}

impl CdFetch<'_> {
    fn address(&self, stage1: &Stage1, index: u32) -> Result<Ipa, Failure> {
        let bits = stage1.substream_bits;
        let index = u64::from(index);
        let Some(split) = stage1.split else {
            return Ok(Ipa((stage1.context & !((64 << bits) - 1)) + index * 64));
        };
        let level_1 = bits.saturating_sub(split);
        let table = stage1.context & !((8 << level_1) - 1);
        let descriptor: RawL1Cd = self.read(Ipa(table + (index >> split) * 8))?;
        let pointer = L1_CD_POINTER.in_place(&descriptor) & !((64 << split) - 1);
        if !L1_V.is_set(&descriptor) || pointer >> self.address_bits != 0 {
            let event = Event::configuration(EventKind::CBadSubstreamid);
            return Err(Failure::event(event));
        }
        Ok(Ipa(pointer + (index & ((1 << split) - 1)) * 64))
    }

    fn read<T: Raw>(&self, address: Ipa) -> Result<T, Failure> {
        let place = match &self.ste.stage2 {
            None => Gpa(address.0),
            Some(stage2) => {
                let request = WalkRequest {
                    access: Access::Read,
                    update: self.update,
                    run: false,
                    gap: false,
                };
                through_stage2(self.ram, stage2, address, Class::Cd, request)
                    .map_err(|fault| stage2_failure(stage2, &Event::walk(&fault)))?
            }
        };
        read_raw(self.ram, place)
            .ok_or_else(|| Failure::event(Event::fetch(EventKind::FCdFetch, place.0)))
    }
}
