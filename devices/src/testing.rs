//! An interrupt controller, doorbells, a vhost kernel and a driver's queue, for tests and fuzz
//! targets. Nothing of it handles an error: a test ends with it.
#![allow(
    missing_docs,
    clippy::indexing_slicing,
    clippy::missing_panics_doc,
    reason = "fixtures of tests"
)]

mod kernel;

use std::collections::BTreeSet;
use std::io;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, Weak};

use iommu::{
    Fault, Gpa, GuestRam, Iommu, IovaRange, Mapping, NotifierEvents, Refused, Request, StreamId,
    StreamSink,
};
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{ByteValued, Bytes as _, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub use self::kernel::{Kernel, KernelState};
use crate::interrupt::{Doorbells, MsiAllocator, MsiMessage, MsiVector};

/// Bytes of the tests' RAM, which starts at 0.
pub const RAM: u64 = 0x10_0000;
/// Requester ID of the tests.
pub const REQUESTER: StreamId = StreamId(0x18);

pub fn ram() -> Arc<GuestRam> {
    let size = usize::try_from(RAM).unwrap();
    Arc::new(GuestRam::from_ranges(&[(GuestAddress(0), size)]).unwrap())
}

pub fn eventfd() -> EventFd {
    EventFd::new(EFD_NONBLOCK).unwrap()
}

/// Path of a FIFO, which is removed on drop.
pub struct Fifo(pub PathBuf);

/// Creates a FIFO in the temporary directory.
pub fn fifo() -> Fifo {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let name = format!("portcullis-fifo-{}-{number}", std::process::id());
    let path = std::env::temp_dir().join(name);
    let made = Command::new("mkfifo").arg(&path).status().unwrap();
    assert!(made.success());
    Fifo(path)
}

impl Drop for Fifo {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// An IOMMU that translates and looks up by a function, accepts every notifier
/// and announces nothing.
pub struct TranslateBy<F>(pub F);

impl<F> Iommu for TranslateBy<F>
where
    F: Fn(&Request) -> Result<Mapping, Fault> + Send + Sync,
{
    fn translate(&self, request: &Request) -> Result<Mapping, Fault> {
        self.0(request)
    }

    fn lookup(&self, request: &Request) -> Result<Mapping, Fault> {
        self.0(request)
    }

    fn notifier_events_changed(
        &self,
        _stream: StreamId,
        _old: NotifierEvents,
        _new: NotifierEvents,
    ) -> Result<(), Refused> {
        Ok(())
    }

    fn replay(
        &self,
        _stream: StreamId,
        _range: IovaRange,
        _visit: &mut dyn FnMut(&Mapping) -> ControlFlow<()>,
    ) {
    }

    fn connect(&self, _stream: StreamId, _sink: Weak<dyn StreamSink>) {}
}

/// An interrupt source that records its routes.
pub struct Vector {
    event: EventFd,
    routes: Mutex<Vec<Option<MsiMessage>>>,
}

impl Vector {
    pub fn message(&self) -> Option<MsiMessage> {
        self.routes().last().copied().flatten()
    }

    /// Every route that was set, the first one first.
    pub fn routes(&self) -> Vec<Option<MsiMessage>> {
        self.routes.lock().unwrap().clone()
    }

    /// Number of signals since the last call, delivered or pending.
    pub fn signals(&self) -> u64 {
        self.event.read().unwrap_or(0)
    }
}

impl MsiVector for Vector {
    fn eventfd(&self) -> &EventFd {
        &self.event
    }

    fn route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        self.routes.lock().unwrap().push(message);
        Ok(())
    }

    fn pending(&self) -> bool {
        let count = self.message().is_none().then(|| self.signals());
        count.is_some_and(|count| count > 0 && self.event.write(count).is_ok())
    }
}

impl Vector {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            event: eventfd(),
            routes: Mutex::default(),
        })
    }
}

