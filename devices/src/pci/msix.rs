//! MSI-X (PCIe 6.0 §6.1.4, §7.7.2): the table, masking, pending bits.

use std::sync::Arc;

use iommu::Iova;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes};

use super::{ConfigSpace, MsiTarget};
use crate::bus::read_image;

/// The capability's ID.
const CAPABILITY: u8 = 0x11;
/// Bits 15 and 14 of the message control register.
const ENABLE: u16 = 1 << 15;
const FUNCTION_MASK: u16 = 1 << 14;
/// Bit 0 of an entry's vector control.
const ENTRY_MASK: u32 = 1;

/// The capability after its PCI header (PCIe 6.0 §7.7.2). Bits 2:0 of the
/// offsets are the number of their BAR, 0.
#[derive(IntoBytes, FromZeros, Immutable)]
#[repr(C)]
struct MsixCap {
    control: U16,
    table: U32,
    pending: U32,
}

/// A table entry as the guest wrote it.
#[derive(Clone, IntoBytes, FromBytes, Immutable)]
#[repr(C)]
struct Entry {
    address: U64,
    data: U32,
    control: U32,
}

const MASKED: Entry = Entry {
    address: U64::ZERO,
    data: U32::ZERO,
    control: U32::new(ENTRY_MASK),
};

/// The MSI-X capability and table of one function.
///
/// Each source of interrupts (a queue, configuration changes) is bound to an
/// entry; several may share one. A source is routed while neither its entry nor
/// the function is masked and the function is bus master; otherwise its eventfd
/// keeps a signal, which is the pending bit.
pub struct Msix {
    target: Arc<MsiTarget>,
    capability: u16,
    entries: Vec<Entry>,
    /// Entry of each source, by the source's number in the target.
    sources: Vec<Option<u16>>,
    control: u16,
    bus_master: bool,
}

impl Msix {
    /// Adds the capability to `config`: a table of `entries` entries at `table`
    /// and the pending bits at `pending`, both offsets into BAR 0. The sources
    /// are those of the target.
    #[must_use]
    pub fn new(
        config: &mut ConfigSpace,
        target: Arc<MsiTarget>,
        entries: u16,
        sources: usize,
        (table, pending): (u32, u32),
    ) -> Self {
        let body = MsixCap {
            control: entries.saturating_sub(1).into(),
            table: table.into(),
            pending: pending.into(),
        };
        let writable = MsixCap {
            control: (ENABLE | FUNCTION_MASK).into(),
            ..MsixCap::new_zeroed()
        };
        Self {
            target,
            capability: config.add_capability(CAPABILITY, body.as_bytes(), writable.as_bytes()),
            entries: vec![MASKED; usize::from(entries)],
            sources: vec![None; sources],
            control: 0,
            bus_master: false,
        }
    }

    /// Number of table entries.
    #[must_use]
    pub fn entries(&self) -> usize {
        self.entries.len()
    }

    /// Binds source `source` to an entry, or to none. A signal while it has
    /// none is lost (virtio 1.2 §4.1.5.1.2.1).
    pub fn bind(&mut self, source: usize, entry: Option<u16>) {
        if let Some(bound) = self.sources.get_mut(source) {
            if bound.is_none() {
                self.target.clear_pending(source);
            }
            *bound = entry;
            self.route(|at, _| at == source);
        }
    }

    /// Updates the routes after a write to configuration space.
    pub fn config_written(&mut self, config: &ConfigSpace) {
        let [_, _, low, high] = config.word(self.capability).to_le_bytes();
        let control = u16::from_le_bytes([low, high]) & (ENABLE | FUNCTION_MASK);
        let bus_master = config.bus_master();
        if (control, bus_master) != (self.control, self.bus_master) {
            (self.control, self.bus_master) = (control, bus_master);
            self.route(|_, _| true);
        }
    }

    /// Reads the table at `offset` bytes; bytes beyond it read as zeros.
    pub fn read_table(&self, offset: u64, data: &mut [u8]) {
        read_image(self.entries.as_bytes(), offset, data);
    }

    /// Writes the table at `offset` bytes. Updates the routes once, after the
    /// whole access.
    pub fn write_table(&mut self, offset: u64, data: &[u8]) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let bytes = self.entries.as_mut_bytes().get_mut(start..);
        let bytes = bytes.unwrap_or_default().iter_mut().zip(data);
        bytes.for_each(|(to, from)| *to = *from);
        let end = start.saturating_add(data.len());
        let touched = start / size_of::<Entry>()..end.div_ceil(size_of::<Entry>());
        self.route(|_, entry| entry.is_some_and(|entry| touched.contains(&usize::from(entry))));
    }

    /// Reads the pending bits at `offset` bytes.
    pub fn read_pending(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        for (source, entry) in self.sources.iter().enumerate() {
            let Some(bit) = entry.map(u64::from).filter(|_| self.target.pending(source)) else {
                continue;
            };
            let byte = (bit / 8)
                .checked_sub(offset)
                .and_then(|at| data.get_mut(usize::try_from(at).ok()?));
            if let Some(byte) = byte {
                *byte |= 1 << (bit % 8);
            }
        }
    }

    /// Binds every source to no entry.
    pub fn unbind_all(&mut self) {
        self.sources.fill(None);
        self.route(|_, _| true);
    }

    /// Resets the table with the function. The capability is reset as part of
    /// configuration space.
    pub fn reset(&mut self) {
        self.entries.fill(MASKED);
        self.unbind_all();
    }

    fn message(&self, entry: Option<u16>) -> Option<(Iova, u32)> {
        let open = self.control == ENABLE && self.bus_master;
        let entry = self.entries.get(usize::from(entry?))?;
        let open = open && entry.control & ENTRY_MASK == 0;
        open.then_some((Iova(entry.address.get() & !3), entry.data.get()))
    }

    fn route(&self, choose: impl Fn(usize, Option<u16>) -> bool) {
        for (source, &entry) in self.sources.iter().enumerate() {
            if choose(source, entry) {
                self.target.set(source, self.message(entry));
            }
        }
    }
}
