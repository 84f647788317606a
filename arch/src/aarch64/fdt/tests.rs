//! The tree is read back from its bytes (Devicetree Specification v0.4 §5).

use std::collections::BTreeMap;

use super::*;
use crate::platform::{Cache, CacheKind};

/// Properties by `path/of/node:property`; nodes as `path/` with no value.
struct Tree(BTreeMap<String, Vec<u8>>);

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|&byte| byte == 0).unwrap();
    String::from_utf8(bytes[..end].to_vec()).unwrap()
}

impl Tree {
    fn of(platform: &Platform, initrd: Option<Initrd>) -> Self {
        let blob = tree(platform, initrd).unwrap();
        let offset = |at: usize| usize::try_from(u32_at(&blob, at)).unwrap();
        assert_eq!(u32_at(&blob, 0), 0xD00D_FEED);
        assert_eq!(offset(4), blob.len());
        let (mut at, names) = (offset(8), offset(12));
        let mut found = BTreeMap::new();
        let mut path: Vec<String> = Vec::new();
        loop {
            let token = u32_at(&blob, at);
            at += 4;
            match token {
                1 => {
                    path.push(text(&blob[at..]));
                    at += path.last().unwrap().len() + 1;
                    found.insert(format!("{}/", path[1..].join("/")), Vec::new());
                }
                2 => drop(path.pop().unwrap()),
                3 => {
                    let len = usize::try_from(u32_at(&blob, at)).unwrap();
                    let name = text(&blob[names + offset(at + 4)..]);
                    let value = blob[at + 8..at + 8 + len].to_vec();
                    found.insert(format!("{}:{name}", path[1..].join("/")), value);
                    at += 8 + len;
                }
                9 => break,
                other => panic!("token {other} at {at}"),
            }
            at = at.next_multiple_of(4);
        }
        assert!(path.is_empty());
        Self(found)
    }

    fn get(&self, property: &str) -> &[u8] {
        self.0
            .get(property)
            .unwrap_or_else(|| panic!("no {property}"))
    }

    fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    fn cells(&self, property: &str) -> Vec<u32> {
        let value = self.get(property);
        assert_eq!(value.len() % 4, 0);
        value.chunks_exact(4).map(|cell| u32_at(cell, 0)).collect()
    }

    fn strings(&self, property: &str) -> Vec<String> {
        let value = self.get(property);
        let value = value.strip_suffix(&[0]).unwrap();
        value
            .split(|&b| b == 0)
            .map(|s| String::from_utf8(s.to_vec()).unwrap())
            .collect()
    }
}

fn platform() -> Platform {
    Platform {
        cpus: 2,
        caches: Vec::new(),
        ram: layout::ram_ranges(5 << 30).unwrap(),
        cmdline: "console=ttyS0 quiet".into(),
        seed: [7; 32],
        serial: layout::SERIAL,
        rtc: layout::RTC,
        pci: None,
        iommu: None,
    }
}

fn with_iommu(model: NodeModel, endpoints: Vec<std::ops::RangeInclusive<u16>>) -> Tree {
    let pci = PciHost {
        ecam: layout::PCI_ECAM,
        last_bus: layout::PCI_LAST_BUS,
        mmio32: layout::PCI_MMIO32,
        mmio64: layout::PCI_MMIO64,
    };
    let iommu = Some(IommuNode { model, endpoints });
    Tree::of(
        &Platform {
            pci: Some(pci),
            iommu,
            ..platform()
        },
        None,
    )
}

