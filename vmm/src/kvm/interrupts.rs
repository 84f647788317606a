//! Interrupts: wired lines and message-signalled ones, as irqfds.
//!
//! Raising an interrupt is one write to an eventfd. The routing table is set only
//! when the address, data or requester of a message changes.

use std::io;
use std::sync::Arc;

use devices::interrupt::{IrqLine, MsiAllocator, MsiMessage, MsiVector};
use iommu::lock::RankedMutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::error::{Error, failed};
use super::routes;
use super::vm::Vm;

impl Vm {
    /// A wired, edge-triggered interrupt. `gsi` is one of `arch::layout`'s.
    ///
    /// # Errors
    /// No eventfd is available, or the kernel refuses it.
    pub(crate) fn line(&self, gsi: u32) -> Result<Line, Error> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(failed("creating an eventfd"))?;
        self.fd()
            .register_irqfd(&event, gsi)
            .map_err(failed("KVM_IRQFD"))?;
        Ok(Line { event })
    }

    /// Returns the allocator of message-signalled interrupts.
    pub(crate) fn msi_allocator(self: &Arc<Self>) -> Arc<dyn MsiAllocator> {
        Arc::new(Sink(Arc::clone(self)))
    }

    fn set_message(&self, gsi: u32, message: Option<MsiMessage>) -> io::Result<()> {
        let mut routes = self.route_table().lock();
        if !routes.set(gsi, message) {
            return Ok(());
        }
        // The lock is held, so that an older table never replaces a newer one.
        let installed = routes::install(self.fd(), &routes);
        if installed.is_err() {
            // The kernel refuses the whole table: the messages of other
            // vectors must not fail with this one.
            routes.set(gsi, None);
        }
        installed
    }
}

/// A wired interrupt. Every one is edge-triggered, so that it is an irqfd: one system call for each
/// edge.
#[derive(Debug)]
pub(crate) struct Line {
    event: EventFd,
}

impl IrqLine for Line {
    fn set(&self, high: bool) {
        if high && let Err(error) = self.event.write(1) {
            // The counter is full: an edge is pending anyway.
            log::debug!("raising an interrupt line: {error}");
        }
    }
}

struct Sink(Arc<Vm>);

impl MsiAllocator for Sink {
    fn vector(&self) -> io::Result<Arc<dyn MsiVector>> {
        let event = EventFd::new(EFD_NONBLOCK)?;
        let gsi = self.0.route_table().lock().allocate();
        let gsi = gsi.ok_or_else(|| io::Error::other("all interrupt routes are in use"))?;
        let vm = Arc::clone(&self.0);
        Ok(Arc::new(Vector {
            vm,
            gsi,
            event,
            attached: RankedMutex::new(false),
        }))
    }
}

/// A message-signalled interrupt. Frees its GSI when dropped.
struct Vector {
    vm: Arc<Vm>,
    gsi: u32,
    event: EventFd,
    /// Whether the kernel consumes the eventfd. Locked before the routing table.
    attached: RankedMutex<bool, 11>,
}

impl Vector {
    /// Detaches the eventfd from the kernel, which has then delivered every event that it consumed.
    fn detach(&self, attached: &mut bool) -> io::Result<()> {
        if *attached {
            self.vm.fd().unregister_irqfd(&self.event, self.gsi)?;
            *attached = false;
        }
        Ok(())
    }
}

impl MsiVector for Vector {
    fn eventfd(&self) -> &EventFd {
        &self.event
    }

    fn route(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut attached = self.attached.lock();
        match message {
            Some(_) => {
                let installed = self.vm.set_message(self.gsi, message);
                if installed.is_err() {
                    // No event may go to the old message.
                    self.detach(&mut attached)?;
                }
                installed?;
                if !*attached {
                    self.vm.fd().register_irqfd(&self.event, self.gsi)?;
                    *attached = true;
                }
                Ok(())
            }
            None => self.detach(&mut attached),
        }
    }

    fn pending(&self) -> bool {
        let attached = self.attached.lock();
        // Only this function reads the counter while it is not attached, so that it can read the
        // counter and write it back.
        !*attached
            && match self.event.read() {
                Ok(count) => self.event.write(count).is_ok(),
                Err(_) => false,
            }
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        if let Err(error) = self.route(None) {
            log::warn!("interrupt route {}: {error}", self.gsi);
        }
        // The kernel drops the entry with the next change of the table; no irqfd uses it any more.
        self.vm.route_table().lock().free(self.gsi);
    }
}
