//! The IOMMU in front of the bus: its model, and its connection to the guest.

use std::sync::{Arc, Weak};

use arch::{NodeModel, layout};
use devices::smmuv3::{SmmuLines, SmmuRegisters};
use devices::virtio::iommu::{EventQueue, VirtioIommuDevice};
use devices::virtio::pci::AtsHook;
use iommu::smmuv3::{Smmu, SmmuConfig};
use iommu::virtio::{FaultSink, VirtioIommu, VirtioIommuConfig};
use iommu::{GuestRam, Iommu, Iova, IovaRange, StreamId};

use crate::build_error::BuildError;
use crate::config::{self, ConfigError, IommuModel};
use crate::kvm::{Buses, Vm};
use crate::plan::MachinePlan;

/// Input address bits of a virtio-iommu's endpoints: 48, as many as the page
/// tables of the guest's CPUs usually translate.
const INPUT_BITS: u32 = 48;

/// The IOMMU of a machine.
pub(crate) enum IommuDevice {
    /// A virtio-iommu: its model, and its event queue.
    Virtio {
        /// Domains and mappings.
        model: Arc<VirtioIommu>,
        /// Fault reports.
        events: Arc<EventQueue>,
    },
    Smmuv3(Arc<Smmu>),
}

impl IommuDevice {
    /// Creates the IOMMU of the plan. An SMMUv3 is placed on the memory bus; a
    /// virtio-iommu is a PCI function.
    ///
    /// # Errors
    /// This architecture has no SMMUv3, or its interrupts are not available.
    pub(super) fn build(
        plan: &MachinePlan,
        vm: &Vm,
        buses: &Buses,
        ram: &Arc<GuestRam>,
    ) -> Result<Option<Self>, BuildError> {
        Ok(match plan.iommu.model {
            IommuModel::None => None,
            IommuModel::VirtioIommu => Some(Self::virtio(plan.max_mappings(), ram)),
            IommuModel::Smmuv3 => Some(Self::smmuv3(&plan.iommu, vm, buses, ram)?),
        })
    }

    fn virtio(max_mappings: usize, ram: &Arc<GuestRam>) -> Self {
        // On x86 interrupts are not translated, and their addresses are a part
        // of the local APICs' page. On Arm the guest maps the ITS's doorbell.
        let msi_window = cfg!(target_arch = "x86_64")
            .then(|| IovaRange::block(Iova(layout::MSI_DOORBELLS), layout::MSI_DOORBELL_BITS));
        let config = VirtioIommuConfig {
            input_range: IovaRange::block(Iova(0), INPUT_BITS),
            msi_window,
            boot_bypass: true,
            max_mappings,
        };
        let events = Arc::new(EventQueue::default());
        let sink = Arc::clone(&events) as Arc<dyn FaultSink>;
        let model = Arc::new(VirtioIommu::new(config, Arc::clone(ram), sink));
        Self::Virtio { model, events }
    }

    fn smmuv3(
        config: &config::Iommu,
        vm: &Vm,
        buses: &Buses,
        ram: &Arc<GuestRam>,
    ) -> Result<Self, BuildError> {
        let Some(place) = layout::SMMU else {
            let problem = "this architecture has no SMMUv3";
            return Err(ConfigError::new("iommu.model", problem).into());
        };
        let deferral = buses.pause.deferral();
        let lines = SmmuLines {
            eventq: Box::new(vm.line(place.gsis.eventq)?),
            priq: Box::new(vm.line(place.gsis.priq)?),
            cmdq_sync: Box::new(vm.line(place.gsis.cmdq_sync)?),
            gerror: Box::new(vm.line(place.gsis.gerror)?),
            deferral: deferral.clone(),
        };
        let offered = SmmuConfig {
            stages: config.stage,
            ats: config.ats,
            ..SmmuConfig::default()
        };
        let model = Arc::new(Smmu::new(offered, Arc::clone(ram), Arc::new(lines)));
        let registers = Arc::new(SmmuRegisters(Arc::clone(&model)));
        let resumed: Weak<SmmuRegisters> = Arc::downgrade(&registers);
        deferral.resumes(resumed);
        buses
            .mmio
            .insert(place.regs.base, place.regs.size, registers)?;
        Ok(Self::Smmuv3(model))
    }

    /// The model, from which the regions of the streams are created.
    #[must_use]
    pub(super) fn model(&self) -> Arc<dyn Iommu> {
        match self {
            Self::Virtio { model, .. } => Arc::clone(model) as Arc<dyn Iommu>,
            Self::Smmuv3(model) => Arc::clone(model) as Arc<dyn Iommu>,
        }
    }

    /// Returns the callback that notifies the model when the guest switches ATS
    /// in a function; `None` where ATS is not offered.
    #[must_use]
    pub(super) fn ats_hook(&self, stream: StreamId) -> Option<AtsHook> {
        match self {
            Self::Smmuv3(model) if model.config().ats => {
                let model = Arc::clone(model);
                Some(Box::new(move |enabled| {
                    model.set_ats_enabled(stream, enabled);
                }))
            }
            _ => None,
        }
    }

    /// Creates the virtio-iommu device; `None` for another model.
    #[must_use]
    pub(super) fn function(&self) -> Option<VirtioIommuDevice> {
        match self {
            Self::Virtio { model, events } => Some(VirtioIommuDevice::new(
                Arc::clone(model),
                Arc::clone(events),
            )),
            Self::Smmuv3(_) => None,
        }
    }

    /// The model as the firmware tables describe it. `function` is the
    /// requester ID of a virtio-iommu.
    #[must_use]
    pub(super) fn node(&self, function: Option<u16>) -> Option<NodeModel> {
        match self {
            Self::Virtio { .. } => Some(NodeModel::VirtioPci { bdf: function? }),
            Self::Smmuv3(model) => Some(NodeModel::Smmuv3 {
                smmu: layout::SMMU?,
                ats: model.config().ats,
                coherent: true,
            }),
        }
    }
}
