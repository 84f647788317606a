use proptest::prelude::*;

use super::*;

fn range(first: u64, last: u64) -> IovaRange {
    IovaRange::new(Iova(first), Iova(last)).unwrap()
}

fn entry(first: u64, last: u64, hva: u64) -> Entry {
    Entry {
        iova: range(first, last),
        hva: Hva(hva),
        perm: Perm::READ_WRITE,
    }
}

/// A naive model of `drivers/vhost/iotlb.c`.
#[derive(Default)]
struct Kernel {
    limit: usize,
    list: Vec<Entry>,
}

impl Kernel {
    fn update(&mut self, entry: Entry) {
        if self.limit != 0 && self.list.len() == self.limit {
            self.list.remove(0);
        }
        self.list.push(entry);
    }

    fn invalidate(&mut self, range: IovaRange) {
        self.list.retain(|entry| !entry.iova.overlaps(range));
    }
}

#[test]
fn oldest_entry_is_dropped_whether_used_or_not() {
    let mut shadow = Shadow::new(2);
    shadow.add(entry(0, 9, 0x1000));
    shadow.add(entry(10, 19, 0x2000));
    assert_eq!(shadow.next_victim(), Some(entry(0, 9, 0x1000)));
    shadow.add(entry(20, 29, 0x3000));
    assert_eq!(shadow.holder(Iova(5)), None);
    assert_eq!(shadow.len(), 2);
}

#[test]
fn copy_of_the_oldest_entry_keeps_it() {
    let mut shadow = Shadow::new(2);
    shadow.add(entry(0, 9, 0x1000));
    shadow.add(entry(10, 19, 0x2000));
    shadow.add(entry(0, 9, 0x1000));
    assert_eq!(
        shadow.in_order(),
        [entry(10, 19, 0x2000), entry(0, 9, 0x1000)]
    );
}

#[test]
fn invalidation_of_a_byte_removes_the_whole_entry() {
    let mut shadow = Shadow::new(0);
    shadow.add(entry(0x1000, 0x8fff, 0x10_0000));
    let gone = shadow.remove(range(0x3000, 0x3000));
    assert_eq!(gone, [entry(0x1000, 0x8fff, 0x10_0000)]);
    assert!(shadow.is_empty());
    assert_eq!(
        gone[0]
            .without(&[range(0x3000, 0x3fff)])
            .collect::<Vec<_>>(),
        [
            entry(0x1000, 0x2fff, 0x10_0000),
            entry(0x4000, 0x8fff, 0x10_3000),
        ]
    );
}

#[test]
fn ranges_without_entries_between_them_take_one_message() {
    let mut shadow = Shadow::new(0);
    shadow.add(entry(0x1000, 0x1fff, 0x1000));
    shadow.add(entry(0x5000, 0x5fff, 0x1000));
    shadow.add(entry(0x8000, 0x8fff, 0x1000));
    shadow.add(entry(0xa000, 0xafff, 0x1000));
    let page = |at| range(at, at + 0xfff);
    let asked = [page(0xa000), page(0x1000), page(0x2000), page(0x5000)];
    assert_eq!(
        shadow.invalidations(&asked),
        [range(0x1000, 0x5fff), page(0xa000)]
    );
    assert_eq!(shadow.invalidations(&[page(0x3000)]), []);
}

#[test]
fn all_of_the_address_space_takes_two_messages_or_fewer() {
    let mut shadow = Shadow::new(0);
    assert_eq!(shadow.invalidations(&[IovaRange::ALL]), []);
    shadow.add(entry(u64::MAX - 0xfff, u64::MAX, 0x1000));
    let upper = range(1 << 63, u64::MAX);
    assert_eq!(shadow.invalidations(&[IovaRange::ALL]), [upper]);
    shadow.add(entry(0, 0xfff, 0x2000));
    let lower = range(0, (1 << 63) - 1);
    assert_eq!(shadow.invalidations(&[IovaRange::ALL]), [lower, upper]);
}

#[derive(Clone, Debug)]
enum Step {
    Update(u64, u64, u64),
    Again(usize),
    Unmap(Vec<(u64, u64)>),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let bounds = || (0_u64..64, 0_u64..16);
    let step = prop_oneof![
        4 => (0_u64..64, 0_u64..8, 0_u64..4).prop_map(|(a, b, c)| Step::Update(a, b, c)),
        1 => any::<prop::sample::Index>().prop_map(|i| Step::Again(i.index(64))),
        2 => prop::collection::vec(bounds(), 1..4).prop_map(Step::Unmap),
    ];
    prop::collection::vec(step, 0..60)
}

proptest! {
    /// Applies every message to both, which then have the same entries in the
    /// same order.
    #[test]
    fn shadow_equals_the_list_of_the_kernel(limit in 0_usize..12, steps in steps()) {
        let mut kernel = Kernel { limit, ..Kernel::default() };
        let mut shadow = Shadow::new(limit);
        for step in steps {
            match step {
                Step::Update(first, extent, hva) => {
                    let new = entry(first, first + extent, hva << 12);
                    if shadow.overlapping(new.iova).any(|held| held != new) {
                        kernel.invalidate(new.iova);
                        shadow.remove(new.iova);
                    }
                    kernel.update(new);
                    shadow.add(new);
                }
                Step::Again(index) => {
                    if let Some(&copy) = kernel.list.get(index) {
                        kernel.update(copy);
                        shadow.add(copy);
                    }
                }
                Step::Unmap(ranges) => {
                    let ranges: Vec<_> =
                        ranges.iter().map(|&(a, b)| range(a, a + b)).collect();
                    let others = |kernel: &Kernel| -> Vec<Entry> {
                        let stay = |entry: &&Entry| {
                            !ranges.iter().any(|gone| gone.overlaps(entry.iova))
                        };
                        kernel.list.iter().filter(stay).copied().collect()
                    };
                    let kept = others(&kernel);
                    for message in shadow.invalidations(&ranges) {
                        kernel.invalidate(message);
                        shadow.remove(message);
                    }
                    prop_assert!(ranges.iter().all(|range| !shadow.overlaps(*range)));
                    prop_assert_eq!(&kernel.list, &kept, "more or less than asked went");
                }
            }
            prop_assert_eq!(shadow.in_order(), kernel.list.clone());
            prop_assert_eq!(shadow.len(), kernel.list.len());
            for iova in 0..80 {
                let held = kernel.list.iter().find(|entry| entry.iova.contains(Iova(iova)));
                prop_assert_eq!(shadow.holder(Iova(iova)), held.copied());
            }
        }
    }

    #[test]
    fn remainder_of_an_entry_excludes_the_removed_ranges(
        first in 0_u64..32, extent in 0_u64..32,
        gone in prop::collection::vec((0_u64..64, 0_u64..16), 0..4),
    ) {
        let whole = entry(first, first + extent, 0x5000);
        let gone: Vec<_> = gone.iter().map(|&(a, b)| range(a, a + b)).collect();
        let gone_in_order = merged(&gone);
        let left: Vec<_> = whole.without(&gone_in_order).collect();
        for iova in (0..80).map(Iova) {
            let expected = whole.iova.contains(iova) && !gone.iter().any(|r| r.contains(iova));
            let parts: Vec<_> = left.iter().filter(|part| part.iova.contains(iova)).collect();
            prop_assert_eq!(parts.len(), usize::from(expected));
            prop_assert!(parts.iter().all(|part| part.agrees_with(&whole)));
        }
    }
}
