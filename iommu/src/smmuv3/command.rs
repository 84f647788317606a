//! Decoding of commands (IHI 0070 §4).

use serde::{Deserialize, Serialize};

use super::config::SmmuConfig;
use super::descriptor::Granule;
use super::registers::Registers;
use super::spec::command::{self as cmd, Cerror, RawCommand, op};
use super::spec::{cr0, cr2, reg};
use super::tlb::{AsidScope, Scope, Span, StageScope};
use crate::addr::{Iova, IovaRange, StreamId};

/// How CMD_SYNC signals its completion (§4.7.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Signal {
    /// No signal, or SIG_SEV, which this SMMU does not implement.
    None,
    /// By an interrupt, and by a message if the address is not 0.
    Interrupt {
        /// Address of the message.
        address: u64,
        /// Data of the message.
        data: u32,
    },
}

/// Response to a page request group (§4.5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum PageResponse {
    /// The device shall not repeat the request.
    Failure,
    /// A page is not present.
    Invalid,
    /// The pages are present.
    Success,
}

/// Effect of CMD_RESUME on a stalled transaction (§4.7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resume {
    /// It is translated again, as a new transaction.
    Retry,
    /// It is aborted.
    Terminate,
}

/// A decoded command (§4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    /// CMD_PREFETCH_*: a hint without effect.
    Prefetch,
    /// CMD_CFGI_STE, CMD_CFGI_STE_RANGE: the first and last stream, inclusive.
    ConfigStreams(StreamId, StreamId),
    /// CMD_CFGI_CD: one context descriptor of a stream.
    ConfigCd(StreamId, u32),
    /// CMD_CFGI_CD_ALL: all context descriptors of a stream.
    ConfigCds(StreamId),
    /// CMD_TLBI_*: entries of the TLB.
    Tlb(Scope),
    /// CMD_ATC_INV: entries of a function's device IOTLB.
    Atc {
        /// Stream of the function.
        stream: StreamId,
        /// SubstreamID of the entries; `None` for entries without one.
        substream: Option<u32>,
        /// Addresses, both ends inclusive.
        range: IovaRange,
    },
    /// CMD_PRI_RESP: response to a page request group.
    PageResponse {
        /// Stream of the request.
        stream: StreamId,
        /// SubstreamID of the request.
        substream: Option<u32>,
        /// Page request group index.
        group: u16,
        /// Response for the function.
        response: PageResponse,
    },
    /// CMD_RESUME: one stalled transaction, by stream and STAG.
    Resume(StreamId, u16, Resume),
    /// CMD_STALL_TERM: every stalled transaction of a stream.
    StallTerm(StreamId),
    /// CMD_SYNC: completes all earlier commands.
    Sync(Signal),
}

/// Kinds of commands that the statistics distinguish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[allow(missing_docs, reason = "the names are the specification's")]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum CommandKind {
    Prefetch,
    Cfgi,
    Tlbi,
    AtcInv,
    PriResp,
    Resume,
    StallTerm,
    Sync,
}

impl CommandKind {
    /// The specification's name, without the suffix of the variant.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Prefetch => "CMD_PREFETCH",
            Self::Cfgi => "CMD_CFGI",
            Self::Tlbi => "CMD_TLBI",
            Self::AtcInv => "CMD_ATC_INV",
            Self::PriResp => "CMD_PRI_RESP",
            Self::Resume => "CMD_RESUME",
            Self::StallTerm => "CMD_STALL_TERM",
            Self::Sync => "CMD_SYNC",
        }
    }
}

impl Command {
    /// Kind of the command.
    pub(super) const fn kind(&self) -> CommandKind {
        match self {
            Self::Prefetch => CommandKind::Prefetch,
            Self::ConfigStreams(..) | Self::ConfigCd(..) | Self::ConfigCds(..) => CommandKind::Cfgi,
            Self::Tlb(_) => CommandKind::Tlbi,
            Self::Atc { .. } => CommandKind::AtcInv,
            Self::PageResponse { .. } => CommandKind::PriResp,
            Self::Resume(..) => CommandKind::Resume,
            Self::StallTerm(_) => CommandKind::StallTerm,
            Self::Sync(_) => CommandKind::Sync,
        }
    }

