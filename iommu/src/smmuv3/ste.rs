//! Stream table entries (IHI 0070 §5.2).

use super::config::SmmuConfig;
use super::descriptor::{AccessFlag, Format, Granule, Table};
use super::spec::cr2;
use super::spec::ste::{self, RawSte};

/// Regime that tags the translations of a stream (§3.3.3 StreamWorld).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum StreamWorld {
    /// NS-EL1: tagged with VMID and ASID.
    El1,
    /// NS-EL2: not tagged.
    El2,
    /// NS-EL2-E2H: tagged with the ASID.
    El2E2h,
}

/// Fields of the STE for stage 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stage1 {
    /// Address of the CD or of the table of CDs; an intermediate physical
    /// address when stage 2 translates.
    pub context: u64,
    /// Level 2 tables hold `1 << split` CDs; `None` for a linear table.
    pub split: Option<u32>,
    /// Bits of a SubstreamID; 0 when there are none.
    pub substream_bits: u32,
    /// Treatment of accesses without a SubstreamID where CDs are per SubstreamID.
    pub default_substream: DefaultSubstream,
    /// A CD with stalls enabled is ILLEGAL (S1STALLD).
    pub stall_disabled: bool,
}

/// S1DSS (§5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum DefaultSubstream {
    /// Accesses without a SubstreamID are terminated.
    Terminate,
    /// Accesses without a SubstreamID bypass stage 1.
    Bypass,
    /// Accesses without a SubstreamID use CD 0, and those with SubstreamID 0
    /// are terminated.
    Zero,
}

/// Fields of the STE for stage 2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stage2 {
    /// Translation table of stage 2.
    pub table: Table,
    /// Faults of stage 2 stall the transaction (S2S).
    pub stall: bool,
    /// Faults of stage 2 are recorded (S2R).
    pub record: bool,
    /// Stage 1 walks to Device memory fault (S2PTW).
    pub protect_walks: bool,
}

/// A valid STE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ste {
    /// `false` aborts every access without an event (Config 0b0xx).
    pub passes: bool,
    /// Stage 1; `None` when it does not translate.
    pub stage1: Option<Stage1>,
    /// Stage 2; `None` when it does not translate.
    pub stage2: Option<Stage2>,
    /// Regime of the stream's translations.
    pub world: StreamWorld,
    /// VMID; 0 where the STE has none.
    pub vmid: u16,
    /// ATS translation requests are served (the effective EATS is 0b01).
    pub ats: bool,
}

/// An STE that is ILLEGAL or not valid: `C_BAD_STE`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadSte;

/// Decodes the encodings of S2TG and TG0.
pub(super) const fn granule_0(field: u64) -> Option<Granule> {
    match field {
        0 => Some(Granule::K4),
        1 => Some(Granule::K64),
        2 => Some(Granule::K16),
        _ => None,
    }
}

/// Decodes IPS or S2PS to bits of an address, at most `limit`.
pub(super) const fn address_bits(field: u64, limit: u32) -> u32 {
    let bits = match field {
        0 => 32,
        1 => 36,
        2 => 40,
        3 => 42,
        4 => 44,
        5 => 48,
        _ => 52,
    };
    if bits < limit { bits } else { limit }
}

/// Decodes HA, HD and AFFD (§5.4 CD.HA, §5.2 STE.S2HA): the effect of a clear
/// access flag, and whether walks update dirty state.
pub(super) const fn flags(ha: bool, hd: bool, affd: bool) -> (AccessFlag, bool) {
    if ha {
        (AccessFlag::Update, hd)
    } else if affd {
        (AccessFlag::Ignore, false)
    } else {
        (AccessFlag::Fault, false)
    }
}

impl Ste {
    /// Decodes and checks an STE (§5.2.2). `cr2` is the value of CR2.
    ///
    /// # Errors
    /// [`BadSte`].
    pub(super) fn parse(raw: &RawSte, config: &SmmuConfig, cr2: u32) -> Result<Self, BadSte> {
        if !ste::V.is_set(raw) {
            return Err(BadSte);
        }
        let encoding = ste::CONFIG.of(raw);
        let (passes, one, two) = (encoding & 4 != 0, encoding & 1 != 0, encoding & 2 != 0);
        let mut parsed = Self {
            passes,
            stage1: None,
            stage2: None,
            world: StreamWorld::El1,
            vmid: 0,
            ats: false,
        };
        if !passes || !one && !two {
            return Ok(parsed);
        }
        if one && !config.stage1() || two && !config.stage2() {
            return Err(BadSte);
        }
        parsed.ats = ats(raw, config, two)?;
        if one {
            parsed.world = world(raw, config, two, cr2)?;
            parsed.stage1 = Some(stage1(raw, config)?);
        }
        if two {
            parsed.stage2 = Some(stage2(raw, config)?);
        }
        if config.stage2() && parsed.world == StreamWorld::El1 {
            parsed.vmid = ste::S2VMID.of16(raw);
        }
        Ok(parsed)
    }

