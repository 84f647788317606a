//! KVM's interrupt routing table. Setting it costs a system call and an RCU
//! grace period.

use std::collections::BTreeMap;
use std::io;

use arch::layout::FIRST_MSI_GSI;
use devices::interrupt::MsiMessage;
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KvmIrqRouting, kvm_irq_routing_entry,
    kvm_irq_routing_irqchip, kvm_irq_routing_msi,
};
use kvm_ioctls::VmFd;

use super::native;

/// `KVM_MAX_IRQ_ROUTES`: upper bound on GSIs, exclusive.
const GSI_LIMIT: u32 = 4096;

/// The routing table. GSIs below [`FIRST_MSI_GSI`] are wired to the interrupt
/// controller's pins one to one; `None` is an allocated GSI without a message.
#[derive(Debug, Default)]
pub(super) struct Routes {
    messages: BTreeMap<u32, Option<MsiMessage>>,
}

impl Routes {
    pub(super) fn allocate(&mut self) -> Option<u32> {
        let gsi = (FIRST_MSI_GSI..GSI_LIMIT).find(|gsi| !self.messages.contains_key(gsi))?;
        self.messages.insert(gsi, None);
        Some(gsi)
    }

    pub(super) fn free(&mut self, gsi: u32) {
        self.messages.remove(&gsi);
    }

    /// Returns whether the kernel's table must change.
    pub(super) fn set(&mut self, gsi: u32, message: Option<MsiMessage>) -> bool {
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

/// Sets the kernel's whole table.
///
/// # Errors
/// The kernel refuses the table.
pub(super) fn install(vm: &VmFd, routes: &Routes) -> io::Result<()> {
    let table = KvmIrqRouting::from_entries(&routes.entries()).map_err(io::Error::other)?;
    Ok(vm.set_gsi_routing(&table)?)
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
