//! Translations that the kernel is sent before it misses them: what a queue
//! that missed one place is about to access.

use iommu::{Access, GuestRam, Hva, Iova, IovaRange, Mapping, Translating};
use std::io;
use vm_memory::{GuestMemoryBackend as _, GuestMemoryRegion as _, MemoryRegionAddress};

use super::{MAX_PREFETCH, MIN_PREFETCH, Ring, Running, VhostIotlb, count};
use crate::queue::posted::{Buffer, Memory, Steps, posted};
use crate::vhost::shadow::Entry;

/// Whether a fault may be recorded by the model.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Trace {
    Left,
    None,
}

/// The stream's translation while its gate is held.
pub(super) struct World<'a> {
    pub(super) inside: &'a Translating<'a>,
    pub(super) ram: &'a GuestRam,
    pub(super) ats: bool,
}

impl World<'_> {
    /// Translates as the device: what faults is the model's event.
    pub(super) fn resolve(&self, iova: Iova, access: Access) -> Option<Entry> {
        let answer = if self.ats {
            self.inside.request_ats(iova, access)
        } else {
            self.inside.translate(iova, access)
        };
        let mapping = answer.ok().filter(|mapping| mapping.perm.allows(access))?;
        pieces(self.ram, &mapping).find(|piece| piece.iova.contains(iova))
    }

    /// Translates if it is certain to succeed.
    pub(super) fn resolve_quietly(&self, iova: Iova, access: Access) -> Option<Entry> {
        self.inside.lookup(iova, access).ok()?;
        self.resolve(iova, access)
    }
}

/// A mapping as entries, each of which is one piece of this process's memory.
/// What is not RAM is left out.
pub(super) fn pieces<'a>(
    ram: &'a GuestRam,
    mapping: &'a Mapping,
) -> impl Iterator<Item = Entry> + 'a {
    ram.iter().filter_map(|block| {
        let start = block.start_addr().0;
        let below = mapping.gpa.0;
        let first = start.max(below);
        let last = (start + (block.len() - 1)).min(below.checked_add(mapping.iova.extent())?);
        let extent = last.checked_sub(first)?;
        let iova = mapping.iova.first().checked_add(first - below)?;
        let host = block.get_host_address(MemoryRegionAddress(first - start));
        Some(Entry {
            iova: IovaRange::new(iova, iova.checked_add(extent)?).ok()?,
            hva: Hva(host.ok()?.addr() as u64),
            perm: mapping.perm,
        })
    })
}

impl VhostIotlb {
    /// Sends what the kernel does not hold of the queue that missed `iova`: its
    /// rings and the buffers posted on it. `entry` is known already. A driver
    /// may be posting more at the same time, which the queue would miss next:
    /// it is looked at again until there is nothing new, or no step is left.
    pub(super) fn prefetch(
        &self,
        world: &World<'_>,
        iova: Iova,
        entry: Entry,
        steps: &Steps,
    ) -> io::Result<()> {
        let rings = self.table().rings.clone();
        let memory = Memory::new(world.inside, world.ram);
        let missed = rings.iter().find_map(|(index, Running { ring, .. })| {
            let buffers = wanted(&memory, ring, steps)?;
            let mut all = buffers.iter();
            all.any(|buffer| buffer.iova.contains(iova))
                .then_some((*index, ring, buffers))
        });
        let Some((index, ring, mut buffers)) = missed else {
            return Ok(());
        };
        let mut left = self.depth(index, &memory, ring);
        loop {
            let mut found = vec![entry];
            for buffer in buffers {
                if found.len() > left || steps.is_over() {
                    break;
                }
                self.missing_of(world, buffer, &mut found, (Trace::None, steps));
            }
            found.swap_remove(0);
            found.truncate(left);
            left -= found.len();
            if found.is_empty() {
                return Ok(());
            }
            let mut table = self.table();
            for other in found {
                let new = self.push(&mut table, other, None)?;
                count(&self.counters.prefetched, usize::from(new));
            }
            drop(table);
            buffers = match wanted(&memory, ring, steps) {
                Some(buffers) if left > 0 && !steps.is_over() => buffers,
                _ => return Ok(()),
            };
        }
    }

    /// How many translations a miss of the queue `index` brings with it: twice
    /// what the queue got through since its last miss. More than that was sent
    /// for nothing, where the guest flushes everything now and then.
    fn depth(&self, index: u16, memory: &Memory<'_>, ring: &Ring) -> usize {
        let Ok(used) = memory.used(&ring.layout) else {
            return self.prefetch_limit();
        };
        let mut table = self.table();
        let running = table.rings.get_mut(&index);
        let last = running.and_then(|running| running.used_at_miss.replace(used));
        let through = last.map_or(u16::MAX, |last| used.wrapping_sub(last));
        let twice = 2 * usize::from(through);
        twice.max(MIN_PREFETCH).min(self.prefetch_limit())
    }

    /// Adds to `found` the translations of a buffer that neither it nor the
    /// kernel has. Returns whether all of the buffer is translated, as far as
    /// the steps go: one for each entry.
    pub(super) fn missing_of(
        &self,
        world: &World<'_>,
        buffer: Buffer,
        found: &mut Vec<Entry>,
        (trace, steps): (Trace, &Steps),
    ) -> bool {
        let mut at = buffer.iova.first();
        while steps.spend() {
            let good = |entry: &Entry| entry.perm.allows(buffer.access);
            let known = found.iter().rev().find(|entry| entry.iova.contains(at));
            let known = known.copied().filter(good);
            let known = known.or_else(|| self.table().shadow.holder(at).filter(good));
            let entry = known.or_else(|| {
                let entry = match trace {
                    Trace::Left => world.resolve(at, buffer.access),
                    Trace::None => world.resolve_quietly(at, buffer.access),
                };
                found.extend(entry);
                entry
            });
            let Some(entry) = entry else {
                return false;
            };
            match entry.iova.last().checked_add(1) {
                Some(next) if next <= buffer.iova.last() => at = next,
                _ => return true,
            }
            if found.len() > MAX_PREFETCH {
                return false;
            }
        }
        false
    }

    /// Most translations that one miss brings with it.
    fn prefetch_limit(&self) -> usize {
        MAX_PREFETCH.min(self.limit() / 4)
    }
}

/// What a queue accesses: its rings and the buffers posted on it. `None` when
/// they cannot be read.
fn wanted(memory: &Memory<'_>, ring: &Ring, steps: &Steps) -> Option<Vec<Buffer>> {
    let parts = ring.layout.parts().into_iter().flatten();
    Some(
        parts
            .chain(posted(memory, &ring.layout, steps).ok()?)
            .collect(),
    )
}
