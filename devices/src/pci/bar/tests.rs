use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::*;
use crate::bus::{Bus, BusDevice as _};
use crate::pci::{ConfigSpace, ConfigWritten, Ids, PciFunction, PciRoot};

const COMMAND: u64 = 4;
const SLOT: u64 = 3 << 15;
const KINDS: [BarKind; 4] = [
    BarKind::Memory32,
    BarKind::Memory64,
    BarKind::Prefetchable32,
    BarKind::Prefetchable64,
];

/// A function whose BARs read as their number.
struct Function(Mutex<ConfigSpace>, Mutex<BTreeMap<usize, Gpa>>);

impl PciFunction for Function {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        self.0.lock().unwrap().read(offset, data);
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> ConfigWritten {
        let mut config = self.0.lock().unwrap();
        config.write(offset, data);
        ConfigWritten {
            moves: config.bar_moves(),
            changed: ConfigSpace::words_of(offset, data.len()),
            reads_have_effects: false,
        }
    }

    fn placed(&self, bar: usize, at: Option<Gpa>) {
        let mut placed = self.1.lock().unwrap();
        match at {
            Some(at) => assert_eq!(placed.insert(bar, at), None),
            None => assert!(placed.remove(&bar).is_some()),
        }
    }

    fn read_bar(&self, bar: usize, _: u64, data: &mut [u8]) {
        data.fill(u8::try_from(bar).unwrap());
    }

    fn write_bar(&self, _: usize, _: u64, _: &[u8]) {}
}

/// A function on a bus, accessed as software does.
struct Software {
    memory: Arc<Bus>,
    root: PciRoot,
    function: Arc<Function>,
}

impl Software {
    fn new(bars: Bars) -> Self {
        let ids = Ids {
            vendor: 1,
            device: 2,
            class: 3,
            revision: 4,
            subsystem_vendor: 5,
            subsystem: 6,
        };
        let memory = Arc::new(Bus::new());
        let root = PciRoot::new(&memory);
        let config = Mutex::new(ConfigSpace::new(&ids, bars));
        let function = Arc::new(Function(config, Mutex::default()));
        root.add(3, Arc::clone(&function) as Arc<dyn PciFunction>)
            .unwrap();
        Self {
            memory,
            root,
            function,
        }
    }

    fn write(&self, offset: u64, bytes: &[u8]) {
        self.root.write(SLOT + offset, bytes);
    }

