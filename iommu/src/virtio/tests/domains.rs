//! Compares the model with the naive one: every status, every translation, and
//! the shadows of notifiers.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};

use proptest::sample::select;
use proptest::test_runner::TestRunner;

use super::naive::{self, Mapped, Naive, Seen, ShadowMappings};
use super::*;

#[derive(Clone, Debug)]
enum Step {
    /// Bytes of a request, and the length of its device-writable part.
    Request(Vec<u8>, usize),
    /// Completes the requests: removed mappings are no longer used.
    Flush,
    Bypass(u8),
    Reset(Features),
}

fn id() -> impl Strategy<Value = u32> {
    prop_oneof![16 => 1_u32..3, 2 => Just(3), 1 => any::<u32>()]
}

fn endpoint() -> impl Strategy<Value = StreamId> {
    prop_oneof![6 => Just(NIC), 4 => Just(DISK), 1 => Just(StreamId(0x99))]
}

/// First and last address: a few pages in three places, some of them invalid.
fn span() -> impl Strategy<Value = (u64, u64)> {
    let bases = prop_oneof![
        12 => Just(0x1_0000_u64),
        1 => Just(0xfedf_e000),
        1 => Just((1 << 48) - 0x4000),
    ];
    let wrong = prop_oneof![24 => Just(0_u64), 1 => select(vec![1, 0x800, 0x1000, 0x8000])];
    (bases, 0_u64..6, 0_u64..3, wrong).prop_map(|(base, page, more, wrong)| {
        let first = base + (page << 12);
        (first, first + (more << 12) + 0xfff - wrong)
    })
}

fn gpa() -> impl Strategy<Value = u64> {
    prop_oneof![
        12 => (0_u64..64).prop_map(|page| page << 12),
        1 => select(vec![1, u64::MAX - 0xfff]),
    ]
}

