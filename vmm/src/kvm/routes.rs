//! Interrupts: wired lines and message-signalled ones, as irqfds.
//!
//! Raising an interrupt is one write to an eventfd. The routing table, which
//! costs a system call and an RCU grace period, is set only when the address,
//! data or requester of a message changes.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use arch::layout::FIRST_MSI_GSI;
use devices::interrupt::{IrqLine, MsiAllocator, MsiMessage, MsiVector};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::native;
use super::{Error, Vm, failed};

/// `KVM_MAX_IRQ_ROUTES`: GSIs are below this.
const GSI_LIMIT: u32 = 4096;

/// The routing table. GSIs below [`FIRST_MSI_GSI`] are wired to the interrupt
/// controller's pins one to one; `None` is an allocated GSI without a message.
#[derive(Debug, Default)]
pub(super) struct Routes {
    messages: BTreeMap<u32, Option<MsiMessage>>,
}

impl Routes {
    fn allocate(&mut self) -> Option<u32> {
        let gsi = (FIRST_MSI_GSI..GSI_LIMIT).find(|gsi| !self.messages.contains_key(gsi))?;
        self.messages.insert(gsi, None);
        Some(gsi)
    }

    fn free(&mut self, gsi: u32) {
        self.messages.remove(&gsi);
    }

    /// Returns whether the kernel must be told.
    fn set(&mut self, gsi: u32, message: Option<MsiMessage>) -> bool {
        match self.messages.insert(gsi, message) {
            Some(old) => old != message,
            None => message.is_some(),
        }
    }

    fn entries(&self) -> Vec<kvm_irq_routing_entry> {
        let mut entries: Vec<_> = (0..FIRST_MSI_GSI).map(wired).collect();
        let set = self
            .messages
            .iter()
            .filter_map(|(&gsi, message)| Some((gsi, (*message)?)));
        entries.extend(set.map(|(gsi, message)| signalled(gsi, message)));
        entries
    }
}

fn wired(gsi: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..kvm_irq_routing_entry::default()
    };
    entry.u.irqchip = kvm_irq_routing_irqchip {
        irqchip: native::IRQCHIP,
        pin: gsi,
    };
    entry
}

fn signalled(gsi: u32, message: MsiMessage) -> kvm_irq_routing_entry {
    let [a, b, c, d, e, f, g, h] = message.address.0.to_le_bytes();
    let mut msi = kvm_irq_routing_msi {
        address_lo: u32::from_le_bytes([a, b, c, d]),
        address_hi: u32::from_le_bytes([e, f, g, h]),
        data: message.data,
        ..kvm_irq_routing_msi::default()
    };
    if native::MSI_FLAGS != 0 {
        msi.__bindgen_anon_1.devid = message.requester.0;
    }
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_MSI,
        flags: native::MSI_FLAGS,
        ..kvm_irq_routing_entry::default()
    };
    entry.u.msi = msi;
    entry
}

impl Vm {
    /// A wired, edge-triggered interrupt. `gsi` is one of `arch::layout`'s.
    ///
    /// # Errors
    /// No eventfd is to be had or the kernel refuses it.
    pub fn line(&self, gsi: u32) -> Result<Line, Error> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(failed("creating an eventfd"))?;
        self.fd()
            .register_irqfd(&event, gsi)
            .map_err(failed("KVM_IRQFD"))?;
        Ok(Line { event })
    }

    /// Gives out message-signalled interrupts.
    pub fn msi_allocator(self: &Arc<Self>) -> Arc<dyn MsiAllocator> {
        Arc::new(Sink(Arc::clone(self)))
    }

    fn set_message(&self, gsi: u32, message: Option<MsiMessage>) -> io::Result<()> {
        let mut routes = self.routes();
        if !routes.set(gsi, message) {
            return Ok(());
        }
        let told = self.set_routing(&routes);
        if told.is_err() {
            // The kernel refuses the whole table: the messages of other
            // vectors must not fail with this one.
            routes.set(gsi, None);
        }
        told
    }

    fn routes(&self) -> MutexGuard<'_, Routes> {
        // The table is whole between any two of its operations.
        self.route_table()
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the kernel the whole table. The lock is held so that an older
    /// table never replaces a newer one.
    pub(super) fn set_routing(&self, routes: &Routes) -> io::Result<()> {
        let table = KvmIrqRouting::from_entries(&routes.entries()).map_err(io::Error::other)?;
        Ok(self.fd().set_gsi_routing(&table)?)
    }
}

