//! Compares walks with a list of mappings, and with a second walker that
//! returns single pages and blocks.

use proptest::prelude::*;
use proptest::sample::select;

use super::super::address::{Address, Ipa, Va};
use super::super::cd::TtbRegion;
use super::super::descriptor::{AccessFlag, Format, Granule, Table};
use super::super::spec::{Raw as _, cd, event, ste, ste::RawSte};
use super::super::ste::Stage2;
use super::super::walk::{Leaf, WalkFault, WalkRequest, walk_stage1, walk_stage2};
use super::super::*;
use super::rig::*;
use crate::{Access, Iova, Perm};

const GRANULES: [Granule; 3] = [Granule::K4, Granule::K16, Granule::K64];
/// Output addresses: beyond RAM, which has tables only.
const DATA: u64 = 0x10_0000_0000;

/// A mapping of `size` bytes that starts at `input`.
#[derive(Clone, Copy, Debug)]
struct Mapped {
    input: u64,
    size: u64,
    output: u64,
    perm: Perm,
}

/// An entry of a table: index, output, and whether it is read-only.
type Choice = (u64, Option<u64>, bool);

/// Entries of a level 2 table: blocks, and pages below entry 1.
fn choices() -> impl Strategy<Value = (Vec<Choice>, Vec<Choice>)> {
    let entry = |most: u64| {
        // Most entries continue their neighbours.
        let output = prop_oneof![3 => Just(None), 1 => (0_u64..8).prop_map(Some)];
        (0..most, output, any::<bool>())
    };
    (
        proptest::collection::vec(entry(6), 0..6),
        proptest::collection::vec(entry(24), 0..24),
    )
}

/// Maps the choices at `start`, which is aligned to four level 2 entries.
/// Returns the mappings.
fn build(
    rig: &Rig,
    root: &Root,
    start: u64,
    (blocks, pages): &(Vec<Choice>, Vec<Choice>),
    leaf: impl Fn(bool) -> u64,
) -> Vec<Mapped> {
    let mut list: Vec<Mapped> = Vec::new();
    for (level, choices) in [(2, blocks), (3, pages)] {
        let size = 1_u64 << root.granule.shift(level);
        for (slot, elsewhere, read_only) in choices {
            // Level 2 entry 1 points to the table of pages.
            let slot = if level == 2 && *slot == 1 { 0 } else { *slot };
            let offset = if level == 2 {
                slot * size
            } else {
                (1_u64 << root.granule.shift(2)) + slot * size
            };
            let (input, straight) = (start + offset, DATA + offset);
            let output = elsewhere.map_or(straight, |place| DATA * 2 + place * size);
            rig.map(root, input, output, level, leaf(*read_only));
            list.retain(|known| known.input != input);
            let perm = if *read_only {
                Perm::READ
            } else {
                Perm::READ_WRITE
            };
            list.push(Mapped {
                input,
                size,
                output,
                perm,
            });
        }
    }
    list
}

fn expected(list: &[Mapped], input: u64) -> Option<(u64, Perm)> {
    list.iter()
        .find(|mapped| input.wrapping_sub(mapped.input) < mapped.size)
        .map(|mapped| (mapped.output + (input - mapped.input), mapped.perm))
}

/// Addresses to check: the ends and the middle of each mapping.
fn probes(list: &[Mapped]) -> Vec<u64> {
    list.iter()
        .flat_map(|mapped| {
            let end = mapped.input + mapped.size;
            [mapped.input, mapped.input + mapped.size / 2, end - 1, end]
        })
        .collect()
}

/// Checks the translation at `iova`, and that all of its run is in the list.
fn check(
    rig: &Rig,
    iova: u64,
    step: u64,
    expected: impl Fn(u64) -> Option<(u64, Perm)>,
) -> Result<(), TestCaseError> {
    for access in [Access::Read, Access::Write] {
        let wanted = expected(iova).filter(|(_, perm)| perm.allows(access));
        let answer = rig.access(STREAM, iova, access).ok();
        let gpa = answer.map(|mapping| mapping.gpa_of(Iova(iova)).unwrap().0);
        prop_assert_eq!(
            gpa,
            wanted.map(|(output, _)| output),
            "{:#x} {:?}",
            iova,
            access
        );
        let Some(mapping) = answer else { continue };
        let (first, last) = (mapping.iova.first().0, mapping.iova.last().0);
        for page in (first..=last)
            .step_by(step as usize)
            .take(300)
            .chain([last])
        {
            let whole = mapping.gpa_of(Iova(page)).unwrap().0;
            prop_assert_eq!(expected(page), Some((whole, mapping.perm)), "{:#x}", page);
        }
    }
    Ok(())
}