fn request() -> impl Strategy<Value = Vec<u8>> {
    let flags = prop_oneof![8 => Just(0), 2 => Just(1), 1 => Just(2)];
    let perms = prop_oneof![8 => 1_u32..4, 1 => select(vec![0, 7, 8])];
    prop_oneof![
        3 => (id(), endpoint(), flags).prop_map(|(id, who, flags)| attach(id, who, flags)),
        1 => (id(), endpoint()).prop_map(|(id, who)| detach(id, who)),
        8 => (id(), span(), gpa(), perms)
            .prop_map(|(id, (first, last), gpa, perm)| map(id, first, last, gpa, perm)),
        4 => (id(), span()).prop_map(|(id, (first, last))| unmap(id, first, last)),
        1 => endpoint().prop_map(probe),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let broken = (request(), any::<prop::sample::Index>(), any::<u8>());
    let broken = broken.prop_map(|(mut bytes, at, value)| {
        let at = at.index(bytes.len());
        bytes[at] = value;
        bytes
    });
    let short = (request(), any::<prop::sample::Index>());
    let short = short.prop_map(|(bytes, len)| bytes[..len.index(bytes.len())].to_vec());
    let features = vec![
        Features::empty(),
        Features::MAP_UNMAP,
        Features::MAP_UNMAP | Features::MMIO,
        Features::PROBE | Features::BYPASS_CONFIG,
        ALL,
    ];
    let room = prop_oneof![
        8 => Just(naive::PROBE_REPLY),
        1 => 0..naive::PROBE_REPLY + 1,
    ];
    prop_oneof![
        60 => (request(), room).prop_map(|(bytes, room)| Step::Request(bytes, room)),
        4 => broken.prop_map(|bytes| Step::Request(bytes, naive::PROBE_REPLY)),
        2 => short.prop_map(|bytes| Step::Request(bytes, naive::PROBE_REPLY)),
        12 => Just(Step::Flush),
        1 => (0_u8..3).prop_map(Step::Bypass),
        1 => select(features).prop_map(Step::Reset),
    ]
}

/// A notifier that keeps a shadow of the mappings.
#[derive(Default)]
struct Shadow(Mutex<ShadowMappings>);

fn mapped(mapping: &Mapping) -> Mapped {
    let may = |access, bit| if mapping.perm.allows(access) { bit } else { 0 };
    Mapped {
        first: mapping.iova.first().0,
        last: mapping.iova.last().0,
        to: mapping.gpa.0,
        perm: may(Access::Read, naive::READ) | may(Access::Write, naive::WRITE),
    }
}

impl NotifierSink for Shadow {
    fn map(&self, mapping: &Mapping) {
        self.0.lock().unwrap().map(mapped(mapping));
    }

    fn unmap(&self, ranges: &[IovaRange]) {
        let mut held = self.0.lock().unwrap();
        for range in ranges {
            held.unmap(range.first().0, range.last().0);
        }
    }

    fn registered(&self, _: &Registration) {}
}

fn shadow(region: &IommuRegion) -> Arc<Shadow> {
    let shadow = Arc::new(Shadow::default());
    region.register(IommuNotifier {
        acceptable: vec![NotifierEvents::MAP | NotifierEvents::UNMAP],
        range: IovaRange::ALL,
        sink: Arc::clone(&shadow) as Arc<dyn NotifierSink>,
    });
    shadow
}

fn naive() -> Naive {
    Naive {
        input: (0, (1 << 48) - 1),
        msi: (0xfee0_0000, 0xfeef_ffff),
        ram: 0xf_ffff,
        features: ALL.bits(),
        bypass: true,
        endpoints: [(NIC.0, None), (DISK.0, None)].into(),
        domains: BTreeMap::new(),
    }
}

fn seen(region: &IommuRegion, iova: u64, access: Access) -> Seen {
    match region.enter().lookup(Iova(iova), access) {
        Ok(mapping) => Seen::Mapping(mapped(&mapping)),
        Err(fault) => match fault.reason {
            FaultReason::Permission => Seen::Forbidden,
            FaultReason::Translation => Seen::Unmapped,
            _ => Seen::Blocked,
        },
    }
}

/// Checks every translation and shadow between requests.
fn agrees(setup: &Setup, naive: &Naive) {
    for region in [&setup.nic, &setup.disk] {
        let stream = region.stream();
        for at in naive.edges() {
            for (access, perm) in [(Access::Read, naive::READ), (Access::Write, naive::WRITE)] {
                let expected = naive.access(stream.0, at, perm);
                assert_eq!(seen(region, at, access), expected, "{at:#x}");
            }
        }
        let state = setup.iommu.endpoint(stream).unwrap();
        let mapped = naive
            .domain(stream.0)
            .map_or(0, |domain| domain.mapped.len());
        assert_eq!(state.domain, naive.endpoints[&stream.0]);
        assert_eq!(state.bypass, naive.in_bypass(stream.0));
        assert_eq!(state.mappings, mapped);
    }
    let all = naive.domains.values().map(|domain| domain.mapped.len());
    assert_eq!(setup.iommu.mapped(), all.sum::<usize>());
}

#[test]
fn domains_agree_with_the_naive_model() {
    let statuses = RefCell::new(BTreeSet::new());
    let steps = prop::collection::vec(step(), 1..120);
    let outcome = TestRunner::default().run(&steps, |steps| {
        let setup = setup();
        let mut naive = naive();
        let regions = [&setup.nic, &setup.disk];
        let shadows = regions.map(|region| shadow(region));
        for step in steps.into_iter().chain([Step::Flush]) {
            match step {
                Step::Request(bytes, room) => {
                    let mut reply = [0xff; naive::PROBE_REPLY];
                    let size = setup.iommu.handle(&bytes, &mut reply[..room]);
                    assert_eq!(size, naive.written(&bytes, room), "{bytes:?}");
                    assert!(reply[size..].iter().all(|byte| *byte == 0xff));
                    let Some(tail) = size.checked_sub(4) else {
                        continue;
                    };
                    let status = reply[tail];
                    let verdict = naive.verdict(&bytes, room);
                    assert!(verdict.contains(&status), "{status}, not {verdict:?}");
                    if status == naive::OK {
                        naive.carry_out(&bytes);
                    }
                    statuses.borrow_mut().insert(status);
                }
                Step::Flush => {
                    setup.iommu.flush();
                    for (region, shadow) in regions.into_iter().zip(&shadows) {
                        let held = shadow.0.lock().unwrap().in_order();
                        assert_eq!(held, naive.shadow(region.stream().0));
                    }
                }
                Step::Bypass(value) => {
                    setup.iommu.set_bypass(value);
                    naive.set_bypass(value);
                }
                Step::Reset(features) => {
                    setup.iommu.reset();
                    setup.iommu.negotiated(features);
                    naive.reset(features.bits());
                }
            }
            agrees(&setup, &naive);
        }
        for region in regions {
            let late = shadow(region).0.lock().unwrap().in_order();
            assert_eq!(late, naive.shadow(region.stream().0), "replayed");
        }
        Ok(())
    });
    outcome.unwrap();
    use naive::{INVAL, NOENT, OK, RANGE};
    assert_eq!(
        statuses.into_inner(),
        [OK, INVAL, RANGE, NOENT].into(),
        "the steps come to every status but that of a full domain"
    );
}
