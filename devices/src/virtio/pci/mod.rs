//! The PCI transport (virtio 1.2 §4.1), modern devices only.

mod capabilities;
mod common_cfg;
mod queues;

use std::io;
use std::sync::{Arc, Weak};

use iommu::Gpa;
use iommu::lock::{LeafMutex, RankedMutex};
use log::{debug, warn};
use virtio_bindings::virtio_config::{
    VIRTIO_F_ACCESS_PLATFORM, VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use zerocopy::IntoBytes as _;

pub use self::capabilities::BAR_SIZE;
use self::capabilities::{
    COMMON, Capabilities, DEVICE, NOTIFY, NOTIFY_MULTIPLIER, PENDING, STRUCTURE, TABLE, ids,
};
use self::common_cfg::{DRIVER_OK, FEATURES_OK, NEEDS_RESET, Registers, Write};
use self::queues::{NO_VECTOR, QueueSetup};
use super::device::VirtioDevice;
use crate::bus::read_image;
use crate::error::Chain;
use crate::failure::DeviceError;
use crate::interrupt::{Doorbells, MsiAllocator};
use crate::pause::{Deferral, Resumable};
use crate::pci::{BarKind, Bars, ConfigSpace, ConfigWritten, Msix, PciFunction, Requester};
use crate::queue::{Interrupt, RunningQueue};

/// Entries of the MSI-X table that fit below the next structure.
const MAX_ENTRIES: usize = 256;
/// Upper bound on warnings in the log about a driver's errors.
const MAX_DRIVER_WARNINGS: u32 = 16;

/// Receives the ATS enable bit when the guest changes it.
pub type AtsHook = Box<dyn Fn(bool) + Send + Sync>;

/// Resources of a function other than its device.
pub struct VirtioPciResources {
    /// Memory view and MSI target.
    pub requester: Requester,
    /// Allocates the interrupt sources.
    pub msi: Arc<dyn MsiAllocator>,
    /// Attaches the kick eventfds to the notification addresses.
    pub doorbells: Arc<dyn Doorbells>,
    /// Initial guest-physical address of BAR 0, a multiple of its size.
    pub bar: Gpa,
    /// Receives changes of the ATS enable bit; `None` offers no ATS.
    pub ats: Option<AtsHook>,
}

/// The ATS capability.
struct Ats {
    /// The enable bit that `hook` received last.
    enabled: bool,
    hook: AtsHook,
}

struct State {
    device: Box<dyn VirtioDevice>,
    config: ConfigSpace,
    msix: Msix,
    capabilities: Capabilities,
    common: Registers,
    bus_master: bool,
    driver_warnings: u32,
    ats: Option<Ats>,
    queues: Vec<QueueSetup>,
    config_interrupt: Interrupt,
}

/// A virtio device as a PCI function.
///
/// One lock protects all of its state. It is the outermost lock (see the crate
/// `iommu`), is taken on a vCPU thread, and is held while the device starts or
/// stops queues.
pub struct VirtioPci {
    name: String,
    requester: Requester,
    doorbells: Arc<dyn Doorbells>,
    inline: bool,
    kicks: Vec<Arc<EventFd>>,
    offered: u64,
    placed: LeafMutex<Option<Gpa>>,
    state: RankedMutex<State, 1>,
}

impl VirtioPci {
    /// The function around `device`; `name` is for the log.
    ///
    /// # Errors
    /// No file descriptor or interrupt source is left, or BAR 0 cannot be at its
    /// initial address.
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
            let kick = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
            queues.push(QueueSetup::new(max, kick, interrupt()?));
        }
        let config_interrupt = interrupt()?;
        let mut bars = Bars::default();
        bars.add(0, BarKind::Prefetchable64, BAR_SIZE, bar)
            .map_err(io::Error::other)?;
        let mut config = ConfigSpace::new(&ids(device.device_type()), bars);
        let sources = queues.len() + 1;
        let entries = u16::try_from(sources.min(MAX_ENTRIES)).unwrap_or(1);
        let target = Arc::clone(&requester.msi);
        let msix = Msix::new(&mut config, target, entries, sources, (TABLE, PENDING));
        let capabilities = Capabilities::add(&mut config, ats.is_some());
        let ats = ats.map(|hook| Ats {
            enabled: false,
            hook,
        });
        let function = Arc::new(Self {
            name: name.to_owned(),
            doorbells,
            inline: device.inline(),
            kicks: queues.iter().map(|queue| Arc::clone(&queue.kick)).collect(),
            offered: offered(&*device, &requester),
            placed: LeafMutex::default(),
            requester,
            state: RankedMutex::new(State {
                device,
                config,
                msix,
                capabilities,
                common: Registers::new(0),
                bus_master: false,
                driver_warnings: 0,
                ats,
                queues,
                config_interrupt,
            }),
        });
        let weak = Arc::downgrade(&function);
        let mut state = function.state.lock();
        state.device.set_failure_callback(Box::new(move || {
            if let Some(function) = weak.upgrade() {
                function.check();
            }
        }));
        drop(state);
        Ok(function)
    }

    /// Sets the handle that interrupts and resumes the device's work on its
    /// queues. Called once, when the function is created.
    pub fn set_deferral(self: &Arc<Self>, deferral: Deferral) {
        let function: Weak<Self> = Arc::downgrade(self);
        deferral.resumes(function);
        self.state.lock().device.set_deferral(deferral);
    }

    /// Notifies the driver of a failure, or of a change of the device
    /// configuration, on another thread than a vCPU's.
    pub fn check(&self) {
        let mut state = self.state.lock();
        if let Some(failure) = state.device.take_failure() {
            self.fail(&mut state, &failure);
        }
        if state.device.take_config_change() {
            state.common.next_generation();
            state.config_interrupt.signal();
        }
    }

    /// Logs an error of a driver. The number of warnings is bounded, so that a
    /// driver cannot fill the host's log.
    fn log_driver_error(&self, state: &mut State, text: &str) {
        match state.driver_warnings {
            0..MAX_DRIVER_WARNINGS => warn!("{}: {text}", self.name),
            MAX_DRIVER_WARNINGS => warn!("{}: more of this is not logged", self.name),
            _ => debug!("{}: {text}", self.name),
        }
        state.driver_warnings = state.driver_warnings.saturating_add(1);
    }

    fn fail(&self, state: &mut State, failure: &DeviceError) {
        if state.common.status & NEEDS_RESET == 0 {
            self.log_driver_error(state, &Chain(failure).to_string());
            state.common.status |= NEEDS_RESET;
            state.common.next_generation();
            state.config_interrupt.signal();
        }
    }

    fn write_status(&self, state: &mut State, status: u8) {
        if status == 0 {
            self.reset(state);
            return;
        }
        let new = status & !state.common.status & !NEEDS_RESET;
        if new & FEATURES_OK != 0 && !self.negotiate(state) {
            state.common.status |= status & !NEEDS_RESET & !FEATURES_OK;
            return;
        }
        state.common.status |= new;
        self.start_queues(state);
    }

    fn negotiate(&self, state: &mut State) -> bool {
        let wanted = state.common.driver_features;
        let must = self.offered & (1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_ACCESS_PLATFORM);
        if wanted & !self.offered != 0 || wanted & must != must {
            let problem = format!("the driver's features {wanted:#x} cannot be served");
            self.log_driver_error(state, &problem);
            return false;
        }
        match state.device.negotiated(wanted) {
            Ok(()) => true,
            Err(failure) => {
                self.log_driver_error(state, &Chain(&failure).to_string());
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
        state.common = Registers::new(state.common.generation);
    }

    fn start_queues(&self, state: &mut State) {
        for index in 0..state.queues.len() {
            self.start(state, index);
        }
    }

    /// Starts a queue if the driver has enabled it and set DRIVER_OK, and the
    /// function is bus master.
    fn start(&self, state: &mut State, index: usize) {
        const READY: u8 = FEATURES_OK | DRIVER_OK;
        let features = state.common.driver_features;
        let ready = state.common.status & (READY | NEEDS_RESET) == READY && state.bus_master;
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
        let index = state.common.queue_select;
        let negotiated = state.common.ring_reset();
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
            && state.common.status & NEEDS_RESET == 0
            && let Err(failure) = state.device.kicked(index)
        {
            self.fail(state, &failure);
        }
    }

    /// Applies a change of the configuration space.
    fn config_written(&self, state: &mut State) {
        let State {
            config, msix, ats, ..
        } = state;
        msix.config_written(config);
        if let (Some(ats), Some(enabled)) = (ats, state.capabilities.ats_enabled(config))
            && enabled != ats.enabled
        {
            ats.enabled = enabled;
            (ats.hook)(enabled);
        }
        let bus_master = config.bus_master();
        if bus_master != state.bus_master {
            state.bus_master = bus_master;
            // Queues keep their position and continue from it.
            if bus_master {
                self.start_queues(state);
            } else {
                stop_queues(state);
            }
        }
    }

    fn write_common(&self, state: &mut State, offset: u64, data: &[u8]) {
        let Some(write) = state.common.write(offset, data) else {
            return;
        };
        let select = usize::from(state.common.queue_select);
        let sources = state.queues.len();
        let vectors = state.msix.entries();
        let valid = |vector: u16| Some(vector).filter(|&vector| usize::from(vector) < vectors);
        let queue = state.queues.get_mut(select);
        match (write, queue) {
            (Write::Status(status), _) => self.write_status(state, status),
            (Write::ConfigVector(vector), _) => {
                state.common.config_vector = valid(vector).unwrap_or(NO_VECTOR);
                state.msix.bind(sources, valid(vector));
            }
            (Write::QueueReset, _) => self.reset_queue(state),
            (_, None) => {}
            (Write::QueueVector(vector), Some(queue)) => {
                queue.vector = valid(vector).unwrap_or(NO_VECTOR);
                state.msix.bind(select, valid(vector));
            }
            (Write::QueueEnable, Some(queue)) => {
                queue.enabled = true;
                self.start(state, select);
            }
            // Size and addresses of an enabled queue are read-only.
            (_, Some(queue)) if queue.enabled => {}
            (Write::QueueSize(size), Some(queue)) => queue.size = size,
            (Write::QueueRing { ring, value, mask }, Some(queue)) => {
                queue.set_ring(ring, value, mask);
            }
        }
    }

    /// Reads the structures in the BAR at `offset` bytes. The whole access
    /// holds the lock, so it reads no partly changed field.
    fn read_structure(&self, state: &mut State, offset: u64, data: &mut [u8]) {
        let (structure, offset) = split(offset);
        match structure {
            COMMON => {
                if let Some(failure) = state.device.take_failure() {
                    self.fail(state, &failure);
                }
                let common = state.common.read(self.offered, &state.queues);
                read_image(common.as_bytes(), offset, data);
            }
            DEVICE => state.device.read_config(offset, data),
            TABLE => state.msix.read_table(offset, data),
            PENDING => state.msix.read_pending(offset, data),
            // The ISR is for INTx, which is not offered.
            _ => data.fill(0),
        }
    }

    /// Writes the structures in the BAR at `offset` bytes.
    fn write_structure(&self, state: &mut State, offset: u64, data: &[u8]) {
        let (structure, offset) = split(offset);
        match structure {
            COMMON => self.write_common(state, offset, data),
            DEVICE => state.device.write_config(offset, data),
            NOTIFY => {
                let queue = offset / u64::from(NOTIFY_MULTIPLIER);
                if let Ok(queue) = u16::try_from(queue) {
                    self.kicked(state, queue);
                }
            }
            TABLE => state.msix.write_table(offset, data),
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

/// The structure at an offset into the BAR, and the offset into the structure.
fn split(offset: u64) -> (u32, u64) {
    let inside = offset % u64::from(STRUCTURE);
    (u32::try_from(offset - inside).unwrap_or(u32::MAX), inside)
}

fn offered(device: &dyn VirtioDevice, requester: &Requester) -> u64 {
    let mut features = device.features() | 1 << VIRTIO_F_VERSION_1 | 1 << VIRTIO_F_RING_RESET;
    if requester.space.region().is_some() {
        features |= 1 << VIRTIO_F_ACCESS_PLATFORM;
    }
    features
}

impl Resumable for VirtioPci {
    fn resume(&self) {
        let mut state = self.state.lock();
        for index in (0..).take(state.queues.len()) {
            self.kicked(&mut state, index);
        }
    }
}

impl PciFunction for VirtioPci {
    fn read_config(&self, offset: u16, data: &mut [u8]) {
        let mut state = self.state.lock();
        state.config.read(offset, data);
        if let Some((at, len)) =
            (state.capabilities).access_window(&state.config, offset, data.len())
        {
            let mut bytes = [0; 4];
            if let Some(window) = bytes.get_mut(..len) {
                self.read_structure(&mut state, at, window);
            }
            data.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        }
    }

    fn write_config(&self, offset: u16, data: &[u8]) -> ConfigWritten {
        let mut state = self.state.lock();
        state.config.write(offset, data);
        let mut changed = ConfigSpace::words_of(offset, data.len());
        if state.capabilities.initiates_reset(&state.config) {
            self.reset(&mut state);
            state.msix.reset();
            state.config.reset();
            changed = ConfigSpace::all_words();
        }
        self.config_written(&mut state);
        let moves = state.config.bar_moves();
        if let Some((at, len)) =
            (state.capabilities).access_window(&state.config, offset, data.len())
        {
            self.write_structure(&mut state, at, data.get(..len).unwrap_or(data));
        }
        ConfigWritten {
            moves,
            changed,
            reads_have_effects: state.capabilities.window_is_open(&state.config),
        }
    }

    fn placed(&self, _bar: usize, at: Option<Gpa>) {
        if self.inline {
            return;
        }
        let mut placed = self.placed.lock();
        let address = |base: Gpa, index: usize| {
            Gpa(base.0 + u64::from(NOTIFY) + index as u64 * u64::from(NOTIFY_MULTIPLIER))
        };
        for (index, kick) in self.kicks.iter().enumerate() {
            let outcome = match (*placed, at) {
                (Some(old), None) => self.doorbells.detach(address(old, index), kick),
                (None, Some(new)) => self.doorbells.attach(address(new, index), kick),
                _ => Ok(()),
            };
            if let Err(error) = outcome {
                // Kicks are then handled as writes to the BAR.
                warn!("{}: doorbell of queue {index}: {error}", self.name);
            }
        }
        *placed = at;
    }

    fn read_bar(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        self.read_structure(&mut self.state.lock(), offset, data);
    }

    fn write_bar(&self, _bar: usize, offset: u64, data: &[u8]) {
        self.write_structure(&mut self.state.lock(), offset, data);
    }
}

#[cfg(test)]
mod tests;