fn stage1_leaf(read_only: bool) -> u64 {
    if read_only { RO } else { RW }
}

fn stage2_leaf(read_only: bool) -> u64 {
    if read_only { S2_RO } else { S2_RW }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn stage_1_maps_as_its_tables_say(
        granule in select(GRANULES.to_vec()),
        choices in choices(),
        upper in any::<bool>(),
        tag in any::<u8>(),
    ) {
        let rig = Rig::enabled(SmmuConfig::default());
        let root = rig.root(granule, 47);
        let start = 1 << 40;
        let list = build(&rig, &root, start, &choices, stage1_leaf);
        let context = rig.alloc(64);
        let mut words = cd_words(granule, 17, root.base, 1);
        if upper {
            let tg1 = match granule { Granule::K16 => 1, Granule::K4 => 2, Granule::K64 => 3 };
            for (field, value) in [
                (cd::EPD0, 1), (cd::EPD1, 0), (cd::TG1, tg1), (cd::T1SZ, 17),
                (cd::TTB1, root.base >> 4), (cd::TBI1, 1),
            ] {
                field.put(&mut words, value);
            }
        }
        rig.put_words(context, &words);
        rig.set_ste(STREAM, &ste_stage1(context));
        let base = if upper { u64::MAX << 47 & !(0xff << 56) | u64::from(tag) << 56 } else { 0 };
        for probe in probes(&list) {
            check(&rig, base | probe, 1 << granule.bits(), |iova| {
                expected(&list, iova & !base)
            })?;
        }
    }

    #[test]
    fn stage_2_maps_as_its_tables_say(
        granule in select(GRANULES.to_vec()),
        concatenated in any::<bool>(),
        choices in choices(),
    ) {
        let rig = Rig::nested();
        rig.enable();
        // Up to 16 tables at the starting level, or one of a level more.
        let (bits, level) = match (granule, concatenated) {
            (Granule::K4, true) => (43, 1),
            (Granule::K4, false) => (42, 0),
            (Granule::K16, true) => (40, 2),
            (Granule::K16, false) => (44, 1),
            (Granule::K64, true) => (44, 2),
            (Granule::K64, false) => (45, 1),
        };
        let root = rig.root_at(granule, bits, level);
        let start = 1 << 38;
        let list = build(&rig, &root, start, &choices, stage2_leaf);
        let mut words = RawSte::ZERO;
        put_stage2(&mut words, granule, &root, 1);
        rig.set_ste(STREAM, &words);
        for probe in probes(&list) {
            check(&rig, probe, 1 << granule.bits(), |iova| expected(&list, iova))?;
        }
    }

    #[test]
    fn nested_stages_map_one_after_the_other(
        one in select(GRANULES.to_vec()),
        two in select(GRANULES.to_vec()),
        first in choices(),
        second in choices(),
    ) {
        let rig = Rig::nested();
        rig.enable();
        let root = rig.root(one, 47);
        let inputs = build(&rig, &root, 1 << 40, &first, stage1_leaf);
        let context = rig.alloc(64);
        rig.put_words(context, &cd_words(one, 17, root.base, 1));
        let mut words = ste_stage1(context);
        let level = if two == Granule::K4 { 0 } else { 1 };
        let bits = if two == Granule::K4 { 42 } else { 44 };
        let outer = rig.root_at(two, bits, level);
        // Around the output of stage 1.
        let outputs = build(&rig, &outer, DATA, &second, stage2_leaf);
        // The tables of stage 1, one to one.
        for page in (RAM..RAM + RAM_SIZE as u64).step_by(1 << two.bits()) {
            rig.map(&outer, page, page, 3, S2_RW);
        }
        put_stage2(&mut words, two, &outer, 1);
        rig.set_ste(STREAM, &words);
        let step = 1 << one.bits().min(two.bits());
        for probe in probes(&inputs) {
            check(&rig, probe, step, |iova| {
                let (ipa, perm) = expected(&inputs, iova)?;
                let (gpa, outer) = expected(&outputs, ipa)?;
                Some((gpa, perm & outer))
            })?;
        }
    }

    #[test]
    fn any_tables_are_walked_as_a_simple_walker_does(
        granule in select(GRANULES.to_vec()),
        bits in 25_u32..=48,
        ips in select(vec![32_u32, 40, 48]),
        affd in any::<bool>(),
        descriptors in proptest::collection::vec(
            (0_u64..4, 0_u64..16, any::<u64>(), 0_u64..6, any::<bool>()), 1..80,
        ),
        inputs in proptest::collection::vec((any::<u64>(), any::<bool>()), 1..40),
    ) {
        let rig = Rig::new(SmmuConfig::default());
        let size = 1 << granule.bits();
        let tables: Vec<u64> = (0..4).map(|_| rig.alloc(size)).collect();
        for (table, slot, junk, target, sane) in descriptors {
            let target = tables.get(target as usize).copied().unwrap_or(junk & 0xffff_ffff_f000);
            let low = if sane { junk & 0xfff | 0x443 } else { junk & 0xfff };
            let high = if sane { junk & 7 << 59 } else { junk & 0xfff0 << 48 };
            rig.put(tables[table as usize] + 8 * slot, high | target & !(size - 1) | low);
        }
        let stride = granule.bits() - 3;
        let start_level = 4 - (bits - granule.bits()).div_ceil(stride);
        let table = Table {
            granule,
            base: tables[0],
            input_bits: bits,
            start_level,
            output_bits: ips,
            wide: false,
            access_flag: if affd { AccessFlag::Ignore } else { AccessFlag::Fault },
            dirty: false,
            format: Format::Stage1 { unprivileged: true, hierarchical: true },
        };
        for (random, write) in inputs {
            // Indices of 0 to 15 at each level.
            let mut input = random & (size - 1);
            for level in start_level..=3 {
                input |= (random >> (4 * level) & 15) << granule.shift(level);
            }
            input &= (1 << bits) - 1;
            let access = if write { Access::Write } else { Access::Read };
            let want = WalkRequest { access, update: false, run: true, gap: false };
            let answer = walk_of_its_stage(&rig, table, input, want);
            let simple = simple_walk(&rig, &table, input, write);
            prop_assert_eq!(answer.map(|leaf| leaf.output_of(input)).map_err(|stop| stop.cause), simple);
            if let Ok(leaf) = answer {
                for page in [leaf.first, leaf.last] {
                    let alone = simple_walk(&rig, &table, page, write);
                    prop_assert_eq!(alone, Ok(leaf.output_of(page)), "{:#x}", page);
                }
            }
        }
    }
}

