//! The root complex: configuration space through ECAM (PCIe 6.0 §7.2.2),
//! functions as root complex integrated endpoints on bus 0.

use std::collections::{BTreeMap, BTreeSet};
use std::iter;
use std::ops::Range;
use std::sync::{Arc, Weak};

use iommu::Gpa;
use iommu::lock::{LEAF, LeafMutex, RankedMutex, RankedRwLock};
use log::debug;

use super::bar::{BarMove, Bars};
use super::config::{ConfigSpace, Ids, SIZE};
use super::image::{ConfigImage, ConfigWritten};
use crate::bus::{Bus, BusDevice};

/// Number of device numbers on the bus.
pub const SLOTS: u8 = 32;
/// Bytes of configuration space of one function, as a shift.
const FUNCTION_SHIFT: u32 = 12;
/// IDs of the "QEMU PCIe Host bridge" of Red Hat, for which Linux has no
/// quirks.
const BRIDGE: Ids = Ids {
    vendor: 0x1b36,
    device: 0x0008,
    class: 0x06_0000,
    revision: 0,
    subsystem_vendor: 0,
    subsystem: 0,
};

/// A PCI function. BARs are named by number. The methods are called on the vCPU
/// thread of the access; each takes the function's own lock.
pub trait PciFunction: Send + Sync {
    /// Reads configuration space at `offset` bytes.
    fn read_config(&self, offset: u16, data: &mut [u8]);

    /// Writes configuration space at `offset` bytes.
    fn write_config(&self, offset: u16, data: &[u8]) -> ConfigWritten;

    /// Called when a BAR was moved on the bus; `None` when it is not decoded.
    fn placed(&self, bar: usize, at: Option<Gpa>);

    /// Reads a BAR at `offset` bytes.
    fn read_bar(&self, bar: usize, offset: u64, data: &mut [u8]);

    /// Writes a BAR at `offset` bytes.
    fn write_bar(&self, bar: usize, offset: u64, data: &[u8]);
}

/// Error for a slot that is taken or does not exist.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("slot {0} of the PCI bus is taken or does not exist")]
pub struct PlaceError(pub u8);

/// A function's BAR as a device on the memory bus.
struct BarDevice(Arc<dyn PciFunction>, usize);

impl BusDevice for BarDevice {
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.0.read_bar(self.1, offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.0.write_bar(self.1, offset, data);
    }
}

/// The root complex as the device of the ECAM window.
pub struct PciRoot {
    bridge: LeafMutex<ConfigSpace>,
    functions: RankedRwLock<BTreeMap<u8, Arc<dyn PciFunction>>, LEAF>,
    /// Weak, because the bus owns the root complex.
    memory: Weak<Bus>,
    /// Locked during each write, so that the bus, the functions and the image
    /// agree.
    written: RankedMutex<Written, 0>,
}

/// What follows the functions' registers.
#[derive(Default)]
struct Written {
    /// Address of each slot's BARs on the bus.
    placed: BTreeMap<(u8, usize), u64>,
    /// The copy that the guest reads, if the host can have one.
    image: Option<Arc<dyn ConfigImage>>,
    /// Slots whose functions the image does not have.
    withdrawn: BTreeSet<u8>,
}

impl PciRoot {
    /// A root complex that places BARs on `memory`.
    #[must_use]
    pub fn new(memory: &Arc<Bus>) -> Self {
        Self {
            bridge: LeafMutex::new(ConfigSpace::new(&BRIDGE, Bars::default())),
            functions: RankedRwLock::default(),
            memory: Arc::downgrade(memory),
            written: RankedMutex::default(),
        }
    }

    /// Stores the registers of the bridge and of every function in `image`,
    /// which follows their changes from now on. Called before the guest runs,
    /// when all functions are added.
    pub fn publish(&self, image: Arc<dyn ConfigImage>) {
        let mut written = self.written.lock();
        let functions: Vec<u8> = self.functions.read().keys().copied().collect();
        for slot in iter::once(0).chain(functions) {
            self.store(&*image, slot, ConfigSpace::all_words());
        }
        written.image = Some(image);
    }

