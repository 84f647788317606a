use iommu::Iova;
use proptest::prelude::*;

use super::*;

fn page() -> IovaRange {
    IovaRange::new(Iova(0x1000), Iova(0x1fff)).unwrap()
}

/// The pairs that a mapping made by `vcpu` goes to.
fn selected(pairs: &Arc<QueuePairs>, vcpu: u32, count: u32, range: IovaRange) -> Vec<u32> {
    let pairs = Arc::clone(pairs);
    let select = move || {
        thread::set_vcpu(vcpu);
        (0..count)
            .filter(|pair| pairs.select(*pair, range))
            .collect()
    };
    std::thread::spawn(select).join().unwrap()
}

fn pairs(vcpus: u32, active: u32) -> Arc<QueuePairs> {
    let pairs = QueuePairs::new(vcpus);
    pairs.set_active(active);
    pairs
}

#[test]
fn a_mapping_is_for_the_pair_of_its_vcpu() {
    let all = pairs(8, 8);
    for vcpu in 0..8 {
        assert_eq!(selected(&all, vcpu, 8, page()), [vcpu]);
    }
    // Two groups of three vCPUs and one of two.
    let shared = pairs(8, 3);
    let of: Vec<_> = (0..8)
        .flat_map(|vcpu| selected(&shared, vcpu, 3, page()))
        .collect();
    assert_eq!(of, [0, 0, 0, 1, 1, 1, 2, 2]);
}

#[test]
fn a_mapping_without_a_known_user_is_for_all_pairs() {
    assert_eq!(
        selected(&pairs(2, 4), 1, 4, page()),
        [0, 1, 2, 3],
        "fewer vCPUs"
    );
    assert_eq!(
        selected(&pairs(4, 1), 3, 4, page()),
        [0, 1, 2, 3],
        "one pair"
    );
    let large = IovaRange::new(Iova(0), Iova(LARGE - 1)).unwrap();
    assert_eq!(
        selected(&pairs(2, 2), 1, 2, large),
        [0, 1],
        "a large mapping"
    );
    let not_a_vcpu = pairs(2, 2);
    assert!(
        (0..2).all(|pair| not_a_vcpu.select(pair, page())),
        "a replay"
    );
}

#[test]
fn pairs_that_miss_often_receive_all_mappings_for_a_while() {
    let all = pairs(2, 2);
    for _ in 1..MAX_MISSES {
        all.count_miss();
    }
    for _ in 0..WINDOW {
        assert_eq!(selected(&all, 1, 2, page()), [1], "few misses");
    }
    for _ in 0..MAX_MISSES {
        all.count_miss();
    }
    for _ in 1..WINDOW {
        assert_eq!(selected(&all, 1, 2, page()), [1], "the window is not over");
    }
    assert_eq!(
        selected(&all, 1, 2, page()),
        [1],
        "the last one of the window"
    );
    let all_pairs = || selected(&all, 1, 2, page()).len();
    assert_eq!((0..ALL).find(|_| all_pairs() != 2), None);
    assert_eq!(selected(&all, 1, 2, page()), [1], "tried again");
}

#[test]
fn misses_without_selections_are_not_judged() {
    let many = |pairs: &Arc<QueuePairs>| (0..=MAX_MISSES).for_each(|_| pairs.count_miss());
    let all = QueuePairs::new(2);
    many(&all);
    all.set_active(2);
    for _ in 0..=WINDOW {
        assert_eq!(selected(&all, 1, 2, page()), [1], "misses of one pair");
    }
    all.all.store(1, Ordering::Relaxed);
    many(&all);
    assert_eq!(selected(&all, 1, 2, page()), [0, 1]);
    for _ in 0..=WINDOW {
        assert_eq!(selected(&all, 1, 2, page()), [1], "earlier misses");
    }
}

proptest! {
    #[test]
    fn each_pair_has_a_contiguous_group_of_vcpus(vcpus in 1_u32..=64, active in 1_u32..=64) {
        prop_assume!(active <= vcpus);
        let of: Vec<_> = (0..vcpus).map(|vcpu| pair_of(vcpu, vcpus, active)).collect();
        prop_assert!(of.is_sorted());
        let sizes: Vec<_> = of.chunk_by(u32::eq).map(<[u32]>::len).collect();
        prop_assert_eq!(sizes.len(), active as usize);
        let least = (vcpus / active) as usize;
        prop_assert!(sizes.iter().all(|size| (least..=least + 1).contains(size)));
        prop_assert!(sizes.is_sorted_by(|a, b| a >= b));
    }
}
