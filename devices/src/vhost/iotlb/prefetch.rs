//! Prefetching: sends the translations of the buffers that a queue accesses
//! next, before the kernel misses them.

use std::io;

use iommu::Iova;

use super::miss::{Recording, StreamTranslator};
use super::sender::{Ring, Running, Sender};
use super::stats::count;
use crate::queue::posted::{Buffer, Memory, Steps, posted};
use crate::vhost::shadow::Entry;

/// Upper bound on prefetched entries per miss, however large the IOTLB.
pub(super) const MAX_PREFETCH: usize = 256;
/// Lower limit of the upper bound on prefetched entries per miss.
const MIN_PREFETCH: usize = 16;

impl Sender {
    /// Sends the missing entries of the rings and available buffers of the
    /// queue that missed `iova`. `entry` is the answer to the miss, which the
    /// caller sends. A driver may add buffers at the same time, which the queue
    /// would miss next: this repeats until none is new, or no step is left.
    pub(super) fn prefetch(
        &self,
        translator: &StreamTranslator<'_>,
        iova: Iova,
        entry: Entry,
        steps: &Steps,
    ) -> io::Result<()> {
        let rings = self.table.lock().rings.clone();
        let memory = Memory::new(translator.inside, translator.ram);
        let missed = rings.iter().find_map(|(index, Running { ring, .. })| {
            let buffers = queue_buffers(&memory, ring, steps)?;
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
                self.missing_of(translator, buffer, &mut found, (Recording::Off, steps));
            }
            found.swap_remove(0);
            found.truncate(left);
            left -= found.len();
            if found.is_empty() {
                return Ok(());
            }
            let mut table = self.table.lock();
            for other in found {
                let new = self.push(&mut table, other, None)?;
                count(&self.counters.prefetched, usize::from(new));
            }
            drop(table);
            buffers = match queue_buffers(&memory, ring, steps) {
                Some(buffers) if left > 0 && !steps.is_over() => buffers,
                _ => return Ok(()),
            };
        }
    }

    /// Upper bound on prefetched entries for a miss of the queue `index`: twice
    /// the number of buffers that it used since its last miss. With a guest
    /// that flushes everything periodically, more would be dropped unused.
    fn depth(&self, index: u16, memory: &Memory<'_>, ring: &Ring) -> usize {
        let Ok(used) = memory.used(&ring.layout) else {
            return self.prefetch_limit();
        };
        let mut table = self.table.lock();
        let running = table.rings.get_mut(&index);
        let last = running.and_then(|running| running.used_at_miss.replace(used));
        let through = last.map_or(u16::MAX, |last| used.wrapping_sub(last));
        let twice = 2 * usize::from(through);
        twice.max(MIN_PREFETCH).min(self.prefetch_limit())
    }

    /// Adds to `found` the translations of a buffer that neither it nor the
    /// kernel has. Returns whether all of the buffer is translated. Each entry
    /// takes a step.
    pub(super) fn missing_of(
        &self,
        translator: &StreamTranslator<'_>,
        buffer: Buffer,
        found: &mut Vec<Entry>,
        (recording, steps): (Recording, &Steps),
    ) -> bool {
        let mut at = buffer.iova.first();
        while steps.spend() {
            let good = |entry: &Entry| entry.perm.allows(buffer.access);
            let known = found.iter().rev().find(|entry| entry.iova.contains(at));
            let known = known.copied().filter(good);
            let known = known.or_else(|| self.table.lock().shadow.holder(at).filter(good));
            let entry = known.or_else(|| {
                let entry = match recording {
                    Recording::On => translator.resolve(at, buffer.access),
                    Recording::Off => translator.resolve_quietly(at, buffer.access),
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

    /// Upper bound on prefetched entries per miss.
    fn prefetch_limit(&self) -> usize {
        MAX_PREFETCH.min(self.limit() / 4)
    }
}

/// The rings of a queue and its available buffers. `None` when they cannot be
/// read.
fn queue_buffers(memory: &Memory<'_>, ring: &Ring, steps: &Steps) -> Option<Vec<Buffer>> {
    let parts = ring.layout.parts().into_iter().flatten();
    Some(
        parts
            .chain(posted(memory, &ring.layout, steps).ok()?)
            .collect(),
    )
}