    /// Copies registers at `range` to the image.
    fn store(&self, image: &dyn ConfigImage, slot: u8, range: Range<u16>) {
        let mut words = [0; SIZE as usize];
        let Some(words) = words.get_mut(..range.len()) else {
            return;
        };
        self.read_register(slot, range.start, words);
        image.store(slot, range.start, words);
    }

    fn read_register(&self, slot: u8, register: u16, data: &mut [u8]) {
        if slot == 0 {
            self.bridge.lock().read(register, data);
        } else if let Some(function) = self.function(slot) {
            function.read_config(register, data);
        }
    }

    /// Updates the image after a write to a function's registers.
    fn update_image(&self, written: &mut Written, slot: u8, outcome: &ConfigWritten) {
        let Some(image) = &written.image else {
            return;
        };
        if outcome.reads_have_effects && written.withdrawn.insert(slot) {
            image.withdraw(slot);
        } else if !written.withdrawn.contains(&slot) {
            self.store(&**image, slot, outcome.changed.clone());
        }
    }

    /// Adds a function at a device number; slot 0 is the host bridge.
    ///
    /// # Errors
    /// The slot is taken or does not exist.
    pub fn add(&self, slot: u8, function: Arc<dyn PciFunction>) -> Result<(), PlaceError> {
        let mut functions = self.functions.write();
        if slot == 0 || slot >= SLOTS || functions.contains_key(&slot) {
            return Err(PlaceError(slot));
        }
        functions.insert(slot, function);
        Ok(())
    }

    fn function(&self, slot: u8) -> Option<Arc<dyn PciFunction>> {
        self.functions.read().get(&slot).cloned()
    }

    /// Moves BARs on the bus. All are removed first, so that two of them can
    /// exchange their addresses.
    fn relocate(
        &self,
        slot: u8,
        function: &Arc<dyn PciFunction>,
        moves: &[BarMove],
        placed: &mut BTreeMap<(u8, usize), u64>,
    ) {
        let Some(memory) = self.memory.upgrade() else {
            return;
        };
        for &BarMove { index, .. } in moves {
            if let Some(base) = placed.remove(&(slot, index)) {
                function.placed(index, None);
                let _ = memory.remove(base);
            }
        }
        for &BarMove { index, size, to } in moves {
            let Some(to) = to else {
                continue;
            };
            let device = Arc::new(BarDevice(Arc::clone(function), index));
            match memory.insert(to.0, size, device) {
                Ok(()) => {
                    placed.insert((slot, index), to.0);
                    function.placed(index, Some(to));
                }
                // The BAR overlaps another range, so it is not decoded. The guest
                // may repeat this without end, so this is no warning.
                Err(error) => debug!("PCI device {slot}, BAR {index}: {error}"),
            }
        }
    }
}

/// Decodes an ECAM offset to a device number on bus 0 and a register offset.
/// `None` for other buses and functions other than 0.
fn decode(offset: u64) -> Option<(u8, u16)> {
    let register = u16::try_from(offset & ((1 << FUNCTION_SHIFT) - 1)).ok()?;
    let function = u32::try_from(offset >> FUNCTION_SHIFT).ok()?;
    let slot = u8::try_from(function / 8)
        .ok()
        .filter(|&slot| slot < SLOTS)?;
    (function % 8 == 0).then_some((slot, register))
}