fn untyped<I: Address, O: Address>(leaf: &Leaf<I, O>) -> Leaf<u64, u64> {
    Leaf {
        first: leaf.first.bits(),
        last: leaf.last.bits(),
        output: leaf.output.bits(),
        perm: leaf.perm,
        global: leaf.global,
        shift: leaf.shift,
        grouped: leaf.grouped,
        device: leaf.device,
    }
}

/// Walks a table of either stage alone.
fn walk_of_its_stage(
    rig: &Rig,
    table: Table,
    input: u64,
    request: WalkRequest,
) -> Result<Leaf<u64, u64>, WalkFault> {
    if let Format::Stage2 { .. } = table.format {
        let stage2 = Stage2 {
            table,
            stall: false,
            record: false,
            protect_walks: false,
        };
        return walk_stage2(&rig.ram, &stage2, Ipa(input), request).map(|leaf| untyped(&leaf));
    }
    let region = TtbRegion {
        table,
        disabled: false,
        ignore_top: false,
    };
    walk_stage1(&rig.ram, &region, None, Va(input), request).map(|leaf| untyped(&leaf))
}

/// Translates one access, one descriptor at a time, as DDI 0487 §D8 describes.
fn simple_walk(rig: &Rig, table: &Table, input: u64, write: bool) -> Result<u64, walk::Cause> {
    use walk::Cause::{AccessFlag as Accessed, AddressSize, External, Permission, Translation};
    let grain = table.granule.bits();
    let in_ram = |address: u64| (RAM..RAM + RAM_SIZE as u64 - 7).contains(&address);
    let mut base = table.base;
    let (mut may_write, mut may_use) = (true, true);
    for level in table.start_level..4 {
        let low = grain + (3 - level) * (grain - 3);
        let top = if level == table.start_level {
            table.input_bits
        } else {
            low + grain - 3
        };
        let index = (input & ((1 << top) - 1)) >> low;
        if !in_ram(base + index * 8) {
            return Err(External);
        }
        let d = rig.get(base + index * 8);
        let kind = d & 3;
        let leads_on = level < 3 && kind == 3;
        let lowest_block = if grain == 12 { 1 } else { 2 };
        let ends = level == 3 && kind == 3 || level < 3 && level >= lowest_block && kind == 1;
        if !leads_on && !ends {
            return Err(Translation);
        }
        let cut = if ends { low } else { grain };
        let address = (d & 0xffff_ffff_ffff) >> cut << cut;
        if address >= 1 << table.output_bits {
            return Err(AddressSize);
        }
        if leads_on {
            base = address;
            may_use &= d >> 61 & 1 == 0;
            may_write &= d >> 62 & 1 == 0;
            continue;
        }
        if d >> 10 & 1 == 0 && table.access_flag == AccessFlag::Fault {
            return Err(Accessed);
        }
        let usable = may_use && d >> 6 & 1 == 1;
        let writable = may_write && d >> 7 & 1 == 0;
        if !usable || write && !writable {
            return Err(Permission);
        }
        return Ok(address | input & ((1 << low) - 1));
    }
    unreachable!("level 3 ends every walk")
}