    /// Whether neither stage translates.
    pub(super) const fn is_bypass(&self) -> bool {
        self.passes && self.stage1.is_none() && self.stage2.is_none()
    }
}

/// Decodes EATS: whether ATS is allowed. Split-stage ATS and device permission
/// tables are not offered.
fn ats(raw: &RawSte, config: &SmmuConfig, two: bool) -> Result<bool, BadSte> {
    match (config.ats, ste::EATS.of(raw)) {
        (false, _) | (true, 0 | 3) => Ok(false),
        (true, 1) if two && ste::S2S.is_set(raw) => Err(BadSte),
        (true, 1) => Ok(true),
        (true, _) => Err(BadSte),
    }
}

/// Decodes STRW.
fn world(raw: &RawSte, config: &SmmuConfig, two: bool, cr2: u32) -> Result<StreamWorld, BadSte> {
    if two || !config.hyp() {
        return Ok(StreamWorld::El1);
    }
    match ste::STRW.of(raw) {
        0 => Ok(StreamWorld::El1),
        2 if cr2 & cr2::E2H != 0 => Ok(StreamWorld::El2E2h),
        2 => Ok(StreamWorld::El2),
        _ => Err(BadSte),
    }
}

fn stage1(raw: &RawSte, config: &SmmuConfig) -> Result<Stage1, BadSte> {
    let context = ste::S1CONTEXTPTR.in_place(raw);
    let substream_bits = ste::S1CDMAX.of32(raw);
    if substream_bits > config.substream_bits() || context >> config.address_bits() != 0 {
        return Err(BadSte);
    }
    let split = match ste::S1FMT.of(raw) {
        1 => Some(6),
        2 => Some(10),
        _ => None,
    };
    Ok(Stage1 {
        context,
        split: split.filter(|_| substream_bits > 0),
        substream_bits,
        default_substream: match ste::S1DSS.of(raw) {
            1 => DefaultSubstream::Bypass,
            2 => DefaultSubstream::Zero,
            _ => DefaultSubstream::Terminate,
        },
        stall_disabled: ste::S1STALLD.is_set(raw),
    })
}

/// The level at which a stage 2 walk starts, or `None` when SL0, T0SZ and TG
/// are inconsistent (DDI 0487 §D8.2.3).
fn stage2_start(granule: Granule, sl0: u64, input_bits: u32) -> Option<u32> {
    let level = match (granule, sl0) {
        (Granule::K4, 0..=2) => 2 - u32::try_from(sl0).ok()?,
        (Granule::K16 | Granule::K64, 0..=2) => 3 - u32::try_from(sl0).ok()?,
        _ => return None,
    };
    // Up to 16 tables may be concatenated at the starting level.
    let entries = input_bits.checked_sub(granule.shift(level))?;
    (1..=granule.stride() + 4)
        .contains(&entries)
        .then_some(level)
}

fn stage2(raw: &RawSte, config: &SmmuConfig) -> Result<Stage2, BadSte> {
    if !ste::S2AA64.is_set(raw) || ste::S2ENDI.is_set(raw) {
        return Err(BadSte);
    }
    let granule = granule_0(ste::S2TG.of(raw)).ok_or(BadSte)?;
    let t0sz = ste::S2T0SZ.of32(raw);
    let widest = if granule == Granule::K64 { 12 } else { 16 };
    if !(widest.max(64 - config.address_bits())..=39).contains(&t0sz) {
        return Err(BadSte);
    }
    let input_bits = 64 - t0sz;
    let start_level = stage2_start(granule, ste::S2SL0.of(raw), input_bits).ok_or(BadSte)?;
    let output_bits = address_bits(ste::S2PS.of(raw), config.address_bits());
    let base = ste::S2TTB.in_place(raw);
    let reach = if granule == Granule::K64 { 52 } else { 48 };
    if base >> output_bits.min(reach) != 0 {
        return Err(BadSte);
    }
    let (access_flag, dirty) = flags(
        ste::S2HA.is_set(raw),
        ste::S2HD.is_set(raw),
        ste::S2AFFD.is_set(raw),
    );
    let mut table = Table {
        granule,
        base,
        input_bits,
        start_level,
        output_bits,
        wide: config.address_bits() == 52,
        access_flag,
        dirty,
        format: Format::Stage2 {
            forced_attributes: ste::S2FWB.is_set(raw),
        },
    };
    table.base &= !(table.alignment() - 1);
    Ok(Stage2 {
        table,
        stall: ste::S2S.is_set(raw),
        record: ste::S2R.is_set(raw),
        protect_walks: ste::S2PTW.is_set(raw),
    })
}