impl BusDevice for PciRoot {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((slot, register)) = decode(offset) {
            self.read_register(slot, register, data);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let Some((slot, register)) = decode(offset) else {
            return;
        };
        let mut written = self.written.lock();
        if slot == 0 {
            self.bridge.lock().write(register, data);
            let outcome = ConfigWritten {
                changed: ConfigSpace::words_of(register, data.len()),
                ..ConfigWritten::default()
            };
            self.update_image(&mut written, slot, &outcome);
        } else if let Some(function) = self.function(slot) {
            let outcome = function.write_config(register, data);
            self.relocate(slot, &function, &outcome.moves, &mut written.placed);
            self.update_image(&mut written, slot, &outcome);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A function whose registers read as its device number.
    struct Numbered(u8);

    impl PciFunction for Numbered {
        fn read_config(&self, offset: u16, data: &mut [u8]) {
            data.fill(self.0);
            if let Some(first) = data.first_mut() {
                *first = offset.to_le_bytes()[0];
            }
        }

        fn write_config(&self, _: u16, data: &[u8]) -> ConfigWritten {
            let base = data.first().map_or(0, |&page| u64::from(page) << 12);
            let moves = vec![BarMove {
                index: 0,
                size: 0x1000,
                to: Some(Gpa(base)).filter(|base| base.0 != 0),
            }];
            ConfigWritten {
                moves,
                ..ConfigWritten::default()
            }
        }

        fn placed(&self, _: usize, _: Option<Gpa>) {}

        fn read_bar(&self, _: usize, _: u64, data: &mut [u8]) {
            data.fill(self.0);
        }

        fn write_bar(&self, _: usize, _: u64, _: &[u8]) {}
    }

    fn root() -> (Arc<Bus>, PciRoot) {
        let memory = Arc::new(Bus::new());
        let root = PciRoot::new(&memory);
        (memory, root)
    }

    fn word(root: &PciRoot, offset: u64) -> u32 {
        let mut data = [0; 4];
        root.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn slot_0_is_the_host_bridge() {
        let (_memory, root) = root();
        assert_eq!(word(&root, 0), 0x0008_1b36);
        assert_eq!(word(&root, 8) >> 16, 0x0600);
        root.write(0, &[0; 4]);
        assert_eq!(word(&root, 0), 0x0008_1b36);
        assert_eq!(root.add(0, Arc::new(Numbered(0))), Err(PlaceError(0)));
    }

    #[test]
    fn every_slot_takes_one_function() {
        let (_memory, root) = root();
        for slot in 1..SLOTS {
            root.add(slot, Arc::new(Numbered(slot))).unwrap();
        }
        for slot in [0, 5, SLOTS, u8::MAX] {
            let again = root.add(slot, Arc::new(Numbered(0)));
            assert_eq!(again, Err(PlaceError(slot)));
        }
        for slot in 1..SLOTS {
            let offset = u64::from(slot) << 15;
            let number = u32::from(slot) * 0x0101_0100;
            assert_eq!(word(&root, offset + 0x24), number | 0x24);
        }
    }

    #[test]
    fn absent_functions_read_as_ones_and_ignore_writes() {
        let (memory, root) = root();
        root.add(4, Arc::new(Numbered(4))).unwrap();
        let absent = [
            3 << 15,           // another slot
            4 << 15 | 1 << 12, // another function
            1 << 20 | 4 << 15, // another bus
            (1 << 28) - 4,     // the last register of 256 buses
            u64::MAX - 3,
        ];
        for offset in absent {
            assert_eq!(word(&root, offset), u32::MAX, "{offset:#x}");
            root.write(offset, &[0x40; 4]);
        }
        assert!(!memory.read(0x4_0000, &mut [0; 4]));
    }

    #[test]
    fn overlapping_bar_is_not_decoded() {
        let (memory, root) = root();
        for slot in [1, 2] {
            root.add(slot, Arc::new(Numbered(slot))).unwrap();
        }
        let at = |address: u64| {
            let mut data = [0];
            memory.read(address, &mut data).then_some(data[0])
        };
        root.write(1 << 15, &[5]);
        root.write(2 << 15, &[5]);
        assert_eq!(at(0x5000), Some(1));
        root.write(2 << 15, &[6]);
        assert_eq!((at(0x5000), at(0x6000)), (Some(1), Some(2)));
        // The second BAR is decoded only after the first one has moved.
        root.write(1 << 15, &[0]);
        assert_eq!(at(0x5000), None);
        root.write(2 << 15, &[5]);
        assert_eq!((at(0x5000), at(0x6000)), (Some(2), None));
    }
}
