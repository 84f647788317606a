//! The PCI transport (virtio 1.2 §4.1), modern devices only.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use iommu::Gpa;
use log::{debug, warn};
use virtio_bindings::virtio_config::{
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueT as _};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{VirtioDevice, read_image};
use crate::error::Chain;
use crate::failure::DeviceError;
use crate::interrupt::{Doorbells, MsiAllocator};
use crate::pause::{Deferral, Resumable};
use crate::pci::{Bar, BarMove, ConfigSpace, Ids, Msix, PciFunction, Requester, halves};
use crate::queue::{Interrupt, QueuePosition, RunningQueue};

/// Bytes of BAR 0, which holds all of the structures.
pub const BAR_SIZE: u64 = 0x8000;
const COMMON: u64 = 0x0000;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const NOTIFY: u64 = 0x3000;
const TABLE: u64 = 0x4000;
const PENDING: u64 = 0x5000;
/// Bytes of each structure as the capabilities give them.
const STRUCTURE: u32 = 0x1000;
/// Bytes between the notification addresses of two queues.
const NOTIFY_MULTIPLIER: u32 = 4;
/// Bytes of the common configuration (§4.1.4.3).
const COMMON_SIZE: usize = 60;
/// Entries of the MSI-X table that fit before the next structure.
const MAX_ENTRIES: usize = 256;
/// Lines that a driver's mistakes get in the log as warnings.
const MAX_COMPLAINTS: u32 = 16;
/// "No vector" (§4.1.5.1.2).
const NO_VECTOR: u16 = 0xffff;

const VENDOR: u16 = 0x1af4;
const MODERN_DEVICES: u16 = 0x1040;
const VENDOR_CAPABILITY: u8 = 0x09;
const PCIE_CAPABILITY: u8 = 0x10;
/// Offset of the device control register in the PCI Express capability, and
/// its bit that resets the function (PCIe 6.0 §7.5.3.4).
const DEVICE_CONTROL: u16 = 8;
const INITIATE_RESET: u32 = 1 << 15;
const ATS_CAPABILITY: u16 = 0x0f;
/// Bit 31 of ATS's only double word: Enable, in its control register
/// (PCIe 6.0 §10.5.1.3).
const ATS_ENABLE: u32 = 1 << 31;

// Bits of `device_status` (§2.1).
const DRIVER_OK: u8 = 4;
const FEATURES_OK: u8 = 8;
const NEEDS_RESET: u8 = 64;

/// Is told when the guest switches the ATS capability of a function.
pub type AtsHook = Box<dyn Fn(bool) + Send + Sync>;

/// Resources of a function besides its device.
pub struct VirtioPciResources {
    /// Memory view and MSI target.
    pub requester: Requester,
    /// Gives the interrupt sources.
    pub msi: Arc<dyn MsiAllocator>,
    /// Attaches kicks.
    pub doorbells: Arc<dyn Doorbells>,
    /// Where BAR 0 is at first.
    pub bar: Gpa,
    /// Offers ATS, and is told when it is switched.
    pub ats: Option<AtsHook>,
}

/// A queue as the driver sets it up.
struct QueueSetup {
    max: u16,
    size: u16,
    vector: u16,
    enabled: bool,
    running: bool,
    /// Where it goes on; the device may not have run for a while.
    position: QueuePosition,
    descriptors: u64,
    driver: u64,
    device: u64,
    kick: Arc<EventFd>,
    interrupt: Interrupt,
}

impl QueueSetup {
    fn clear(&mut self) {
        self.size = self.max;
        self.vector = NO_VECTOR;
        self.position = QueuePosition::default();
        (self.enabled, self.running) = (false, false);
        (self.descriptors, self.driver, self.device) = (0, 0, 0);
    }

    /// The queue that the driver described.
    fn build(&self, index: u16, features: u64) -> Result<Queue, DeviceError> {
        let bad = |reason| DeviceError::BadQueue {
            queue: index,
            reason,
        };
        let mut queue = Queue::new(self.max).map_err(|_| bad("its largest size is no size"))?;
        if queue.try_set_size(self.size).is_err() {
            return Err(bad("its size is no power of two up to the largest"));
        }
        let aligned = self.descriptors.is_multiple_of(16)
            && self.driver.is_multiple_of(2)
            && self.device.is_multiple_of(4);
        if !aligned {
            return Err(bad("a ring is not aligned"));
        }
        let halves = |address| {
            let (low, high) = halves(address);
            (Some(low), Some(high))
        };
        let (low, high) = halves(self.descriptors);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(self.driver);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(self.device);
        queue.set_used_ring_address(low, high);
        queue.set_next_avail(self.position.next_avail);
        queue.set_next_used(self.position.next_used);
        queue.set_event_idx(features >> VIRTIO_RING_F_EVENT_IDX & 1 == 1);
        queue.set_ready(true);
        Ok(queue)
    }
}