    /// Decodes and checks a command of the non-secure command queue.
    ///
    /// # Errors
    /// [`Cerror::Ill`] for a command that this configuration does not implement
    /// or whose parameters are ILLEGAL.
    pub(super) fn parse(
        raw: &RawCommand,
        config: &SmmuConfig,
        registers: &Registers,
    ) -> Result<Self, Cerror> {
        Decoder {
            raw,
            config,
            registers,
        }
        .command()
    }
}

struct Decoder<'a> {
    raw: &'a RawCommand,
    config: &'a SmmuConfig,
    registers: &'a Registers,
}

const fn needs(condition: bool) -> Result<(), Cerror> {
    if condition { Ok(()) } else { Err(Cerror::Ill) }
}

impl Decoder<'_> {
    fn command(&self) -> Result<Command, Cerror> {
        let opcode = cmd::OPCODE.of(self.raw);
        match opcode {
            op::PREFETCH_CONFIG | op::PREFETCH_ADDR => {
                self.stream()?;
                Ok(Command::Prefetch)
            }
            op::CFGI_STE => {
                let stream = self.stream()?;
                Ok(Command::ConfigStreams(stream, stream))
            }
            op::CFGI_STE_RANGE => {
                let mask = u32::MAX >> (31 - cmd::RANGE.of32(self.raw));
                let stream = self.stream()?.0;
                let last = StreamId(stream | mask);
                Ok(Command::ConfigStreams(StreamId(stream & !mask), last))
            }
            op::CFGI_CD => {
                needs(self.config.stage1())?;
                let substream = cmd::SSID.of32(self.raw);
                Ok(Command::ConfigCd(self.stream()?, substream))
            }
            op::CFGI_CD_ALL => {
                needs(self.config.stage1())?;
                Ok(Command::ConfigCds(self.stream()?))
            }
            op::TLBI_NH_ALL..=op::TLBI_NSNH_ALL => self.tlbi(opcode).map(Command::Tlb),
            op::ATC_INV => self.atc_inv(),
            op::PRI_RESP => self.pri_resp(),
            op::RESUME => {
                let action = if cmd::RESUME_RETRY.is_set(self.raw) {
                    Resume::Retry
                } else {
                    Resume::Terminate
                };
                let stag = cmd::STAG.of16(self.raw);
                Ok(Command::Resume(self.stream()?, stag, action))
            }
            op::STALL_TERM => Ok(Command::StallTerm(self.stream()?)),
            op::SYNC => self.sync(),
            _ => Err(Cerror::Ill),
        }
    }

    /// The StreamID. One beyond IDR1.SIDSIZE is an error (§4.1.7).
    fn stream(&self) -> Result<StreamId, Cerror> {
        needs(!cmd::SSEC.is_set(self.raw))?;
        Ok(StreamId(cmd::SID.of32(self.raw)))
    }

    fn substream(&self) -> Option<u32> {
        cmd::SSV.is_set(self.raw).then(|| cmd::SSID.of32(self.raw))
    }

    /// §4.4.2 to §4.4.4
    fn tlbi(&self, opcode: u64) -> Result<Scope, Cerror> {
        let (one, two) = (self.config.stage1(), self.config.stage2());
        let asid = cmd::ASID.of16(self.raw);
        let e2h = self.registers.cr2(cr2::E2H);
        let stage1 = |asid, span| Scope {
            el1: true,
            e2h: None,
            vmid: Some(self.vmid()),
            asid,
            stages: StageScope::First,
            span,
        };
        let el2 = |e2h, asid, span| Scope {
            el1: false,
            e2h,
            vmid: Some((0, u16::MAX)),
            ..stage1(asid, span)
        };
        let (required, scope) = match opcode {
            op::TLBI_NH_ALL => (one, stage1(AsidScope::Any, None)),
            op::TLBI_NH_ASID => (one, stage1(AsidScope::Only(asid), None)),
            op::TLBI_NH_VA => (one, stage1(AsidScope::OrGlobal(asid), self.span()?)),
            op::TLBI_NH_VAA => (one, stage1(AsidScope::Any, self.span()?)),
            op::TLBI_EL2_ALL => (self.config.hyp(), el2(None, AsidScope::Any, None)),
            op::TLBI_EL2_ASID => {
                let scope = el2(Some(true), AsidScope::Only(asid), None);
                (self.config.hyp(), scope)
            }
            op::TLBI_EL2_VA => {
                let asid = if e2h {
                    AsidScope::OrGlobal(asid)
                } else {
                    AsidScope::Any
                };
                (self.config.hyp(), el2(Some(e2h), asid, self.span()?))
            }
            op::TLBI_EL2_VAA => {
                let scope = el2(Some(e2h), AsidScope::Any, self.span()?);
                (self.config.hyp(), scope)
            }
            op::TLBI_S12_VMALL => {
                let scope = Scope {
                    stages: StageScope::Any,
                    ..stage1(AsidScope::Any, None)
                };
                (two, scope)
            }
            op::TLBI_S2_IPA => {
                let scope = Scope {
                    stages: StageScope::Second,
                    ..stage1(AsidScope::Any, self.ipa_span()?)
                };
                (two, scope)
            }
            op::TLBI_NSNH_ALL => {
                let scope = Scope {
                    vmid: None,
                    stages: StageScope::Any,
                    ..stage1(AsidScope::Any, None)
                };
                (true, scope)
            }
            _ => return Err(Cerror::Ill),
        };
        needs(required)?;
        Ok(scope)
    }

    /// VMID and the mask of its significant bits (§3.17.6); 0 without stage 2.
    fn vmid(&self) -> (u16, u16) {
        if !self.config.stage2() {
            return (0, u16::MAX);
        }
        let ignored = (self.registers.get(reg::CR0) & cr0::VMW) >> cr0::VMW_SHIFT;
        let mask = u16::MAX.checked_shl(ignored).unwrap_or(0);
        (cmd::VMID.of16(self.raw), mask)
    }

    fn span(&self) -> Result<Option<Span>, Cerror> {
        self.span_from(cmd::ADDRESS.in_place(self.raw)).map(Some)
    }

    fn ipa_span(&self) -> Result<Option<Span>, Cerror> {
        self.span_from(cmd::IPA.in_place(self.raw)).map(Some)
    }

    /// Range and level hint (§4.4.1.1).
    fn span_from(&self, first: u64) -> Result<Span, Cerror> {
        let granule = match cmd::TG.of(self.raw) {
            0 => {
                return Ok(Span {
                    first,
                    last: first | 0xfff,
                    limit: u32::MAX,
                    group: 0,
                });
            }
            1 => Granule::K4,
            2 => Granule::K16,
            _ => Granule::K64,
        };
        let (num, scale) = (cmd::NUM.of(self.raw), cmd::SCALE.of32(self.raw));
        let level = match (granule, cmd::TTL.of32(self.raw)) {
            (Granule::K16, 1) => 0,
            (_, level) => level,
        };
        needs(num != 0 || scale != 0 || level != 0)?;
        let bytes = (num + 1) << scale << granule.bits();
        Ok(Span {
            first,
            last: first.saturating_add(bytes - 1),
            limit: match level {
                0 => u32::MAX,
                level => granule.shift(level),
            },
            group: granule.contiguous(level),
        })
    }

    /// §4.5.1
    fn atc_inv(&self) -> Result<Command, Cerror> {
        needs(self.config.ats)?;
        let shift = cmd::ATC_SIZE.of32(self.raw).saturating_add(12);
        Ok(Command::Atc {
            stream: self.stream()?,
            substream: self.substream(),
            range: IovaRange::block(Iova(cmd::ADDRESS.in_place(self.raw)), shift),
        })
    }

    /// §4.5.2
    fn pri_resp(&self) -> Result<Command, Cerror> {
        needs(self.config.pri())?;
        let response = match cmd::PRI_RESP.of(self.raw) {
            0 => PageResponse::Failure,
            1 => PageResponse::Invalid,
            2 => PageResponse::Success,
            _ => return Err(Cerror::Ill),
        };
        Ok(Command::PageResponse {
            stream: self.stream()?,
            substream: self.substream(),
            group: cmd::PRG_INDEX.of16(self.raw),
            response,
        })
    }

    /// §4.7.3
    fn sync(&self) -> Result<Command, Cerror> {
        Ok(Command::Sync(match cmd::CS.of(self.raw) {
            0 | 2 => Signal::None,
            1 => Signal::Interrupt {
                address: cmd::MSI_ADDRESS.in_place(self.raw),
                data: cmd::MSI_DATA.of32(self.raw),
            },
            _ => return Err(Cerror::Ill),
        }))
    }
}
