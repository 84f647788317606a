//! Interrupts: wired lines and message-signalled ones, as irqfds.
//!
//! Raising an interrupt is one write to an eventfd. The routing table, which
//! costs a system call and an RCU grace period, is set only when the address,
//! data or requester of a message changes.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use arch::layout::FIRST_MSI_GSI;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::native;
use super::{Error, Vm, failed};

/// `KVM_MAX_IRQ_ROUTES`: GSIs are below this.
const GSI_LIMIT: u32 = 4096;

/// A message-signalled interrupt as it reaches the interrupt controller: the
/// address is a guest physical one, after any translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    /// Doorbell address.
    pub address: u64,
    /// Data written.
    pub data: u32,
    /// Requester ID, which the ITS takes as DeviceID (aarch64).
    pub requester: u32,
}

/// The routing table. GSIs below [`FIRST_MSI_GSI`] are wired to the interrupt
/// controller's pins one to one; `None` is an allocated GSI without a message.
#[derive(Debug, Default)]
pub(super) struct Routes {
    messages: BTreeMap<u32, Option<Message>>,
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
    fn set(&mut self, gsi: u32, message: Option<Message>) -> bool {
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

fn signalled(gsi: u32, message: Message) -> kvm_irq_routing_entry {
    let [a, b, c, d, e, f, g, h] = message.address.to_le_bytes();
    let mut msi = kvm_irq_routing_msi {
        address_lo: u32::from_le_bytes([a, b, c, d]),
        address_hi: u32::from_le_bytes([e, f, g, h]),
        data: message.data,
        ..kvm_irq_routing_msi::default()
    };
    if native::MSI_FLAGS != 0 {
        msi.__bindgen_anon_1.devid = message.requester;
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

    /// A message-signalled interrupt without a message yet.
    ///
    /// # Errors
    /// All GSIs are in use, no eventfd is to be had or the kernel refuses it.
    pub fn msi(self: &Arc<Self>) -> Result<Msi, Error> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(failed("creating an eventfd"))?;
        let gsi = self
            .routes()
            .allocate()
            .ok_or(Error::NoRoute(GSI_LIMIT - FIRST_MSI_GSI))?;
        // From here on dropping gives the GSI back.
        let msi = Msi {
            vm: Arc::clone(self),
            gsi,
            event,
            attached: Mutex::new(false),
        };
        Ok(msi)
    }

    fn set_message(&self, gsi: u32, message: Option<Message>) -> Result<(), Error> {
        let mut routes = self.routes();
        if !routes.set(gsi, message) {
            return Ok(());
        }
        self.set_routing(&routes)
    }

    fn routes(&self) -> std::sync::MutexGuard<'_, Routes> {
        // The table is whole between any two of its operations.
        self.route_table()
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the kernel the whole table. The lock is held so that an older
    /// table never replaces a newer one.
    pub(super) fn set_routing(&self, routes: &Routes) -> Result<(), Error> {
        let table = KvmIrqRouting::from_entries(&routes.entries())
            .map_err(|error| failed("KVM_SET_GSI_ROUTING")(io::Error::other(error)))?;
        self.fd()
            .set_gsi_routing(&table)
            .map_err(failed("KVM_SET_GSI_ROUTING"))
    }
}

/// A wired interrupt.
#[derive(Debug)]
pub struct Line {
    event: EventFd,
}

impl Line {
    /// Raises it: one edge.
    ///
    /// # Errors
    /// Never in practice: the eventfd's counter is full, which means that an
    /// edge is pending anyway.
    pub fn raise(&self) -> io::Result<()> {
        self.event.write(1)
    }

    /// The eventfd behind it, for a device that raises interrupts itself.
    pub fn event(&self) -> &EventFd {
        &self.event
    }
}

/// A message-signalled interrupt. Gives back its GSI when dropped.
#[derive(Debug)]
pub struct Msi {
    vm: Arc<Vm>,
    gsi: u32,
    event: EventFd,
    /// Whether the kernel consumes the eventfd.
    attached: Mutex<bool>,
}

impl Msi {
    /// Sets what the interrupt writes and where; `None` masks it. While it is
    /// masked, what is signalled stays in the eventfd, unread: it is delivered
    /// when a message is set again.
    ///
    /// # Errors
    /// The kernel refuses the route.
    pub fn set(&self, message: Option<Message>) -> Result<(), Error> {
        let mut attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        let fd = self.vm.fd();
        match message {
            Some(_) => {
                self.vm.set_message(self.gsi, message)?;
                if !*attached {
                    fd.register_irqfd(&self.event, self.gsi)
                        .map_err(failed("KVM_IRQFD"))?;
                    *attached = true;
                }
            }
            None if *attached => {
                fd.unregister_irqfd(&self.event, self.gsi)
                    .map_err(failed("KVM_IRQFD"))?;
                *attached = false;
            }
            None => {}
        }
        Ok(())
    }

    /// Raises it, or leaves it pending while masked.
    ///
    /// # Errors
    /// Never in practice: the eventfd's counter is full, which means that the
    /// interrupt is pending anyway.
    pub fn raise(&self) -> io::Result<()> {
        self.event.write(1)
    }

    /// The eventfd to signal, for vhost or a device of the event loop.
    pub fn event(&self) -> &EventFd {
        &self.event
    }

    /// Takes back what was raised while masked; true if there was something.
    pub fn take_pending(&self) -> bool {
        let attached = self.attached.lock().unwrap_or_else(PoisonError::into_inner);
        !*attached && self.event.read().is_ok()
    }
}

impl Drop for Msi {
    fn drop(&mut self) {
        if let Err(error) = self.set(None) {
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

    const MESSAGE: Message = Message {
        address: 0x1_FEE0_1000,
        data: 0x4021,
        requester: 0x18,
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
        assert!(routes.set(gsi, Some(Message { data: 1, ..MESSAGE })));
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
