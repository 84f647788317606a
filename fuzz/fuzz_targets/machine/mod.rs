//! A machine's two buses with all devices that this process emulates, without KVM:
//! one IOMMU, with an entropy device and a disk behind it.

pub mod guest;

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use devices::bus::{Bus, BusDevice};
use devices::interrupt::{Doorbells, IrqLine, MsiAllocator};
use devices::legacy::{
    CMOS_LEN, Cmos, Pl031, PowerRegister, RTC_LEN, SERIAL_LEN, SerialPort, SerialSink,
};
use devices::pause::PauseRequest;
use devices::pci::{MsiRetranslator, PciFunction, PciRoot, Requester};
use devices::poll::PollThread;
use devices::smmuv3::{SmmuLines, SmmuRegisters};
use devices::testing::{Board, eventfd};
use devices::virtio::VirtioDevice;
use devices::virtio::block::{Block, BlockConfig, Image};
use devices::virtio::iommu::{EventQueue, VirtioIommuDevice};
use devices::virtio::pci::{AtsHook, BAR_SIZE, VirtioPci, VirtioPciResources};
use devices::virtio::rng::Rng;
use iommu::smmuv3::{Smmu, SmmuConfig, Stages};
use iommu::virtio::{FaultSink, VirtioIommu, VirtioIommuConfig};
use iommu::{AddressSpace, Gpa, GuestRam, Iommu, IommuRegion, Iova, IovaRange, StreamId};
use vm_memory::GuestAddress;

/// Bytes of RAM, from address 0 on.
pub const RAM: u64 = 0x4_0000;
/// Bytes of the disk's image.
pub const IMAGE_LEN: u64 = 64 << 10;

pub const BARS: u64 = 0x40_0000_0000;
pub const ECAM: u64 = 0x3f00_0000;
const ECAM_LEN: u64 = 0x10_0000;
pub const SMMU: u64 = 0x0905_0000;
const SMMU_LEN: u64 = 0x2_0000;
pub const PL031: u64 = 0x0901_0000;

pub const SERIAL: u64 = 0x3f8;
pub const CMOS: u64 = 0x70;
pub const POWER: u64 = 0x600;
pub const KEYBOARD: u64 = 0x64;

/// Functions, as indices of `SLOTS`. With an SMMUv3 the first slot is empty.
pub const VIRTIO_IOMMU: usize = 0;
pub const RNG: usize = 1;
pub const DISK: usize = 2;
/// Slots of the functions on the PCI bus.
pub const SLOTS: [u8; 3] = [1, 2, 3];

struct Unconnected;

impl IrqLine for Unconnected {
    fn set(&self, _high: bool) {}
}

impl SerialSink for Unconnected {
    fn put(&self, byte: u8) -> bool {
        byte != 0
    }

    fn ready(&self) -> bool {
        true
    }
}

/// The IOMMU, with its device or registers.
enum Model {
    Virtio(Arc<VirtioIommu>, Arc<EventQueue>),
    Smmuv3(Arc<Smmu>),
}

impl Model {
    fn virtio(choice: u8, ram: &Arc<GuestRam>) -> Self {
        let config = VirtioIommuConfig {
            input_range: IovaRange::block(Iova(0), 48),
            msi_window: (choice & 2 == 0).then(|| IovaRange::block(Iova(0xfee0_0000), 20)),
            boot_bypass: choice & 4 == 0,
            max_mappings: if choice & 8 == 0 { 1024 } else { 4 },
        };
        let events = Arc::new(EventQueue::default());
        let sink = Arc::clone(&events) as Arc<dyn FaultSink>;
        let model = VirtioIommu::new(config, Arc::clone(ram), sink);
        Self::Virtio(Arc::new(model), events)
    }

    fn smmuv3(choice: u8, ram: &Arc<GuestRam>, memory: &Bus, pause: &Arc<PauseRequest>) -> Self {
        let deferral = pause.deferral();
        let lines = SmmuLines {
            eventq: Box::new(Unconnected),
            priq: Box::new(Unconnected),
            cmdq_sync: Box::new(Unconnected),
            gerror: Box::new(Unconnected),
            deferral: deferral.clone(),
        };
        let config = SmmuConfig {
            stages: [Stages::One, Stages::Two, Stages::Nested][usize::from(choice >> 2) % 3],
            ats: choice & 2 != 0,
            ..SmmuConfig::default()
        };
        let model = Arc::new(Smmu::new(config, Arc::clone(ram), Arc::new(lines)));
        let registers = Arc::new(SmmuRegisters(Arc::clone(&model)));
        deferral.resumes(Arc::downgrade(&registers) as _);
        memory.insert(SMMU, SMMU_LEN, registers).expect("free");
        Self::Smmuv3(model)
    }

    fn model(&self) -> Arc<dyn Iommu> {
        match self {
            Self::Virtio(model, _) => Arc::clone(model) as Arc<dyn Iommu>,
            Self::Smmuv3(model) => Arc::clone(model) as Arc<dyn Iommu>,
        }
    }

    fn ats_hook(&self, stream: StreamId) -> Option<AtsHook> {
        match self {
            Self::Smmuv3(model) if model.config().ats => {
                let model = Arc::clone(model);
                Some(Box::new(move |on| model.set_ats_enabled(stream, on)))
            }
            _ => None,
        }
    }

