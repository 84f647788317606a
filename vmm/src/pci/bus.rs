//! The PCI bus: functions on a root, with or without the IOMMU in front of
//! them.

use std::sync::Arc;
use std::{io, iter};

use ::iommu::{AddressSpace, Gpa, GuestRam, IommuRegion, StreamId};
use arch::{IommuNode, PciHost, layout};
use devices::interrupt::Doorbells;
use devices::pause::PauseRequest;
use devices::pci::{MsiRetranslator, PciRoot, Requester};
use devices::poll::PollThread;
use devices::virtio::VirtioDevice;
use devices::virtio::pci::{BAR_SIZE, VirtioPci, VirtioPciResources};

use super::function::Function;
use super::iommu::IommuDevice;
use crate::build_error::BuildError;
use crate::config::{ConfigError, IommuModel};
use crate::kvm::{Buses, ConfigPages, Vm};
use crate::plan::{DevicePlan, FunctionPlan, MachinePlan};
use crate::resources::AcquiredFunction;

/// The PCI bus. Dropping it ends the devices' threads.
pub(crate) struct PciBus {
    pub(super) functions: Vec<Function>,
    pub(super) iommu: Option<IommuDevice>,
    _msis: Option<PollThread>,
    /// A lock in place of a busy model's: a test holds it.
    #[cfg(test)]
    pub(crate) busy: crate::kvm::fake::Busy,
}

/// Inputs that all functions are built from.
struct FunctionBuilder<'a> {
    vm: &'a Arc<Vm>,
    ram: &'a Arc<GuestRam>,
    retranslator: &'a Arc<MsiRetranslator>,
    iommu: Option<&'a IommuDevice>,
    pause: &'a Arc<PauseRequest>,
}

impl PciBus {
    /// Places the functions of the plan on a bus, each with its device of
    /// `acquired`. `None` when there are no functions and no IOMMU.
    ///
    /// # Errors
    /// A function or the IOMMU cannot be placed, or the host refuses an
    /// interrupt or a thread.
    pub(crate) fn assemble(
        plan: &MachinePlan,
        acquired: Vec<AcquiredFunction>,
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
        let builder = FunctionBuilder {
            vm,
            ram,
            retranslator: &retranslator,
            iommu: iommu.as_ref(),
            pause: &buses.pause,
        };
        let root = Arc::new(PciRoot::new(&buses.mmio));
        let mut functions = Vec::new();
        for (function, acquired) in plan.functions.iter().zip(acquired) {
            let (built, virtio) = builder.build(function, acquired)?;
            let added = root.add(function.slot, virtio);
            added.map_err(|error| BuildError::Host(io::Error::other(error)))?;
            functions.push(built);
        }
        let slots = plan.functions.iter().map(|function| function.slot);
        if let Some(pages) = ConfigPages::new(vm, iter::once(0).chain(slots))? {
            root.publish(pages);
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

    /// Creates a bus with an IOMMU and no functions.
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
    pub(crate) fn host() -> PciHost {
        PciHost {
            ecam: layout::PCI_ECAM,
            last_bus: layout::PCI_LAST_BUS,
            mmio32: layout::PCI_MMIO32,
            mmio64: layout::PCI_MMIO64,
        }
    }

    /// The IOMMU as the firmware tables describe it.
    #[must_use]
    pub(crate) fn iommu_node(&self) -> Option<IommuNode> {
        let requester = |function: &Function| u16::try_from(function.stream.0).ok();
        let is_iommu = |function: &&Function| function.device == DevicePlan::VirtioIommu;
        let function = self.functions.iter().find(is_iommu).and_then(requester);
        let behind = self.functions.iter().filter(|f| f.region.is_some());
        Some(IommuNode {
            model: self.iommu.as_ref()?.node(function)?,
            endpoints: behind.filter_map(requester).map(|id| id..=id).collect(),
        })
    }
}

impl FunctionBuilder<'_> {
    fn build(
        &self,
        plan: &FunctionPlan,
        acquired: AcquiredFunction,
    ) -> Result<(Function, Arc<VirtioPci>), BuildError> {
        let stream = StreamId::from_bdf(0, plan.slot, 0);
        let iommu = self.iommu.filter(|_| plan.iommu);
        let region = iommu.map(|iommu| IommuRegion::new(iommu.model(), stream));
        let ram = Arc::clone(self.ram);
        let space = match &region {
            Some(region) => AddressSpace::translated(Arc::clone(region), ram),
            None => AddressSpace::identity(stream, ram),
        };
        let device = acquired.device.map_or_else(|| self.iommu_function(), Ok)?;
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
        let function = Function {
            id: plan.id.clone(),
            stream,
            device: plan.device.clone(),
            region,
            counters,
        };
        Ok((function, virtio))
    }

    fn iommu_function(&self) -> Result<Box<dyn VirtioDevice>, ConfigError> {
        match self.iommu.and_then(IommuDevice::function) {
            Some(device) => Ok(Box::new(device)),
            None => {
                let problem = "is not the IOMMU of this machine";
                Err(ConfigError::new("iommu.model", problem))
            }
        }
    }
}