/// The ATS capability.
struct Ats {
    /// Offset of the double word that has the control register.
    control: u16,
    enabled: bool,
    hook: AtsHook,
}

struct State {
    device: Box<dyn VirtioDevice>,
    config: ConfigSpace,
    msix: Msix,
    access: u16,
    express: u16,
    bus_master: bool,
    complaints: u32,
    ats: Option<Ats>,
    bar: Option<Bar>,
    status: u8,
    device_select: u32,
    driver_select: u32,
    driver_features: u64,
    config_vector: u16,
    generation: u8,
    queue_select: u16,
    queues: Vec<QueueSetup>,
    config_interrupt: Interrupt,
}

/// A virtio device as a PCI function.
///
/// One lock guards all of it; it is the outermost one (see the crate `iommu`):
/// it is taken on a vCPU and held while the device starts or stops queues.
pub struct VirtioPci {
    name: String,
    requester: Requester,
    doorbells: Arc<dyn Doorbells>,
    inline: bool,
    kicks: Vec<Arc<EventFd>>,
    offered: u64,
    placed: Mutex<Option<Gpa>>,
    state: Mutex<State>,
}

impl VirtioPci {
    /// The function around `device`; `name` is for the log.
    ///
    /// # Errors
    /// No eventfd or interrupt source is left.
    pub fn new(
        name: &str,
        device: Box<dyn VirtioDevice>,
        resources: VirtioPciResources,
    ) -> io::Result<Arc<Self>> {
        let VirtioPciResources {
            requester,
            msi,
            doorbells,
            bar,
            ats,
        } = resources;
        let interrupt = || -> io::Result<Interrupt> {
            let vector = msi.vector()?;
            requester.msi.add(Arc::clone(&vector));
            Ok(Interrupt::new(vector))
        };
        let mut queues = Vec::new();
        for &max in device.queue_sizes() {
            queues.push(QueueSetup {
                max,
                size: max,
                vector: NO_VECTOR,
                enabled: false,
                running: false,
                position: QueuePosition::default(),
                descriptors: 0,
                driver: 0,
                device: 0,
                kick: Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?),
                interrupt: interrupt()?,
            });
        }
        let config_interrupt = interrupt()?;
        let bar = Bar {
            base: bar,
            size: BAR_SIZE,
        };
        let mut config = ConfigSpace::new(&ids(device.device_type()), Some(bar));
        let sources = queues.len() + 1;
        let entries = u16::try_from(sources.min(MAX_ENTRIES)).unwrap_or(1);
        let target = Arc::clone(&requester.msi);
        #[expect(clippy::cast_possible_truncation, reason = "offsets into a small BAR")]
        let places = (TABLE as u32, PENDING as u32);
        let msix = Msix::new(&mut config, target, entries, sources, places);
        let (access, express) = add_capabilities(&mut config);
        let ats = ats.map(|hook| Ats {
            control: add_ats(&mut config) + 4,
            enabled: false,
            hook,
        });
        let function = Arc::new(Self {
            name: name.to_owned(),
            doorbells,
            inline: device.inline(),
            kicks: queues.iter().map(|queue| Arc::clone(&queue.kick)).collect(),
            offered: offered(&*device, &requester),
            placed: Mutex::default(),
            requester,
            state: Mutex::new(State {
                device,
                config,
                msix,
                access,
                express,
                bus_master: false,
                complaints: 0,
                ats,
                bar: None,
                status: 0,
                device_select: 0,
                driver_select: 0,
                driver_features: 0,
                config_vector: NO_VECTOR,
                generation: 0,
                queue_select: 0,
                queues,
                config_interrupt,
            }),
        });
        let weak = Arc::downgrade(&function);
        let mut state = function.lock();
        state.device.set_failure_callback(Box::new(move || {
            if let Some(function) = weak.upgrade() {
                function.check();
            }
        }));
        drop(state);
        Ok(function)
    }

    /// Sets what interrupts the device's work on its queues and resumes it.
    /// Called once, when the function is made.
    pub fn set_deferral(self: &Arc<Self>, deferral: Deferral) {
        let function: Weak<Self> = Arc::downgrade(self);
        deferral.resumes(function);
        self.lock().device.set_deferral(deferral);
    }

    /// Shows the driver a failure, or a change of the device configuration, that
    /// happened away from the vCPUs, if there was one.
    pub fn check(&self) {
        let mut state = self.lock();
        if let Some(failure) = state.device.take_failure() {
            self.fail(&mut state, &failure);
        }
        if state.device.take_config_change() {
            state.generation = state.generation.wrapping_add(1);
            state.config_interrupt.signal();
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Logs what a driver did wrong; a driver that goes on and on does not
    /// fill the host's log.
    fn complain(&self, state: &mut State, text: &str) {
        match state.complaints {
            0..MAX_COMPLAINTS => warn!("{}: {text}", self.name),
            MAX_COMPLAINTS => warn!("{}: more of this is not logged", self.name),
            _ => debug!("{}: {text}", self.name),
        }
        state.complaints = state.complaints.saturating_add(1);
    }

    fn fail(&self, state: &mut State, failure: &DeviceError) {
        if state.status & NEEDS_RESET == 0 {
            self.complain(state, &Chain(failure).to_string());
            state.status |= NEEDS_RESET;
            state.generation = state.generation.wrapping_add(1);
            state.config_interrupt.signal();
        }
    }

    fn write_status(&self, state: &mut State, status: u8) {
        if status == 0 {
            self.reset(state);
            return;
        }
        let new = status & !state.status & !NEEDS_RESET;
        if new & FEATURES_OK != 0 && !self.negotiate(state) {
            state.status |= status & !NEEDS_RESET & !FEATURES_OK;
            return;
        }
        state.status |= new;
        self.start_queues(state);
    }

    fn negotiate(&self, state: &mut State) -> bool {
        let wanted = state.driver_features;
        let must = self.offered & (1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM);
        if wanted & !self.offered != 0 || wanted & must != must {
            let problem = format!("the driver's features {wanted:#x} cannot be served");
            self.complain(state, &problem);
            return false;
        }
        match state.device.negotiated(wanted) {
            Ok(()) => true,
            Err(failure) => {
                self.complain(state, &Chain(&failure).to_string());
                false
            }
        }
    }

    fn reset(&self, state: &mut State) {
        stop_queues(state);
        state.device.reset();
        debug!("{}: reset", self.name);
        for queue in &mut state.queues {
            queue.clear();
        }
        state.msix.unbind_all();
        state.status = 0;
        (state.device_select, state.driver_select) = (0, 0);
        (state.driver_features, state.queue_select) = (0, 0);
        state.config_vector = NO_VECTOR;
    }

    fn start_queues(&self, state: &mut State) {
        for index in 0..state.queues.len() {
            self.start(state, index);
        }
    }

    /// Starts a queue if the driver has enabled it and is ready, and the
    /// function may reach memory.
    fn start(&self, state: &mut State, index: usize) {
        const READY: u8 = FEATURES_OK | DRIVER_OK;
        let features = state.driver_features;
        let ready = state.status & (READY | NEEDS_RESET) == READY && state.bus_master;
        let Ok(number) = u16::try_from(index) else {
            return;
        };
        let Some(setup) = state.queues.get_mut(index) else {
            return;
        };
        if !ready || !setup.enabled || setup.running {
            return;
        }
        let started = setup.build(number, features).and_then(|queue| {
            let started = RunningQueue {
                queue,
                dma: self.requester.space.dma(),
                kick: Arc::clone(&setup.kick),
                interrupt: setup.interrupt.clone(),
            };
            state.device.start_queue(number, started)
        });
        match started {
            Ok(()) => setup.running = true,
            Err(failure) => self.fail(state, &failure),
        }
    }

    fn reset_queue(&self, state: &mut State) {
        let index = state.queue_select;
        let negotiated = state.driver_features >> VIRTIO_F_RING_RESET & 1 == 1;
        if let Some(queue) = state.queues.get_mut(usize::from(index))
            && negotiated
        {
            if queue.running {
                state.device.stop_queue(index);
            }
            queue.clear();
            state.msix.bind(usize::from(index), None);
        }
    }

    fn kicked(&self, state: &mut State, index: u16) {
        let Some(queue) = state.queues.get(usize::from(index)) else {
            return;
        };
        if !self.inline {
            let _ = queue.kick.write(1);
            return;
        }
        if queue.running
            && state.status & NEEDS_RESET == 0
            && let Err(failure) = state.device.kicked(index)
        {
            self.fail(state, &failure);
        }
    }

    /// Follows a change of the configuration space.
    fn config_written(&self, state: &mut State) {
        let State {
            config, msix, ats, ..
        } = state;
        msix.config_written(config);
        if let Some(ats) = ats {
            let enabled = config.word(ats.control) & ATS_ENABLE != 0;
            if enabled != ats.enabled {
                ats.enabled = enabled;
                (ats.hook)(enabled);
            }
        }
        let bus_master = config.bus_master();
        if bus_master != state.bus_master {
            state.bus_master = bus_master;
            // Queues hold where they are and go on from there.
            if bus_master {
                self.start_queues(state);
            } else {
                stop_queues(state);
            }
        }
    }

    /// Reads the common configuration: all of it is laid out, so that a part
    /// of a field reads as such.
    fn read_common(&self, state: &State, offset: u64, data: &mut [u8]) {
        let queue = state.queues.get(usize::from(state.queue_select));
        let features = match state.device_select {
            0 => self.offered,
            1 => self.offered >> 32,
            _ => 0,
        };
        let acknowledged = match state.driver_select {
            0 => state.driver_features,
            1 => state.driver_features >> 32,
            _ => 0,
        };
        let low = |word: u64| u32::try_from(word & 0xffff_ffff).unwrap_or(0);
        let of = |field: fn(&QueueSetup) -> u16| queue.map_or(0, field);
        let at = |field: fn(&QueueSetup) -> u64| queue.map_or(0, field);
        let count = u16::try_from(state.queues.len()).unwrap_or(u16::MAX);
        let mut image = [0; COMMON_SIZE];
        let fields = (state.device_select.to_le_bytes().into_iter())
            .chain(low(features).to_le_bytes())
            .chain(state.driver_select.to_le_bytes())
            .chain(low(acknowledged).to_le_bytes())
            .chain(state.config_vector.to_le_bytes())
            .chain(count.to_le_bytes())
            .chain([state.status, state.generation])
            .chain(state.queue_select.to_le_bytes())
            .chain(of(|queue| queue.size).to_le_bytes())
            .chain(queue.map_or(NO_VECTOR, |queue| queue.vector).to_le_bytes())
            .chain(of(|queue| u16::from(queue.enabled)).to_le_bytes())
            .chain(queue.map_or(0, |_| state.queue_select).to_le_bytes())
            .chain(at(|queue| queue.descriptors).to_le_bytes())
            .chain(at(|queue| queue.driver).to_le_bytes())
            .chain(at(|queue| queue.device).to_le_bytes());
        image
            .iter_mut()
            .zip(fields)
            .for_each(|(to, from)| *to = from);
        read_image(&image, offset, data);
    }

    fn write_common(&self, state: &mut State, offset: u64, data: &[u8]) {
        // Fields are written whole, 64-bit ones also by halves (§4.1.3.1).
        let mut bytes = [0; 8];
        let Some(value) = bytes.get_mut(..data.len()) else {
            return;
        };
        value.copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        let word = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        let half = u16::from_le_bytes([bytes[0], bytes[1]]);
        let vectors = state.msix.entries();
        let vector = Some(half).filter(|&vector| usize::from(vector) < vectors);
        let sources = state.queues.len();
        let select = usize::from(state.queue_select);
        match (offset, data.len()) {
            (0, 4) => state.device_select = word,
            (8, 4) => state.driver_select = word,
            (12, 4) => write_features(state, word),
            (16, 2) => {
                state.config_vector = vector.unwrap_or(NO_VECTOR);
                state.msix.bind(sources, vector);
            }
            (20, 1) => self.write_status(state, bytes[0]),
            (22, 2) => state.queue_select = half,
            (26, 2) => {
                if let Some(queue) = state.queues.get_mut(select) {
                    queue.vector = vector.unwrap_or(NO_VECTOR);
                    state.msix.bind(select, vector);
                }
            }
            (28, 2) if half == 1 => {
                if let Some(queue) = state.queues.get_mut(select) {
                    queue.enabled = true;
                    self.start(state, select);
                }
            }
            (58, 2) if half == 1 => self.reset_queue(state),
            _ => write_queue(state, offset, data.len(), value),
        }
    }

    /// The window of the configuration access capability (§4.1.4.9): an access
    /// to its data is one to the BAR.
    fn access_window(state: &State, offset: u16, len: usize) -> Option<(u64, usize)> {
        let data = state.access + 16;
        let inside = offset >= data && usize::from(offset) + len <= usize::from(data) + 4;
        if !inside {
            return None;
        }
        let bar = state.config.word(state.access + 4) & 0xff;
        let at = u64::from(state.config.word(state.access + 8));
        let len = state.config.word(state.access + 12);
        let valid = bar == 0 && matches!(len, 1 | 2 | 4) && at < BAR_SIZE;
        valid.then_some((at, len as usize))
    }

    /// Reads the structures in the BAR at `offset` bytes, all of the access
    /// under one hold of the lock: no field is seen half changed.
    fn read_structure(&self, state: &mut State, offset: u64, data: &mut [u8]) {
        match offset & !0xfff {
            COMMON => {
                if let Some(failure) = state.device.take_failure() {
                    self.fail(state, &failure);
                }
                self.read_common(state, offset, data);
            }
            DEVICE => state.device.read_config(offset - DEVICE, data),
            TABLE => state.msix.read_table(offset - TABLE, data),
            PENDING => state.msix.read_pending(offset - PENDING, data),
            // The ISR is for INTx, which is not offered.
            _ => data.fill(0),
        }
    }

    /// Writes the structures in the BAR at `offset` bytes.
    fn write_structure(&self, state: &mut State, offset: u64, data: &[u8]) {
        match offset & !0xfff {
            COMMON => self.write_common(state, offset, data),
            DEVICE => state.device.write_config(offset - DEVICE, data),
            NOTIFY => {
                let queue = (offset - NOTIFY) / u64::from(NOTIFY_MULTIPLIER);
                if let Ok(queue) = u16::try_from(queue) {
                    self.kicked(state, queue);
                }
            }
            TABLE => state.msix.write_table(offset - TABLE, data),
            _ => {}
        }
    }
}

fn stop_queues(state: &mut State) {
    for (index, queue) in (0..).zip(&mut state.queues) {
        if queue.running {
            let position = state.device.stop_queue(index);
            queue.position = position.unwrap_or_default();
            queue.running = false;
        }
    }
}

fn write_features(state: &mut State, word: u32) {
    if state.status & FEATURES_OK != 0 {
        return;
    }
    let shift = match state.driver_select {
        0 => 0,
        1 => 32,
        _ => return,
    };
    let kept = state.driver_features & !(0xffff_ffff << shift);
    state.driver_features = kept | u64::from(word) << shift;
}

/// Size and addresses of the selected queue, while it is not enabled.
fn write_queue(state: &mut State, offset: u64, len: usize, value: u64) {
    let select = usize::from(state.queue_select);
    let Some(queue) = state.queues.get_mut(select).filter(|queue| !queue.enabled) else {
        return;
    };
    let field = match offset {
        24 if len == 2 => {
            queue.size = u16::try_from(value).unwrap_or(0);
            return;
        }
        32 | 36 => &mut queue.descriptors,
        40 | 44 => &mut queue.driver,
        48 | 52 => &mut queue.device,
        _ => return,
    };
    match (offset % 8, len) {
        (0, 8) => *field = value,
        (0, 4) => *field = *field & !0xffff_ffff | value,
        (4, 4) => *field = *field & 0xffff_ffff | value << 32,
        _ => {}
    }
}

fn offered(device: &dyn VirtioDevice, requester: &Requester) -> u64 {
    let mut features = device.features() | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_RING_RESET;
    if requester.space.region().is_some() {
        features |= 1 << VIRTIO_F_ACCESS_PLATFORM;
    }
    features
}

fn ids(device_type: u32) -> Ids {
    let kind = u16::try_from(device_type).unwrap_or(0);
    let class = match device_type {
        virtio_bindings::virtio_ids::VIRTIO_ID_NET => 0x02_0000,
        virtio_bindings::virtio_ids::VIRTIO_ID_BLOCK => 0x01_8000,
        virtio_bindings::virtio_ids::VIRTIO_ID_IOMMU => 0x08_0600,
        virtio_bindings::virtio_ids::VIRTIO_ID_VSOCK => 0x02_8000,
        _ => 0x08_8000,
    };
    Ids {
        vendor: VENDOR,
        device: MODERN_DEVICES + kind,
        class,
        revision: 1,
        subsystem_vendor: VENDOR,
        subsystem: 0x40,
    }
}

/// Adds the capabilities of the transport (§4.1.4) and of PCI Express. Returns
/// where the configuration access capability is, and that of PCI Express.
fn add_capabilities(config: &mut ConfigSpace) -> (u16, u16) {
    let structure = |kind: u8, offset: u64, extra: &[u8]| -> Vec<u8> {
        let len = u8::try_from(16 + extra.len()).unwrap_or(0);
        let offset = offset.to_le_bytes();
        let mut body = vec![len, kind, 0, 0, 0, 0];
        body.extend(offset.iter().take(4));
        body.extend(STRUCTURE.to_le_bytes());
        body.extend(extra);
        body
    };
    let multiplier = NOTIFY_MULTIPLIER.to_le_bytes();
    for body in [
        structure(1, COMMON, &[]),
        structure(2, NOTIFY, &multiplier),
        structure(3, ISR, &[]),
        structure(4, DEVICE, &[]),
    ] {
        config.add_capability(VENDOR_CAPABILITY, &body, &vec![0; body.len()]);
    }
    let body = structure(5, 0, &[0; 4]);
    let mut writable = vec![0; body.len()];
    // bar, offset and length; the data is not stored.
    writable[2] = 0xff;
    writable[6..14].fill(0xff);
    let access = config.add_capability(VENDOR_CAPABILITY, &body, &writable);
    // Version 2, a root complex integrated endpoint, role-based errors,
    // function-level reset (PCIe 6.0 §7.5.3).
    let mut express = [0; 58];
    express[..6].copy_from_slice(&[0x92, 0x00, 0x00, 0x80, 0x00, 0x10]);
    let mut writable = [0; 58];
    writable[6..8].fill(0xff);
    let express = config.add_capability(PCIE_CAPABILITY, &express, &writable);
    (access, express)
}

/// Adds ATS (PCIe 6.0 §10.5.1): page-aligned requests, an invalidate queue of 32
/// (encoded as 0). Returns where it is.
fn add_ats(config: &mut ConfigSpace) -> u16 {
    config.add_extended_capability(ATS_CAPABILITY, 1, &[(1 << 5, ATS_ENABLE | 0x1f << 16)])
}

impl Resumable for VirtioPci {
    fn resume(&self) {
        let mut state = self.lock();
        for index in (0..).take(state.queues.len()) {
            self.kicked(&mut state, index);
        }
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let mut state = self.lock();
        state.config.read(offset, data);
        if let Some((at, len)) = Self::access_window(&state, offset, data.len()) {
            let mut bytes = [0; 4];
            if let Some(window) = bytes.get_mut(..len) {
                self.read_structure(&mut state, at, window);
            }
            data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> Option<BarMove> {
        let mut state = self.lock();
        state.config.write(offset, data);
        let control = state.config.word(state.express + DEVICE_CONTROL);
        if control & INITIATE_RESET != 0 {
            self.reset(&mut state);
            state.msix.reset();
            state.config.reset();
        }
        self.config_written(&mut state);
        let to = state.config.bar();
        let moved = to != state.bar;
        state.bar = to;
        if let Some((at, len)) = Self::access_window(&state, offset, data.len()) {
            self.write_structure(&mut state, at, data.get(..len).unwrap_or(data));
        }
        moved.then_some(BarMove { to })
    }

    fn placed(&self, at: Option<Gpa>) {
        if self.inline {
            return;
        }
        let mut placed = self.placed.lock().unwrap_or_else(PoisonError::into_inner);
        let address = |base: Gpa, index: usize| {
            Gpa(base.0 + NOTIFY + index as u64 * u64::from(NOTIFY_MULTIPLIER))
        };
        for (index, kick) in self.kicks.iter().enumerate() {
            let outcome = match (*placed, at) {
                (Some(old), None) => self.doorbells.detach(address(old, index), kick),
                (None, Some(new)) => self.doorbells.attach(address(new, index), kick),
                _ => Ok(()),
            };
            if let Err(error) = outcome {
                // Kicks then take the way through this process.
                warn!("{}: doorbell of queue {index}: {error}", self.name);
            }
        }
        *placed = at;
    }

    fn read_bar(&self, offset: u64, data: &mut [u8]) {
        self.read_structure(&mut self.lock(), offset, data);
    }

    fn write_bar(&self, offset: u64, data: &[u8]) {
        self.write_structure(&mut self.lock(), offset, data);
    }
}

#[cfg(test)]
mod tests;
