//! Addresses at which queues wait for a mapping.

use std::sync::Arc;

use iommu::{Access, Iova};
use vmm_sys_util::eventfd::EventFd;

use crate::vhost::shadow::Entry;

/// Upper bound on addresses at which queues wait for a mapping.
pub(super) const MAX_PENDING: usize = 64;
/// Upper bound on pending misses at one address, after which the kernel is made
/// to drop them: it keeps each of them until an answer.
pub(super) const MAX_UNANSWERED: u32 = 256;

/// A miss without an answer.
pub(super) struct Pending {
    pub(super) iova: Iova,
    pub(super) access: Access,
    /// Number of misses that the kernel keeps for the address; 0 for an access
    /// that an entry of the kernel forbids.
    pub(super) unanswered: u32,
    /// Wakes the queue when no miss of it is pending in the kernel.
    kick: Option<Arc<EventFd>>,
}

/// The addresses at which queues of one vhost file wait.
#[derive(Default)]
pub(super) struct Stalled(Vec<Pending>);

impl Stalled {
    /// Parks a queue at an address; `kick` wakes it when the kernel does not.
    /// Returns a removed address when a bound is exceeded.
    pub(super) fn park(
        &mut self,
        iova: Iova,
        access: Access,
        kick: Option<Arc<EventFd>>,
    ) -> Option<Pending> {
        let missed = u32::from(kick.is_none());
        let known = (self.0.iter_mut())
            .find(|known| known.iova == iova && known.kick.is_some() == kick.is_some());
        match known {
            Some(known) => {
                known.access = access;
                known.unanswered += missed;
            }
            None => self.0.push(Pending {
                iova,
                access,
                unanswered: missed,
                kick,
            }),
        }
        let worst = (self.0.iter()).position(|known| known.unanswered > MAX_UNANSWERED);
        let worst = worst.or((self.0.len() > MAX_PENDING).then_some(0));
        worst.map(|index| self.0.remove(index))
    }

    /// Removes and returns every address.
    pub(super) fn take(&mut self) -> Vec<Pending> {
        std::mem::take(&mut self.0)
    }

    /// Removes the addresses in an entry that was sent, and wakes their queues.
    pub(super) fn wake(&mut self, entry: &Entry) {
        self.0.retain(|pending| {
            let over = entry.iova.contains(pending.iova);
            if let (true, Some(kick)) = (over, &pending.kick) {
                let _ = kick.write(1);
            }
            !over
        });
    }

    /// Whether a queue waits at an address of an entry: the kernel would wake
    /// it, regardless of the entry's permission.
    pub(super) fn waits_in(&self, entry: &Entry) -> bool {
        self.0
            .iter()
            .any(|pending| entry.iova.contains(pending.iova))
    }

    /// The first address in an entry at which a queue waits for an access that
    /// the entry permits.
    pub(super) fn first_in(&self, entry: &Entry) -> Option<Iova> {
        let waits = |p: &&Pending| entry.iova.contains(p.iova) && entry.perm.allows(p.access);
        self.0.iter().find(waits).map(|pending| pending.iova)
    }

    /// Address and access of each wait.
    pub(super) fn waits(&self) -> impl Iterator<Item = (Iova, Access)> + '_ {
        self.0.iter().map(|pending| (pending.iova, pending.access))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
