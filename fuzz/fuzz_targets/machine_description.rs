//! A configuration, as JSON or by fields, becomes a plan, and the plan firmware tables. Each step
//! may refuse it in one line; the tables of an accepted plan fit into their memory.
#![no_main]

use std::ops::RangeInclusive;

use arch::{
    Cache, CacheKind, IommuNode, NodeModel as Model, PciHost, Platform, Range, aarch64, x86_64,
};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use vmm::config::{ConfigError, IommuModel, VmConfig};
use vmm::inspect;
use vmm::plan::{DevicePlan, MachinePlan};

#[derive(Arbitrary, Debug)]
enum Input<'a> {
    Text(&'a str),
    Fields(Fields<'a>),
}

#[derive(Arbitrary, Debug)]
struct Fields<'a> {
    cpus: u8,
    mib: u64,
    boot_args: Option<&'a str>,
    initrd: Option<&'a str>,
    model: u8,
    switches: [bool; 4],
    stage: u8,
    drives: Vec<Device<'a>>,
    interfaces: Vec<Device<'a>>,
    vsock: Option<u32>,
    entropy: bool,
    caches: Vec<(u8, u8, u32, u32, u32, u32)>,
    clidr: u64,
}

#[derive(Arbitrary, Debug)]
struct Device<'a> {
    id: &'a str,
    name: &'a str,
    text: Option<&'a str>,
    root: bool,
    switch: bool,
    queues: u16,
}

impl Fields<'_> {
    fn json(&self) -> Value {
        let [ats, prefill, prefetch, behind] = self.switches;
        let drive = |drive: &Device| {
            json!({
                "drive_id": drive.id, "path_on_host": drive.name, "partuuid": drive.text,
                "is_root_device": drive.root, "is_read_only": drive.switch,
                "num_queues": drive.queues, "iommu": behind,
            })
        };
        let interface = |interface: &Device| {
            json!({
                "iface_id": interface.id, "host_dev_name": interface.name,
                "guest_mac": interface.text, "iommu": interface.switch,
                "num_queues": interface.queues % 32,
            })
        };
        let models = ["none", "virtio-iommu", "smmuv3"];
        let stages = ["1", "2", "nested"];
        let mut machine = json!({
            "boot-source": {
                "kernel_image_path": "k", "initrd_path": self.initrd, "boot_args": self.boot_args,
            },
            "machine-config": { "vcpu_count": self.cpus, "mem_size_mib": self.mib },
            "iommu": {
                "model": models[usize::from(self.model) % 3], "ats": ats,
                "stage": stages[usize::from(self.stage) % 3],
                "prefill": prefill, "prefetch": prefetch,
            },
            "drives": self.drives.iter().map(drive).collect::<Vec<_>>(),
            "network-interfaces": self.interfaces.iter().map(interface).collect::<Vec<_>>(),
        });
        if let Some(cid) = self.vsock {
            machine["vsock"] = json!({ "guest_cid": cid, "iommu": behind });
        }
        if self.entropy {
            machine["entropy"] = json!({ "iommu": behind });
        }
        machine
    }

    fn caches(&self) -> Vec<Cache> {
        let caches = self
            .caches
            .iter()
            .map(|&(level, kind, size, line_size, sets, shared_by)| {
                let kinds = [CacheKind::Data, CacheKind::Instruction, CacheKind::Unified];
                let kind = kinds[usize::from(kind) % 3];
                Cache {
                    level,
                    kind,
                    size,
                    line_size,
                    sets,
                    shared_by,
                }
            });
        // sysfs has one cache of each type per level.
        let mut caches: Vec<Cache> = caches.collect();
        caches.sort_by_key(|cache| (cache.level, cache.kind as u8));
        caches.dedup_by_key(|cache| (cache.level, cache.kind));
        aarch64::cache::merge(self.clidr, &caches)
    }
}

fn one_line(error: &ConfigError) {
    assert!(!error.to_string().contains('\n'), "{error:?}");
}

/// The platform of a plan, for either architecture.
fn platform(plan: &MachinePlan, caches: Vec<Cache>, host: PciHost, ram: Vec<Range>) -> Platform {
    let requester = |slot: u8| u16::from(slot) << 3;
    let iommu = plan
        .functions
        .iter()
        .find(|f| f.device == DevicePlan::VirtioIommu);
    let model = match plan.iommu.model {
        IommuModel::None => None,
        IommuModel::VirtioIommu => iommu.map(|f| Model::VirtioPci {
            bdf: requester(f.slot),
        }),
        IommuModel::Smmuv3 => aarch64::layout::SMMU.map(|smmu| Model::Smmuv3 {
            smmu,
            ats: plan.iommu.ats,
            coherent: true,
        }),
    };
    let behind = plan.functions.iter().filter(|function| function.iommu);
    let endpoints: Vec<RangeInclusive<u16>> = behind
        .map(|function| requester(function.slot)..=requester(function.slot))
        .collect();
    let pci = (!plan.functions.is_empty()).then_some(host);
    Platform {
        cpus: u32::from(plan.vcpus),
        caches,
        ram,
        cmdline: plan.boot.cmdline.clone(),
        seed: [1; 32],
        serial: aarch64::layout::SERIAL,
        rtc: aarch64::layout::RTC,
        iommu: model
            .filter(|_| pci.is_some())
            .map(|model| IommuNode { model, endpoints }),
        pci,
    }
}

fuzz_target!(|input: Input| {
    let (text, caches) = match &input {
        Input::Text(text) => ((*text).to_owned(), Vec::new()),
        Input::Fields(fields) => (fields.json().to_string(), fields.caches()),
    };
    let config = match VmConfig::from_json(&text) {
        Ok(config) => config,
        Err(error) => return one_line(&error),
    };
    let plan = match MachinePlan::resolve(&config) {
        Ok(plan) => plan,
        Err(error) => return one_line(&error),
    };
    let _ = inspect::description(&plan);
    let size = plan.memory.iter().map(|range| range.size).sum();
    if let Ok(ram) = aarch64::layout::ram_ranges(size) {
        use aarch64::layout;
        let host = PciHost {
            ecam: layout::PCI_ECAM,
            last_bus: layout::PCI_LAST_BUS,
            mmio32: layout::PCI_MMIO32,
            mmio64: layout::PCI_MMIO64,
        };
        let platform = platform(&plan, caches.clone(), host, ram);
        let tree = aarch64::fdt::tree(&platform, None).expect("a plan has a device tree");
        assert!(tree.len() as u64 <= layout::FDT.size, "{}", tree.len());
    }
    if let Ok(ram) = x86_64::layout::ram_ranges(size) {
        use x86_64::layout;
        let host = PciHost {
            ecam: layout::PCI_ECAM,
            last_bus: layout::PCI_LAST_BUS,
            mmio32: layout::PCI_MMIO32,
            mmio64: layout::PCI_MMIO64,
        };
        let mut platform = platform(&plan, Vec::new(), host, ram);
        platform.serial = layout::SERIAL;
        platform.rtc = layout::RTC;
        x86_64::acpi::tables(&platform, layout::ACPI).expect("a plan has ACPI tables");
    }
});
