//! The PCI bus of a machine: the root, the IOMMU before its functions, and the
//! functions.

mod iommu;
mod report;
mod smmuv3;
mod vhost;
mod virtio_iommu;

use std::io;
use std::path::Path;
use std::sync::Arc;

use ::iommu::{AddressSpace, Gpa, GuestRam, IommuRegion, StreamId};
use arch::{IommuNode, PciHost, layout};
use devices::interrupt::Doorbells;
use devices::pause::PauseRequest;
use devices::pci::{MsiRetranslator, MsiThread, PciRoot, Requester};
use devices::vhost::VhostContext;
use devices::virtio::block::{Block, BlockConfig, Image};
use devices::virtio::net::NetConfig;
use devices::virtio::pci::{BAR_SIZE, VirtioPci, VirtioPciResources};
use devices::virtio::rng::Rng;
use devices::virtio::{DeviceCounters, VirtioDevice};

pub(crate) use self::iommu::IommuDevice;
use crate::builder::BuildError;
use crate::config::{ConfigError, IommuModel};
use crate::kvm::{Buses, Vm};
use crate::plan::{DevicePlan, FunctionPlan, MachinePlan};

/// A function and how it stands before the IOMMU.
pub struct Function {
    /// Its name.
    pub id: String,
    /// Its requester ID.
    pub stream: StreamId,
    /// What it is.
    pub device: DevicePlan,
    /// Its part of the IOMMU, if it is behind it.
    pub region: Option<Arc<IommuRegion>>,
    /// Counters of the device and its back end.
    pub counters: DeviceCounters,
    /// The function itself.
    pub virtio: Arc<VirtioPci>,
}

/// The bus. Dropping it ends the devices' threads.
pub struct PciBus {
    functions: Vec<Function>,
    iommu: Option<IommuDevice>,
    _msis: Option<MsiThread>,
    /// Stands for the lock of a model that is busy: a test holds it.
    #[cfg(test)]
    pub(crate) busy: crate::kvm::fake::Busy,
}

/// What every function is made with.
struct Makings<'a> {
    vm: &'a Arc<Vm>,
    ram: &'a Arc<GuestRam>,
    retranslator: &'a Arc<MsiRetranslator>,
    iommu: Option<&'a IommuDevice>,
    vhost: Option<VhostContext>,
    pause: &'a Arc<PauseRequest>,
}

impl PciBus {
    /// Puts the plan's functions on a bus; `None` when there are none, and no
    /// IOMMU.
    ///
    /// # Errors
    /// The first device that cannot be had, by its name in the configuration.
    pub fn build(
        plan: &MachinePlan,
        vm: &Arc<Vm>,
        buses: &Buses,
        ram: &Arc<GuestRam>,
    ) -> Result<Option<Self>, BuildError> {
        if plan.functions.is_empty() && plan.iommu.model == IommuModel::None {
            return Ok(None);
        }
        let retranslator = MsiRetranslator::new()?;
        let iommu = IommuDevice::build(plan, vm, buses, ram)?;
        let msis = iommu.is_some().then(|| retranslator.start()).transpose()?;
        let makings = Makings {
            vm,
            ram,
            retranslator: &retranslator,
            iommu: iommu.as_ref(),
            vhost: vhost::context(plan, ram)?,
            pause: &buses.pause,
        };
        let root = Arc::new(PciRoot::new(&buses.mmio));
        let mut functions = Vec::new();
        for function in &plan.functions {
            let made = makings.make(function)?;
            let added = root.add(function.slot, made.virtio.clone());
            added.map_err(|error| BuildError::Host(io::Error::other(error)))?;
            functions.push(made);
        }
        let ecam = layout::PCI_ECAM;
        buses.mmio.insert(ecam.base, ecam.size, root)?;
        Ok(Some(Self {
            functions,
            iommu,
            _msis: msis,
            #[cfg(test)]
            busy: Arc::default(),
        }))
    }

    /// A bus with an IOMMU and no functions.
    #[cfg(test)]
    pub(crate) fn of(iommu: IommuDevice) -> Self {
        Self {
            functions: Vec::new(),
            iommu: Some(iommu),
            _msis: None,
            busy: Arc::default(),
        }
    }