#[test]
fn runs_join_neighbours_and_stop_where_they_differ() {
    let rig = Rig::enabled(SmmuConfig::default());
    let root = rig.stage1(STREAM, 1);
    for page in 0..1024_u64 {
        rig.map(&root, page << 12, DATA + (page << 12), 3, RW);
    }
    // A run ends with its table: 512 entries.
    let run = |iova| {
        let mapping = rig.read(STREAM, iova).unwrap();
        (mapping.iova.first().0 >> 12, mapping.iova.last().0 >> 12)
    };
    assert_eq!(run(0x5000), (0, 511));
    assert_eq!(run(0x20_5000), (512, 1023));
    rig.map(&root, 100 << 12, DATA + (100 << 12), 3, RO);
    rig.map(&root, 200 << 12, DATA, 3, RW);
    rig.unmap(&root, 300 << 12, 3);
    // A clear access flag, another software bit, a contiguous hint.
    rig.map(&root, 400 << 12, DATA + (400 << 12), 3, RW & !(1 << 10));
    rig.map(
        &root,
        450 << 12,
        DATA + (450 << 12),
        3,
        RW | 1 << 55 | 1 << 52,
    );
    let all = command(spec::command::op::TLBI_NH_ALL, &[]);
    rig.complete(&[all]);
    assert_eq!(run(50 << 12), (0, 99));
    assert_eq!(run(100 << 12), (100, 100));
    assert_eq!(run(150 << 12), (101, 199));
    assert_eq!(run(250 << 12), (201, 299));
    assert_eq!(run(350 << 12), (301, 399));
    assert_eq!(run(500 << 12), (401, 511));
}

/// A stream whose CD sets `fields`. Returns its table and the CD's address.
fn with_flags(rig: &Rig, fields: &[spec::Field<spec::cd::RawCd>]) -> (Root, u64) {
    let root = rig.stage1(STREAM, 1);
    let context = rig.get(STRTAB + 64 * 8) & !0x3f;
    let mut words = cd_words(Granule::K4, 25, root.base, 1);
    for field in fields {
        field.put(&mut words, 1);
    }
    rig.put_words(context, &words);
    (root, context)
}

const ACCESSED: u64 = 1 << 10;
const READ_ONLY: u64 = 1 << 7;
const DBM: u64 = 1 << 51;

#[test]
fn access_flag_and_dirty_state_are_updated() {
    let rig = Rig::enabled(SmmuConfig::default());
    let (root, _) = with_flags(&rig, &[cd::HA, cd::HD]);
    rig.map(&root, 0x1000, RAM, 3, (RO | DBM) & !ACCESSED);
    rig.map(&root, 0x3000, RAM, 3, RO & !ACCESSED);
    let (place, fixed) = (
        rig.descriptor(&root, 0x1000, 3),
        rig.descriptor(&root, 0x3000, 3),
    );
    // A read sets the access flag, and its result does not permit writes.
    let mapping = rig.read(STREAM, 0x1000).unwrap();
    assert_eq!(mapping.perm, Perm::READ);
    assert_eq!(
        rig.get(place) & (ACCESSED | READ_ONLY),
        ACCESSED | READ_ONLY
    );
    // Writing makes it dirty.
    let mapping = rig.access(STREAM, 0x1000, Access::Write).unwrap();
    assert_eq!(mapping.perm, Perm::READ_WRITE);
    assert_eq!(rig.get(place) & (ACCESSED | READ_ONLY), ACCESSED);
    // Without the modifier it stays read-only, with the access flag clear.
    assert!(rig.access(STREAM, 0x3000, Access::Write).is_err());
    assert_eq!(rig.get(fixed) & ACCESSED, 0);
    assert_eq!(rig.event_numbers(), [0x13]);
}