/// A wired interrupt. All of them are edge-triggered, so it is an irqfd: one
/// system call an edge.
#[derive(Debug)]
pub struct Line {
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
        let gsi = self.0.routes().allocate();
        let gsi = gsi.ok_or_else(|| io::Error::other("all interrupt routes are in use"))?;
        let vm = Arc::clone(&self.0);
        Ok(Arc::new(Vector {
            vm,
            gsi,
            event,
            attached: Mutex::new(false),
        }))
    }
}

/// A message-signalled interrupt. Gives back its GSI when dropped.
struct Vector {
    vm: Arc<Vm>,
    gsi: u32,
    event: EventFd,
    /// Whether the kernel consumes the eventfd. Taken before the table's lock.
    attached: Mutex<bool>,
}

impl Vector {
    fn attached(&self) -> MutexGuard<'_, bool> {
        self.attached.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the eventfd away from the kernel, which has delivered what it had
    /// consumed when this returns.
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
        let mut attached = self.attached();
        match message {
            Some(_) => {
                let told = self.vm.set_message(self.gsi, message);
                if told.is_err() {
                    // Nothing may go to the message from before.
                    self.detach(&mut attached)?;
                }
                told?;
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
        let attached = self.attached();
        // Nobody else reads the counter while it is not attached, so it may be
        // taken and put back.
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
        // The kernel forgets the entry with the next change of the table; no
        // irqfd uses it any more.
        self.vm.routes().free(self.gsi);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use iommu::{Gpa, StreamId};

    const MESSAGE: MsiMessage = MsiMessage {
        address: Gpa(0x1_FEE0_1000),
        data: 0x4021,
        requester: StreamId(0x18),
    };

    #[test]
    fn gsis_are_given_out_once_and_come_back() {
        let mut routes = Routes::default();
        let first = routes.allocate().unwrap();
        let second = routes.allocate().unwrap();
        assert_eq!((first, second), (FIRST_MSI_GSI, FIRST_MSI_GSI + 1));
        routes.free(first);
        assert_eq!(routes.allocate(), Some(first));
        let rest = std::iter::from_fn(|| routes.allocate()).count();
        assert_eq!(u32::try_from(rest).unwrap(), GSI_LIMIT - FIRST_MSI_GSI - 2);
    }

    #[test]
    fn only_a_change_of_the_message_changes_the_table() {
        let mut routes = Routes::default();
        let gsi = routes.allocate().unwrap();
        assert!(!routes.set(gsi, None));
        assert!(routes.set(gsi, Some(MESSAGE)));
        assert!(!routes.set(gsi, Some(MESSAGE)));
        assert!(routes.set(gsi, Some(MsiMessage { data: 1, ..MESSAGE })));
    }

    #[test]
    fn the_table_has_every_wired_pin_and_the_messages_set() {
        let mut routes = Routes::default();
        let gsi = routes.allocate().unwrap();
        routes.allocate().unwrap();
        routes.set(gsi, Some(MESSAGE));
        let entries = routes.entries();
        assert_eq!(u32::try_from(entries.len()).unwrap(), FIRST_MSI_GSI + 1);
        assert!(
            entries
                .iter()
                .zip(0..FIRST_MSI_GSI)
                .all(|(entry, gsi)| entry.gsi == gsi)
        );
        let last = entries.last().unwrap();
        assert_eq!((last.gsi, last.type_), (gsi, KVM_IRQ_ROUTING_MSI));
    }
}
