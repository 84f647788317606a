//! A vCPU without KVM, for the tests of the vCPU threads.
#![allow(unsafe_code)] // Reads what the kick's signal handler writes.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use devices::bus::{Bus, BusDevice};
use kvm_bindings::kvm_run;

use super::{Buses, Exit};
use crate::kvm::vcpus::Processor;

/// Guest physical address of the tests' device.
pub const DEVICE: u64 = 0x1000;

/// Upper bound on every wait of a test.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// A lock in place of a busy model's.
pub type Busy = Arc<Mutex<()>>;

/// Next action of a guest.
pub enum Step {
    /// Writes to the device at [`DEVICE`].
    Write,
    /// Computes for a moment.
    Compute,
    PowerOff,
}

/// Runs a guest that is a closure.
pub struct FakeVcpu {
    index: u32,
    page: Box<kvm_run>,
    guest: Box<dyn FnMut() -> Step + Send>,
    /// Number of pauses that were reported to the guest.
    pub pauses: Arc<AtomicU32>,
}

impl FakeVcpu {
    /// Creates vCPU `index` with this guest.
    pub fn new(index: u32, guest: impl FnMut() -> Step + Send + 'static) -> Self {
        Self {
            index,
            page: Box::default(),
            guest: Box::new(guest),
            pauses: Arc::default(),
        }
    }

    /// Creates a vCPU whose guest writes once and then only computes.
    pub fn that_writes_once(index: u32) -> Self {
        let mut written = false;
        Self::new(index, move || match std::mem::replace(&mut written, true) {
            false => Step::Write,
            true => Step::Compute,
        })
    }
}

impl Processor for FakeVcpu {
    fn index(&self) -> u32 {
        self.index
    }

    fn run(&mut self) -> Exit<'_> {
        loop {
            // SAFETY: the page is alive and aligned; the handler that writes
            // the byte runs on this thread.
            if unsafe { ptr::read_volatile(&raw const self.page.immediate_exit) } != 0 {
                return Exit::Interrupted;
            }
            match (self.guest)() {
                Step::Write => {
                    return Exit::MmioWrite {
                        address: DEVICE,
                        data: &[1],
                    };
                }
                Step::Compute => thread::sleep(Duration::from_micros(200)),
                Step::PowerOff => return Exit::PowerOff,
            }
        }
    }

    fn run_page(&mut self) -> *mut kvm_run {
        &raw mut *self.page
    }

    fn clear_kick(&mut self) {
        self.page.immediate_exit = 0;
    }

    fn registers(&mut self) -> String {
        String::new()
    }

    fn report_pause(&self) {
        self.pauses.fetch_add(1, Ordering::SeqCst);
    }
}

/// A device whose write lasts until the test releases it.
pub struct SleepingDevice {
    entered: Mutex<Sender<()>>,
    leave: Mutex<Receiver<()>>,
}

/// The test's end of a [`SleepingDevice`].
pub struct Sleeper {
    entered: Receiver<()>,
    leave: Sender<()>,
}

impl Sleeper {
    /// Waits until a vCPU is inside the device.
    pub fn wait_until_entered(&self) {
        let entered = self.entered.recv_timeout(TIMEOUT);
        entered.expect("no vCPU entered the device");
    }

    /// Lets one write end.
    pub fn release(&self) {
        // The device is gone when the test has ended its machine.
        let _ = self.leave.send(());
    }
}

impl BusDevice for SleepingDevice {
    fn read(&self, _: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _: u64, _: &[u8]) {
        let entered = self.entered.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = entered.send(());
        drop(entered);
        let leave = self.leave.lock().unwrap_or_else(PoisonError::into_inner);
        let _ = leave.recv();
    }
}

/// Buses with `device` at [`DEVICE`].
pub fn buses_with(device: Arc<dyn BusDevice>) -> Buses {
    let mmio = Bus::new();
    mmio.insert(DEVICE, 1, device).expect("the bus is empty");
    Buses {
        pio: Arc::new(Bus::new()),
        mmio: Arc::new(mmio),
        pause: Arc::default(),
    }
}

/// Buses with a device that sleeps.
pub fn sleeping_buses() -> (Buses, Sleeper) {
    let (enter, entered) = channel();
    let (leave, left) = channel();
    let device = SleepingDevice {
        entered: Mutex::new(enter),
        leave: Mutex::new(left),
    };
    (buses_with(Arc::new(device)), Sleeper { entered, leave })
}