    /// The device in the slot of [`VIRTIO_IOMMU`].
    fn function(&self) -> Option<Box<dyn VirtioDevice>> {
        let Self::Virtio(model, events) = self else {
            return None;
        };
        let device = VirtioIommuDevice::new(Arc::clone(model), Arc::clone(events));
        Some(Box::new(device))
    }
}

/// The buses, and the parts of the machine that are not on them.
pub struct Machine {
    pub memory: Arc<Bus>,
    pub ports: Bus,
    pub ram: Arc<GuestRam>,
    pub serial: Arc<SerialPort>,
    pub pause: Arc<PauseRequest>,
    pub board: Arc<Board>,
    pub has_smmu: bool,
    /// The functions, with their indices.
    pub functions: Vec<(usize, Arc<VirtioPci>)>,
    /// Address that the guest last wrote to each BAR.
    bars: [AtomicU64; 3],
    _msis: PollThread,
}

impl Machine {
    /// The machine with the IOMMU that `choice` encodes and the disk image at
    /// `image`.
    pub fn new(choice: u8, image: &Path) -> Self {
        let size = usize::try_from(RAM).expect("it is small");
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), size)]).expect("memory");
        let (ram, memory) = (Arc::new(ram), Arc::new(Bus::new()));
        let (pause, board) = (Arc::<PauseRequest>::default(), Arc::<Board>::default());
        let retranslator = MsiRetranslator::new().expect("an eventfd");
        let msis = retranslator.start().expect("a thread");
        let model = if choice & 1 == 0 {
            Model::virtio(choice, &ram)
        } else {
            Model::smmuv3(choice, &ram, &memory, &pause)
        };
        let root = Arc::new(PciRoot::new(&memory));
        let rng = Box::new(Rng::new().expect("the host's pool"));
        let devices = [model.function(), Some(rng), Some(disk(image))];
        let mut functions = Vec::new();
        for (index, (slot, device)) in SLOTS.into_iter().zip(devices).enumerate() {
            let Some(device) = device else { continue };
            let stream = StreamId::from_bdf(0, slot, 0);
            let behind = index != VIRTIO_IOMMU;
            let space = if behind {
                let region = IommuRegion::new(model.model(), stream);
                AddressSpace::translated(region, Arc::clone(&ram))
            } else {
                AddressSpace::identity(stream, Arc::clone(&ram))
            };
            let parts = VirtioPciResources {
                requester: Requester::new(space, &retranslator),
                msi: Arc::clone(&board) as Arc<dyn MsiAllocator>,
                doorbells: Arc::clone(&board) as Arc<dyn Doorbells>,
                bar: Gpa(first_bar(index)),
                ats: model.ats_hook(stream).filter(|_| behind),
            };
            let function = VirtioPci::new("fuzz", device, parts).expect("eventfds");
            function.set_deferral(pause.deferral());
            let on_bus = Arc::clone(&function) as Arc<dyn PciFunction>;
            root.add(slot, on_bus).expect("a slot");
            functions.push((index, function));
        }
        memory.insert(ECAM, ECAM_LEN, root).expect("free");
        let (ports, serial) = legacy(&memory);
        Self {
            memory,
            ports,
            ram,
            serial,
            pause,
            board,
            has_smmu: matches!(model, Model::Smmuv3(_)),
            functions,
            bars: [0, 1, 2].map(|index| AtomicU64::new(first_bar(index))),
            _msis: msis,
        }
    }

    /// Address that the guest last wrote to the BAR of a function.
    pub fn bar(&self, function: usize) -> u64 {
        self.bars[function].load(Ordering::Relaxed)
    }

    /// Records the address that the guest writes to a BAR.
    pub fn set_bar(&self, function: usize, at: u64) {
        self.bars[function].store(at, Ordering::Relaxed);
    }
}

/// Initial address of a BAR.
pub fn first_bar(function: usize) -> u64 {
    BARS + u64::from(SLOTS[function]) * BAR_SIZE
}

/// A disk with two queues over `image`, whose data it removes.
fn disk(image: &Path) -> Box<dyn VirtioDevice> {
    let file = File::create(image).expect("an image");
    file.set_len(IMAGE_LEN).expect("an image");
    let config = BlockConfig {
        id: "fuzz".to_owned(),
        queues: 2,
        flush: true,
    };
    let image = Image::open(image, false).expect("an image");
    Box::new(Block::new(&config, image).expect("a thread"))
}

/// The devices that are not on PCI: those of both architectures.
fn legacy(memory: &Bus) -> (Bus, Arc<SerialPort>) {
    let ports = Bus::new();
    let (line, sink) = (Arc::new(Unconnected), Arc::new(Unconnected));
    let serial = SerialPort::new(line, sink, eventfd(), Arc::default());
    let serial = Arc::new(serial);
    let off = PowerRegister::new((0x3c, 0x34), || ());
    let devices: [(u64, u64, Arc<dyn BusDevice>); 5] = [
        (SERIAL, SERIAL_LEN, Arc::clone(&serial) as _),
        (CMOS, CMOS_LEN, Arc::new(Cmos::new())),
        (POWER, 2, Arc::new(off)),
        (POWER + 2, 1, Arc::new(PowerRegister::new((0xff, 1), || ()))),
        (
            KEYBOARD,
            1,
            Arc::new(PowerRegister::new((0xff, 0xfe), || ())),
        ),
    ];
    for (base, len, device) in devices {
        ports.insert(base, len, device).expect("free");
    }
    let clock = Arc::new(Pl031::new());
    memory.insert(PL031, RTC_LEN, clock).expect("free");
    (ports, serial)
}