#[test]
fn without_hd_the_modifier_has_no_effect() {
    let rig = Rig::enabled(SmmuConfig::default());
    let (root, _) = with_flags(&rig, &[cd::HA]);
    rig.map(&root, 0x1000, RAM, 3, RO | DBM);
    assert!(rig.access(STREAM, 0x1000, Access::Write).is_err());
    assert_eq!(rig.event_numbers(), [0x13]);
}

#[test]
fn affd_ignores_a_clear_access_flag() {
    let rig = Rig::enabled(SmmuConfig::default());
    let (root, _) = with_flags(&rig, &[cd::AFFD]);
    rig.map(&root, 0x1000, RAM, 3, RW & !ACCESSED);
    assert_eq!(rig.gpa(STREAM, 0x1000), Some(RAM));
    assert_eq!(rig.get(rig.descriptor(&root, 0x1000, 3)) & ACCESSED, 0);
}

#[test]
fn updating_a_stage_1_descriptor_is_a_write_at_stage_2() {
    for (attributes, fields, works) in [
        (S2_RO, vec![], false),
        (S2_RO | DBM, vec![ste::S2HA, ste::S2HD], true),
        (S2_RW, vec![], true),
    ] {
        let rig = Rig::nested();
        rig.enable();
        let (root, context) = with_flags(&rig, &[cd::HA]);
        rig.map(&root, 0x1000, RAM, 3, RW & !ACCESSED);
        let place = rig.descriptor(&root, 0x1000, 3);
        let outer = rig.root_at(Granule::K4, 40, 1);
        for page in (RAM..context + 0x40_0000).step_by(4096) {
            rig.map(&outer, page, page, 3, S2_RW);
        }
        rig.map(&outer, place & !0xfff, place & !0xfff, 3, attributes);
        let mut words = rig.raw(STRTAB + 64 * 8);
        put_stage2(&mut words, Granule::K4, &outer, 1);
        for field in fields {
            field.put(&mut words, 1);
        }
        rig.set_ste(STREAM, &words);
        assert_eq!(rig.gpa(STREAM, 0x1000).is_some(), works);
        let events = rig.events();
        if works {
            assert!(events.is_empty());
            assert_ne!(rig.get(place) & ACCESSED, 0);
            let outer = rig.get(rig.descriptor(&outer, place, 3));
            assert_ne!(outer & 1 << 7, 0, "stage 2 is dirty");
        } else {
            assert_eq!(events[0].number(), 0x13);
            assert_eq!(events[0].get(event::S2), 1);
            assert_eq!(events[0].get(event::CLASS), 1);
            assert_eq!(events[0].get(event::TTRNW), 0);
            assert_eq!(events[0].get(event::IPA), place >> 12);
        }
    }
}

#[test]
fn fifty_two_bits_come_with_64_kib_pages() {
    let rig = Rig::enabled(SmmuConfig {
        address_size: AddressSize::Bits52,
        ..SmmuConfig::default()
    });
    let root = rig.root(Granule::K64, 52);
    let context = rig.alloc(64);
    let mut words = cd_words(Granule::K64, 12, root.base, 1);
    cd::IPS.put(&mut words, 6);
    rig.put_words(context, &words);
    rig.set_ste(STREAM, &ste_stage1(context));
    let iova = 0xa_0000_0000_0000;
    // Bits 51:48 of an address are bits 15:12 of a descriptor.
    let output = 0x0000_1234_0001_0000_u64;
    rig.map(&root, iova, output | 0xb << 12, 3, RW);
    assert_eq!(
        rig.gpa(STREAM, iova + 0x5678),
        Some(0xb << 48 | output | 0x5678)
    );
    // A block of 4 TiB, which only 52-bit addresses have.
    rig.map(&root, 1 << 42, 0x5 << 12, 1, RW);
    assert_eq!(rig.gpa(STREAM, (1 << 42) + 77), Some((5 << 48) + 77));
    // IPS of 48 bits: the same is out of range.
    cd::IPS.put(&mut words, 5);
    rig.put_words(context, &words);
    rig.cfgi_ste(STREAM);
    rig.complete(&[command(spec::command::op::TLBI_NH_ALL, &[])]);
    assert!(rig.read(STREAM, iova).is_err());
    assert_eq!(rig.event_numbers(), [0x11]);
}