    fn register(&self, index: usize) -> u32 {
        let mut bytes = [0; 4];
        self.root.read(SLOT + offset(index), &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn enable(&self, memory_space: bool) {
        self.write(COMMAND, &[u8::from(memory_space) << 1]);
    }

    /// The BAR that decodes an address.
    fn at(&self, address: u64) -> Option<usize> {
        let mut data = [0];
        self.memory
            .read(address, &mut data)
            .then_some(data[0].into())
    }

    fn placed(&self) -> BTreeMap<usize, Gpa> {
        self.function.1.lock().unwrap().clone()
    }
}

fn offset(register: usize) -> u64 {
    0x10 + 4 * register as u64
}

fn bars(list: &[(usize, BarKind, u64, u64)]) -> Bars {
    let mut bars = Bars::default();
    for &(index, kind, size, base) in list {
        bars.add(index, kind, size, Gpa(base)).unwrap();
    }
    bars
}

#[test]
fn bar_without_free_registers_or_with_an_impossible_extent_is_refused() {
    let mut bars = bars(&[
        (1, BarKind::Memory64, 0x1000, 0),
        (4, BarKind::Memory32, 0x10, 0x10),
    ]);
    let wide = [(0, 0x10), (1, 0x10), (2, 0x10), (3, 0x10), (4, 0x10)];
    for (index, size) in wide
        .into_iter()
        .chain([(5, 0x10), (6, 0x10), (usize::MAX, 0)])
    {
        let refused = bars.add(index, BarKind::Memory64, size, Gpa(0));
        assert_eq!(refused, Err(BarError::Register(index)));
    }
    for (kind, size, base) in [
        (BarKind::Memory32, 0, 0),
        (BarKind::Memory32, 8, 0),
        (BarKind::Memory32, 0x30, 0),
        (BarKind::Memory32, 1 << 32, 0),
        (BarKind::Memory32, 0x1000, 1 << 32),
        (BarKind::Prefetchable32, 0x1000, 0x1800),
    ] {
        let index = 3;
        let base = Gpa(base);
        let refused = Err(BarError::Extent { index, size, base });
        assert_eq!(bars.add(index, kind, size, base), refused);
    }
    for index in [0, 3, 5] {
        bars.add(index, BarKind::Memory32, 1 << 31, Gpa(1 << 31))
            .unwrap();
    }
}

#[test]
fn one_write_exchanges_the_addresses_of_two_bars() {
    let software = Software::new(bars(&[
        (0, BarKind::Memory32, 0x1000, 0x1000),
        (1, BarKind::Memory32, 0x1000, 0x2000),
    ]));
    software.enable(true);
    assert_eq!(
        (software.at(0x1000), software.at(0x2000)),
        (Some(0), Some(1))
    );
    software.write(0x10, &[0, 0x20, 0, 0, 0, 0x10, 0, 0]);
    assert_eq!(
        (software.at(0x1000), software.at(0x2000)),
        (Some(1), Some(0))
    );
}

#[test]
fn six_bars_are_decoded_with_memory_space() {
    let list = [0, 1, 2, 3, 4, 5].map(|index| {
        let base = 0x10_0000 * (index as u64 + 1);
        (index, BarKind::Memory32, 0x10 << index, base)
    });
    let software = Software::new(bars(&list));
    assert_eq!(software.placed(), BTreeMap::new());
    for enabled in [true, false, true] {
        software.enable(enabled);
        for (index, _, size, base) in list {
            let inside = enabled.then_some(index);
            assert_eq!(software.at(base), inside);
            assert_eq!(software.at(base + size - 1), inside);
            assert_eq!(
                (software.at(base - 1), software.at(base + size)),
                (None, None)
            );
        }
    }
}

#[test]
fn a_wide_bar_moves_by_either_of_its_registers() {
    let software = Software::new(bars(&[(2, BarKind::Prefetchable64, 0x4000, 0x8000)]));
    software.enable(true);
    software.write(offset(3), &7_u32.to_le_bytes());
    assert_eq!(software.placed(), BTreeMap::from([(2, Gpa(0x7_0000_8000))]));
    software.write(offset(2), &0xc000_u32.to_le_bytes());
    assert_eq!(software.placed(), BTreeMap::from([(2, Gpa(0x7_0000_c000))]));
    assert_eq!(software.at(0x7_0000_ffff), Some(2));
}

/// BARs at their registers, none of which overlaps another's.
fn layouts() -> impl Strategy<Value = Vec<(usize, BarKind, u64)>> {
    let bar = (0..6_usize, 0..KINDS.len(), 4..14_u32);
    prop::collection::vec(bar, 1..8).prop_map(|list| {
        let mut bars = Bars::default();
        let list = list.into_iter().filter_map(|(index, kind, shift)| {
            let bar = (index, KINDS[kind], 1 << shift);
            let added = bars.add(index, bar.1, bar.2, Gpa(0));
            added.is_ok().then_some(bar)
        });
        list.collect()
    })
}

fn with_layout(layout: &[(usize, BarKind, u64)]) -> Software {
    let list: Vec<_> = (layout
        .iter()
        .map(|&(index, kind, size)| (index, kind, size, 0)))
    .collect();
    Software::new(bars(&list))
}

fn is_wide(kind: BarKind) -> bool {
    matches!(kind, BarKind::Memory64 | BarKind::Prefetchable64)
}

proptest! {
    #[test]
    fn a_bar_of_ones_reads_as_its_size_and_kind(layout in layouts(), enabled: bool) {
        let software = with_layout(&layout);
        software.enable(enabled);
        software.write(0x10, &[0xff; 24]);
        let mut expected = [0; 6];
        for (index, kind, size) in layout {
            let mask = !(size - 1);
            expected[index] = u32::try_from(mask & 0xffff_fff0).unwrap() | kind as u32;
            if is_wide(kind) {
                expected[index + 1] = u32::MAX;
            }
        }
        prop_assert_eq!([0, 1, 2, 3, 4, 5].map(|at| software.register(at)), expected);
    }

    /// A BAR is decoded from a change of its address on that leads to free
    /// addresses, until its next change.
    #[test]
    fn bars_move_as_in_a_naive_model(
        layout in layouts(),
        writes in prop::collection::vec((0..7_usize, 0..16_u32, any::<bool>()), 1..40),
    ) {
        let software = with_layout(&layout);
        let mut decoded: BTreeMap<usize, Option<u64>> = BTreeMap::new();
        let mut placed: BTreeMap<usize, (u64, u64)> = BTreeMap::new();
        let mut memory_space = false;
        for (register, value, enable) in writes {
            if register == 6 {
                memory_space = enable;
                software.enable(enable);
            } else {
                // Few addresses, so that BARs overlap.
                software.write(offset(register), &(value << 11).to_le_bytes());
            }
            let now = |&(index, kind, size): &(usize, BarKind, u64)| {
                let high = if is_wide(kind) { software.register(index + 1) } else { 0 };
                let low = software.register(index) & !0xf;
                let to = memory_space.then_some(u64::from(low) | u64::from(high) << 32);
                (index, size, to)
            };
            let mut changed: Vec<_> = layout.iter().map(now).collect();
            changed.retain(|&(index, _, to)| decoded.get(&index).copied().flatten() != to);
            changed.sort_unstable();
            for &(index, _, to) in &changed {
                decoded.insert(index, to);
                placed.remove(&index);
            }
            for &(index, size, to) in &changed {
                let Some(to) = to else { continue };
                if placed.values().all(|&(base, len)| to + size <= base || base + len <= to) {
                    placed.insert(index, (to, size));
                }
            }
            let bases = placed.iter().map(|(&index, &(base, _))| (index, Gpa(base)));
            prop_assert_eq!(software.placed(), bases.collect());
            for (&index, &(base, size)) in &placed {
                prop_assert_eq!(software.at(base), Some(index));
                prop_assert_eq!(software.at(base + size - 1), Some(index));
            }
        }
    }
}