#[test]
fn the_boot_arguments_are_in_chosen() {
    let tree = Tree::of(
        &platform(),
        Some(Initrd {
            base: 0x4800_0000,
            size: 0x1234,
        }),
    );
    assert_eq!(tree.strings("chosen:bootargs"), ["console=ttyS0 quiet"]);
    assert_eq!(tree.cells("chosen:linux,initrd-start"), [0, 0x4800_0000]);
    assert_eq!(tree.cells("chosen:linux,initrd-end"), [0, 0x4800_1234]);
    assert_eq!(tree.strings("chosen:stdout-path"), ["/serial@9000000"]);
    assert_eq!(tree.get("chosen:rng-seed"), [7; 32]);
    assert_eq!(
        tree.cells("memory@40000000:reg"),
        [0, 0x4000_0000, 1, 0x4000_0000]
    );
    assert!(!Tree::of(&platform(), None).has("chosen:linux,initrd-start"));
}

#[test]
fn processors_carry_the_affinity_kvm_gives_them() {
    let tree = Tree::of(
        &Platform {
            cpus: 18,
            ..platform()
        },
        None,
    );
    assert_eq!(
        tree.0
            .keys()
            .filter(|name| name.ends_with(":enable-method"))
            .count(),
        18
    );
    assert_eq!(tree.cells("cpus/cpu@f:reg"), [0, 15]);
    assert_eq!(tree.cells("cpus/cpu@101:reg"), [0, 0x101]);
    assert_eq!(tree.strings("cpus/cpu@0:enable-method"), ["psci"]);
    assert_eq!(tree.strings("psci:method"), ["hvc"]);
    // Two redistributor frames for each.
    let reg = tree.cells("interrupt-controller@8000000:reg");
    assert_eq!(reg[6..], [0, 18 * 0x2_0000]);
}

#[test]
fn wired_interrupts_are_edge_triggered_spis() {
    let tree = Tree::of(&platform(), None);
    assert_eq!(
        tree.cells("serial@9000000:interrupts"),
        [0, layout::SERIAL.gsi, 1]
    );
    assert_eq!(
        tree.cells("rtc@9010000:interrupts"),
        [0, layout::RTC.gsi, 1]
    );
    let clock = tree.cells("apb-pclk:phandle");
    assert_eq!(tree.cells("rtc@9010000:clocks"), clock);
}

#[test]
fn messages_of_pci_functions_go_to_the_its_by_requester_id() {
    let tree = with_iommu(NodeModel::VirtioPci { bdf: 8 }, vec![]);
    let its = tree.cells("interrupt-controller@8000000/msi-controller@8080000:phandle");
    assert_eq!(
        tree.cells("pcie@3f000000:msi-map"),
        [0, its[0], 0, 0x1_0000]
    );
    assert_eq!(
        tree.cells("pcie@3f000000:reg"),
        [0, 0x3F00_0000, 0, 0x10_0000]
    );
    assert_eq!(tree.cells("pcie@3f000000:bus-range"), [0, 0]);
    let low = [0x0200_0000, 0, 0x1000_0000, 0, 0x1000_0000, 0, 0x2F00_0000];
    let high = [0x4300_0000, 0x40, 0, 0x40, 0, 0x10, 0];
    assert_eq!(tree.cells("pcie@3f000000:ranges"), [low, high].concat());
}

#[test]
fn a_virtio_iommu_is_a_function_that_is_not_behind_itself() {
    let tree = with_iommu(
        NodeModel::VirtioPci { bdf: 0x08 },
        vec![0..=7, 0x10..=0xFFFF],
    );
    let node = "pcie@3f000000/iommu@1,0";
    assert_eq!(
        tree.strings(&format!("{node}:compatible")),
        ["virtio,pci-iommu"]
    );
    assert_eq!(tree.cells(&format!("{node}:reg")), [0x800, 0, 0, 0, 0]);
    let phandle = tree.cells(&format!("{node}:phandle"))[0];
    assert_eq!(
        tree.cells("pcie@3f000000:iommu-map"),
        [0, phandle, 0, 8, 0x10, phandle, 0x10, 0xFFF0]
    );
    assert!(!tree.has("pcie@3f000000:ats-supported"));
}

