//! Context descriptors (IHI 0070 §5.4).

use super::address::Va;
use super::config::SmmuConfig;
use super::descriptor::{Format, Granule, Table};
use super::spec::cd::{self, RawCd};
use super::ste::{Stage1, StreamWorld, address_bits, flags, granule_0};

/// Half of a virtual address space, translated through TTB0 or TTB1 (§5.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TtbRegion {
    /// Translation table. Its input is the low bits of an address.
    pub table: Table,
    /// No walks: every address faults (EPD).
    pub disabled: bool,
    /// Bits 63:56 of an address are ignored (TBI).
    pub ignore_top: bool,
}

/// A valid CD.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cd {
    /// TTB0: addresses from 0 up.
    pub low: TtbRegion,
    /// TTB1: addresses from 2^64 - 1 down; `None` in the EL2 regime.
    pub high: Option<TtbRegion>,
    /// ASID; 0 in the EL2 regime, which has no ASIDs.
    pub asid: u16,
    /// Faults of translation stall the transaction (CD.S).
    pub stall: bool,
    /// Faults of translation are recorded (CD.R).
    pub record: bool,
}

/// A CD that is ILLEGAL or not valid: `C_BAD_CD`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadCd;

/// Input of a table walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TableInput<'a> {
    /// TTB0 or TTB1 region.
    pub region: &'a TtbRegion,
    /// Input address of the table.
    pub input: Va,
    /// Bits of the address above the input, with the top byte sign-extended.
    pub base: u64,
}

impl TableInput<'_> {
    /// The address with its top byte sign-extended.
    pub(super) const fn canonical(&self) -> u64 {
        self.base | self.input.0
    }
}

impl Cd {
    /// Decodes and checks a CD that was reached through a stream of regime
    /// `world` (§5.4.2).
    ///
    /// # Errors
    /// [`BadCd`].
    pub(super) fn parse(
        raw: &RawCd,
        config: &SmmuConfig,
        stage1: &Stage1,
        world: StreamWorld,
    ) -> Result<Self, BadCd> {
        let stall = cd::S.is_set(raw);
        // IDR0.TERM_MODEL: a faulting access cannot read as zero.
        if !cd::V.is_set(raw)
            || !cd::AA64.is_set(raw)
            || !cd::A.is_set(raw)
            || stall && stage1.stall_disabled
        {
            return Err(BadCd);
        }
        let one_table = world == StreamWorld::El2;
        let disabled = [
            !one_table && cd::EPD0.is_set(raw),
            !one_table && cd::EPD1.is_set(raw),
        ];
        let walks = !disabled[0] || !one_table && !disabled[1];
        if walks && cd::ENDI.is_set(raw) {
            return Err(BadCd);
        }
        let common = Common {
            raw,
            config,
            unprivileged: !one_table,
        };
        let low = common.region(
            disabled[0],
            cd::TBI0.is_set(raw),
            Fields {
                granule: granule_0(cd::TG0.of(raw)),
                tsz: cd::T0SZ.of32(raw),
                base: cd::TTB0.in_place(raw),
                had: cd::HAD0.is_set(raw),
            },
        )?;
        let high = if one_table {
            None
        } else {
            let granule = match cd::TG1.of(raw) {
                1 => Some(Granule::K16),
                2 => Some(Granule::K4),
                3 => Some(Granule::K64),
                _ => None,
            };
            Some(common.region(
                disabled[1],
                cd::TBI1.is_set(raw),
                Fields {
                    granule,
                    tsz: cd::T1SZ.of32(raw),
                    base: cd::TTB1.in_place(raw),
                    had: cd::HAD1.is_set(raw),
                },
            )?)
        };
        Ok(Self {
            low,
            high,
            asid: if one_table { 0 } else { cd::ASID.of16(raw) },
            stall,
            record: cd::R.is_set(raw),
        })
    }

    /// Table input of `address`, or `None` when it is between the two regions
    /// or in a disabled one (§3.4.1).
    pub(super) fn table_input(&self, address: u64) -> Option<TableInput<'_>> {
        let upper = self.high.is_some() && address >> 55 & 1 != 0;
        let region = if upper {
            self.high.as_ref()?
        } else {
            &self.low
        };
        if region.disabled {
            return None;
        }
        let ignored = if region.ignore_top { 0xff << 56 } else { 0 };
        let mask = (1_u64 << region.table.input_bits) - 1;
        let base = if upper { !mask } else { 0 };
        ((address ^ base) & !mask & !ignored == 0).then_some(TableInput {
            region,
            input: Va(address & mask),
            base,
        })
    }

    /// Whether several addresses may have one translation (TBI).
    pub(super) fn has_aliases(&self) -> bool {
        let has_alias = |region: &TtbRegion| region.ignore_top && !region.disabled;
        has_alias(&self.low) || self.high.as_ref().is_some_and(has_alias)
    }
}

struct Fields {
    granule: Option<Granule>,
    tsz: u32,
    base: u64,
    had: bool,
}

struct Common<'a> {
    raw: &'a RawCd,
    config: &'a SmmuConfig,
    unprivileged: bool,
}

impl Common<'_> {
    fn region(&self, disabled: bool, ignore_top: bool, fields: Fields) -> Result<TtbRegion, BadCd> {
        let output_bits = address_bits(cd::IPS.of(self.raw), self.config.address_bits());
        let (access_flag, dirty) = flags(
            cd::HA.is_set(self.raw),
            cd::HD.is_set(self.raw),
            cd::AFFD.is_set(self.raw),
        );
        let granule = match fields.granule {
            Some(granule) => granule,
            // The fields of a disabled region are ignored (§5.4.1.1).
            None if disabled => Granule::K4,
            None => return Err(BadCd),
        };
        let large = granule == Granule::K64;
        let widest = if large && self.config.address_bits() == 52 {
            12
        } else {
            16
        };
        let reach = output_bits.min(if large { 52 } else { 48 });
        let legal = (widest..=39).contains(&fields.tsz) && fields.base >> reach == 0;
        if !legal && !disabled {
            return Err(BadCd);
        }
        let input_bits = 64 - if legal { fields.tsz } else { 16 };
        let start_level = 4 - (input_bits - granule.bits()).div_ceil(granule.stride());
        let mut table = Table {
            granule,
            base: fields.base,
            input_bits,
            start_level,
            output_bits,
            wide: self.config.address_bits() == 52,
            access_flag,
            dirty,
            format: Format::Stage1 {
                unprivileged: self.unprivileged,
                hierarchical: !fields.had,
            },
        };
        table.base &= !(table.alignment() - 1);
        Ok(TtbRegion {
            table,
            disabled,
            ignore_top,
        })
    }
}
