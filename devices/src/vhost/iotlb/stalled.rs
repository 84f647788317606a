//! Places at which queues wait for a mapping.

use std::sync::Arc;

use iommu::{Access, Iova};
use vmm_sys_util::eventfd::EventFd;

use crate::vhost::shadow::Entry;

/// Upper bound on places at which queues wait for a mapping.
pub(super) const MAX_PENDING: usize = 64;
/// Upper bound on misses at one place before the kernel is made to forget them: it keeps
/// each of them until it is answered.
pub(super) const MAX_UNANSWERED: u32 = 256;

/// A miss without an answer.
pub(super) struct Pending {
    pub(super) iova: Iova,
    pub(super) access: Access,
    /// Misses that the kernel keeps for it; none for an access that it refused
    /// by itself.
    pub(super) unanswered: u32,
    /// Wakes the queue where the kernel does not do so itself.
    kick: Option<Arc<EventFd>>,
}

/// The places of one vhost file.
#[derive(Default)]
pub(super) struct Stalled(Vec<Pending>);

impl Stalled {
    /// Parks a queue at a place; `kick` wakes it where the kernel does not.
    /// Returns a place that is over the bounds, which is no longer kept.
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

    /// Takes every place.
    pub(super) fn take(&mut self) -> Vec<Pending> {
        std::mem::take(&mut self.0)
    }

    /// Drops the places in an entry that was sent, and wakes their queues.
    pub(super) fn wake(&mut self, entry: &Entry) {
        self.0.retain(|pending| {
            let over = entry.iova.contains(pending.iova);
            if let (true, Some(kick)) = (over, &pending.kick) {
                let _ = kick.write(1);
            }
            !over
        });
    }

    /// Whether a queue waits in an entry: the kernel would wake it, whatever
    /// access the entry permits.
    pub(super) fn waits_in(&self, entry: &Entry) -> bool {
        self.0
            .iter()
            .any(|pending| entry.iova.contains(pending.iova))
    }

    /// The first place in an entry at which a queue waits for an access that the
    /// entry permits.
    pub(super) fn first_in(&self, entry: &Entry) -> Option<Iova> {
        let waits = |p: &&Pending| entry.iova.contains(p.iova) && entry.perm.allows(p.access);
        self.0.iter().find(waits).map(|pending| pending.iova)
    }

    /// Address and access of each place.
    pub(super) fn places(&self) -> impl Iterator<Item = (Iova, Access)> + '_ {
        self.0.iter().map(|pending| (pending.iova, pending.access))
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}