#[test]
fn an_smmu_has_named_interrupts_and_the_configured_properties() {
    let tree_of = |ats, coherent| {
        let smmu = layout::SMMU.unwrap();
        with_iommu(
            NodeModel::Smmuv3 {
                smmu,
                ats,
                coherent,
            },
            vec![0..=0xFFFF],
        )
    };
    let tree = tree_of(true, true);
    let gsis = layout::SMMU.unwrap().gsis;
    let names = tree.strings("iommu@9050000:interrupt-names");
    assert_eq!(names, ["eventq", "gerror", "priq", "cmdq-sync"]);
    let expected = [gsis.eventq, gsis.gerror, gsis.priq, gsis.cmdq_sync];
    assert_eq!(
        tree.cells("iommu@9050000:interrupts"),
        expected.map(|gsi| [0, gsi, 1]).concat()
    );
    let phandle = tree.cells("iommu@9050000:phandle")[0];
    assert_eq!(
        tree.cells("pcie@3f000000:iommu-map"),
        [0, phandle, 0, 0x1_0000]
    );
    assert!(tree.has("pcie@3f000000:ats-supported") && tree.has("iommu@9050000:dma-coherent"));
    let plain = tree_of(false, false);
    assert!(!plain.has("pcie@3f000000:ats-supported") && !plain.has("iommu@9050000:dma-coherent"));
}

#[test]
fn a_nul_in_the_command_line_is_an_error() {
    assert!(
        tree(
            &Platform {
                cmdline: "a\0b".into(),
                ..platform()
            },
            None
        )
        .is_err()
    );
}

#[test]
fn caches_are_on_the_cpu_and_in_nodes_that_the_sharing_cpus_refer_to() {
    let cache = |level, kind, size, shared_by| Cache {
        level,
        kind,
        size,
        line_size: 64,
        sets: if level == 3 { 0 } else { 256 },
        shared_by,
    };
    let caches = vec![
        cache(1, CacheKind::Data, 0x8000, 1),
        cache(1, CacheKind::Instruction, 0, 1),
        cache(2, CacheKind::Unified, 0x8_0000, 2),
        cache(3, CacheKind::Unified, 0x100_0000, 8),
    ];
    let machine = Platform {
        cpus: 3,
        caches,
        ..platform()
    };
    let tree = Tree::of(&machine, None);
    for cpu in ["cpus/cpu@0", "cpus/cpu@1", "cpus/cpu@2"] {
        let value = |name: &str| tree.cells(&format!("{cpu}:{name}"));
        assert_eq!(value("d-cache-size"), [0x8000]);
        assert_eq!(value("d-cache-line-size"), [64]);
        assert_eq!(value("d-cache-sets"), [256]);
        assert_eq!(value("i-cache-size"), [0]);
    }
    let next = |node: &str| tree.cells(&format!("{node}:next-level-cache"))[0];
    let own = |node: &str| tree.cells(&format!("{node}:phandle"))[0];
    let (first, second) = ("cpus/cpu@0/l2-cache", "cpus/cpu@2/l2-cache");
    assert_eq!([next("cpus/cpu@0"), next("cpus/cpu@1")], [own(first); 2]);
    assert_eq!(next("cpus/cpu@2"), own(second));
    assert_ne!(own(first), own(second));
    let last = "cpus/cpu@0/l3-cache";
    assert_eq!([next(first), next(second)], [own(last); 2]);
    for (node, level, size) in [(first, 2, 0x8_0000), (last, 3, 0x100_0000)] {
        assert_eq!(tree.strings(&format!("{node}:compatible")), ["cache"]);
        assert_eq!(tree.cells(&format!("{node}:cache-level")), [level]);
        assert_eq!(tree.cells(&format!("{node}:cache-size")), [size]);
        assert!(tree.has(&format!("{node}:cache-unified")));
    }
    assert!(!tree.has(&format!("{last}:next-level-cache")));
    assert!(!tree.has(&format!("{last}:cache-sets")));
    for absent in ["cpus/cpu@1/l2-cache/", "cpus/cpu@2/l3-cache/"] {
        assert!(!tree.has(absent), "{absent}");
    }
}