    /// The host bridge as the firmware tables describe it.
    #[must_use]
    pub fn host() -> PciHost {
        PciHost {
            ecam: layout::PCI_ECAM,
            last_bus: layout::PCI_LAST_BUS,
            mmio32: layout::PCI_MMIO32,
            mmio64: layout::PCI_MMIO64,
        }
    }

    /// The IOMMU as the firmware tables describe it.
    #[must_use]
    pub fn iommu_node(&self) -> Option<IommuNode> {
        let requester = |function: &Function| u16::try_from(function.stream.0).ok();
        let is_iommu = |function: &&Function| function.device == DevicePlan::VirtioIommu;
        let function = self.functions.iter().find(is_iommu).and_then(requester);
        let behind = self.functions.iter().filter(|f| f.region.is_some());
        Some(IommuNode {
            model: self.iommu.as_ref()?.node(function)?,
            endpoints: behind.filter_map(requester).map(|id| id..=id).collect(),
        })
    }

    /// The functions, by slot.
    #[must_use]
    pub fn functions(&self) -> &[Function] {
        &self.functions
    }
}

impl Makings<'_> {
    fn make(&self, plan: &FunctionPlan) -> Result<Function, BuildError> {
        let stream = StreamId::from_bdf(0, plan.slot, 0);
        let iommu = self.iommu.filter(|_| plan.iommu);
        let region = iommu.map(|iommu| IommuRegion::new(iommu.model(), stream));
        let ram = Arc::clone(self.ram);
        let space = match &region {
            Some(region) => AddressSpace::translated(Arc::clone(region), ram),
            None => AddressSpace::identity(stream, ram),
        };
        let device = self.device(plan)?;
        let counters = device.counters();
        let bar = layout::PCI_MMIO64.base + u64::from(plan.slot) * BAR_SIZE;
        let parts = VirtioPciResources {
            requester: Requester::new(space, self.retranslator),
            msi: self.vm.msi_allocator(),
            doorbells: Arc::clone(self.vm) as Arc<dyn Doorbells>,
            bar: Gpa(bar),
            ats: iommu.and_then(|iommu| iommu.ats_hook(stream)),
        };
        let virtio = VirtioPci::new(&plan.id, device, parts)?;
        virtio.set_deferral(self.pause.deferral());
        Ok(Function {
            id: plan.id.clone(),
            stream,
            device: plan.device.clone(),
            region,
            counters,
            virtio,
        })
    }

    fn device(&self, plan: &FunctionPlan) -> Result<Box<dyn VirtioDevice>, BuildError> {
        Ok(match &plan.device {
            DevicePlan::VirtioIommu => {
                let device = self.iommu.and_then(IommuDevice::function);
                let device = device.ok_or_else(|| {
                    ConfigError::new("iommu.model", "is not the IOMMU of this machine")
                })?;
                Box::new(device)
            }
            DevicePlan::Block {
                path,
                read_only,
                queues,
                flush,
            } => {
                let image = open_image(&plan.id, path, *read_only)?;
                for doubt in image.doubts() {
                    log::warn!("drives[{}]: {} {doubt}", plan.id, path.display());
                }
                let config = BlockConfig {
                    id: plan.id.clone(),
                    queues: *queues,
                    flush: *flush,
                };
                Box::new(Block::new(&config, image)?)
            }
            DevicePlan::Net {
                tap,
                mac,
                mtu,
                pairs,
            } => {
                let config = NetConfig {
                    id: plan.id.clone(),
                    mac: vhost::octets(&plan.id, mac)?,
                    mtu: *mtu,
                    pairs: *pairs,
                };
                Box::new(vhost::net(&plan.id, tap, config, self.vhost()?)?)
            }
            DevicePlan::Vsock { cid } => Box::new(vhost::vsock(*cid, self.vhost()?)?),
            DevicePlan::Entropy => Box::new(Rng::new()?),
        })
    }
}

impl Makings<'_> {
    fn vhost(&self) -> io::Result<&VhostContext> {
        (self.vhost.as_ref()).ok_or(io::Error::from(io::ErrorKind::NotFound))
    }
}

/// Opens and locks the image of the drive `id`.
///
/// # Errors
/// It cannot be used, by its name in the configuration.
pub(crate) fn open_image(id: &str, path: &Path, read_only: bool) -> Result<Image, ConfigError> {
    Image::open(path, read_only).map_err(|error| {
        let field = format!("drives[{id}].path_on_host");
        ConfigError::of_file(field, path, &error)
    })
}