/// The interrupt sources and the doorbells of a machine.
#[derive(Default)]
pub struct Board {
    vectors: Mutex<Vec<Arc<Vector>>>,
    doorbells: Mutex<BTreeSet<u64>>,
}

impl Board {
    pub fn allocated(&self, number: usize) -> Arc<Vector> {
        Arc::clone(&self.vectors.lock().unwrap()[number])
    }

    /// The addresses that have a doorbell.
    pub fn doorbells(&self) -> Vec<u64> {
        self.doorbells.lock().unwrap().iter().copied().collect()
    }
}

impl MsiAllocator for Board {
    fn vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let vector = Vector::new();
        self.vectors.lock().unwrap().push(Arc::clone(&vector));
        Ok(vector)
    }
}

impl Doorbells for Board {
    fn attach(&self, address: Gpa, _kick: &EventFd) -> io::Result<()> {
        assert!(self.doorbells.lock().unwrap().insert(address.0));
        Ok(())
    }

    fn detach(&self, address: Gpa, _kick: &EventFd) -> io::Result<()> {
        assert!(self.doorbells.lock().unwrap().remove(&address.0));
        Ok(())
    }
}

/// Flags of a descriptor.
pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// The driver side of a split queue: the table at `base`, the available ring at
/// `base + 0x1000` and the used ring at `base + 0x2000`.
#[derive(Clone)]
pub struct Ring {
    pub ram: Arc<GuestRam>,
    pub base: u64,
    pub size: u16,
}

impl Ring {
    pub fn new(ram: &Arc<GuestRam>, base: u64, size: u16) -> Self {
        let ram = Arc::clone(ram);
        Self { ram, base, size }
    }

    pub fn avail(&self) -> u64 {
        self.base + 0x1000
    }

    pub fn used(&self) -> u64 {
        self.base + 0x2000
    }

    pub fn write<T: ByteValued>(&self, at: u64, value: T) {
        self.ram.write_obj(value, GuestAddress(at)).unwrap();
    }

    pub fn read<T: ByteValued>(&self, at: u64) -> T {
        self.ram.read_obj(GuestAddress(at)).unwrap()
    }

    /// Writes a descriptor into the table at `table`.
    pub fn describe(&self, table: u64, slot: u16, (at, len): (u64, u32), flags: u16, next: u16) {
        let entry = table + u64::from(slot) * 16;
        self.write(entry, at);
        self.write(entry + 8, len);
        self.write(entry + 12, flags);
        self.write(entry + 14, next);
    }

    /// Writes a chain of (address, length, device writes it) from slot 0 on,
    /// and makes it available.
    pub fn post(&self, buffers: &[(u64, u32, bool)]) {
        for (slot, &(at, len, writable)) in (0..).zip(buffers) {
            let more = usize::from(slot) + 1 < buffers.len();
            let flags = (u16::from(more) * NEXT) | (u16::from(writable) * WRITE);
            self.describe(self.base, slot, (at, len), flags, slot + 1);
        }
        self.make_available(0);
    }

    pub fn make_available(&self, head: u16) {
        let index: u16 = self.read(self.avail() + 2);
        let slot = self.avail() + 4 + u64::from(index % self.size) * 2;
        self.write(slot, head);
        self.write(self.avail() + 2, index.wrapping_add(1));
    }

    /// The used index.
    pub fn done(&self) -> u16 {
        self.read(self.used() + 2)
    }

    /// Head and length of a used entry.
    pub fn used_entry(&self, index: u16) -> (u32, u32) {
        let [head, len] = self.read(self.used() + 4 + u64::from(index % self.size) * 8);
        (head, len)
    }

    /// The device side of the queue.
    pub fn queue(&self) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        let low = |address: u64| Some(u32::try_from(address).unwrap());
        queue.set_desc_table_address(low(self.base), Some(0));
        queue.set_avail_ring_address(low(self.avail()), Some(0));
        queue.set_used_ring_address(low(self.used()), Some(0));
        queue.set_ready(true);
        queue
    }
}
