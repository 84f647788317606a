//! The caches that the device tree describes to Linux, which otherwise warns
//! "Unable to detect cache hierarchy" (`drivers/base/cacheinfo.c`).
//!
//! The guest reads the levels from its CLIDR_EL1, which KVM synthesizes since Linux 6.3, and
//! expects a node for each of them. Sizes come from the host.

use vm_fdt::FdtWriter;

use crate::Error;
use crate::aarch64::layout;
use crate::platform::{Cache, CacheKind};

/// KVM register ID of CLIDR_EL1 (op0 3, op1 1, CRn 0, CRm 0, op2 1).
pub const CLIDR_EL1: u64 = 0x6030_0000_0013_0000 | 3 << 14 | 1 << 11 | 1;

/// Number of levels in CLIDR_EL1 (Arm ARM D24.2.28).
const LEVELS: u8 = 7;
/// First phandle of cache nodes; each level has [`layout::MAX_CPUS`] of them.
const PHANDLES: u32 = 0x100;

/// Returns the caches of `clidr` and, on further levels, those of the `host`, by ascending level up
/// to the first that neither has. The kinds of a `clidr` level are as it says: Linux 6.1 counts
/// caches in the device tree and fills them in from CLIDR_EL1. The host has the sizes; a unified
/// cache has those of a data cache.
pub fn merge(clidr: u64, host: &[Cache]) -> Vec<Cache> {
    use CacheKind::{Data, Instruction, Unified};
    let mut merged = Vec::new();
    for level in 1..=LEVELS {
        let of_host = |kind| {
            let mut caches = host.iter().filter(|cache| cache.level == level);
            caches.find(|cache| cache.kind == kind).copied()
        };
        let sized = |&kind: &CacheKind| {
            let known = of_host(kind).or_else(|| of_host(Data).filter(|_| kind == Unified));
            let unknown = Cache {
                level,
                kind,
                size: 0,
                line_size: 0,
                sets: 0,
                shared_by: 1,
            };
            known.map_or(unknown, |cache| Cache { kind, ..cache })
        };
        let ctype = (clidr >> (3 * (level - 1))) & 7;
        let of_guest: &[CacheKind] = match ctype {
            1 => &[Instruction],
            2 => &[Data],
            3 => &[Data, Instruction],
            4 => &[Unified],
            _ => &[],
        };
        let known = merged.len();
        merged.extend(of_guest.iter().map(sized));
        if of_guest.is_empty() {
            merged.extend(host.iter().filter(|cache| cache.level == level));
        }
        if merged.len() == known {
            break;
        }
    }
    merged
}

/// Writes the caches of `cpu`'s node: the properties of level 1, a reference to level 2, and the
/// nodes of those that `cpu` is the first to share (Devicetree Specification §3.8.1, §3.9).
pub(super) fn of_cpu(fdt: &mut FdtWriter, caches: &[Cache], cpu: u32) -> Result<(), Error> {
    properties(fdt, caches, 1, cpu)?;
    for level in 2..=LEVELS {
        let Some(shared_by) = shared_by(caches, level) else {
            break;
        };
        if !cpu.is_multiple_of(shared_by) {
            continue;
        }
        let node = fdt.begin_node(&format!("l{level}-cache"))?;
        fdt.property_string("compatible", "cache")?;
        fdt.property_u32("cache-level", u32::from(level))?;
        fdt.property_phandle(phandle(level, cpu / shared_by))?;
        properties(fdt, caches, level, cpu)?;
        fdt.end_node(node)?;
    }
    Ok(())
}

/// Number of vCPUs that share a cache of `level`; `None` if there is none.
fn shared_by(caches: &[Cache], level: u8) -> Option<u32> {
    let cache = caches.iter().find(|cache| cache.level == level)?;
    Some(cache.shared_by.clamp(1, layout::MAX_CPUS))
}

fn phandle(level: u8, group: u32) -> u32 {
    PHANDLES + u32::from(level) * layout::MAX_CPUS + group
}

fn properties(fdt: &mut FdtWriter, caches: &[Cache], level: u8, cpu: u32) -> Result<(), Error> {
    for cache in caches.iter().filter(|cache| cache.level == level) {
        let prefix = match cache.kind {
            CacheKind::Data => "d-",
            CacheKind::Instruction => "i-",
            CacheKind::Unified => "",
        };
        if cache.kind == CacheKind::Unified {
            fdt.property_null("cache-unified")?;
        }
        // Linux reads a size of zero as unknown, but requires the property.
        fdt.property_u32(&format!("{prefix}cache-size"), cache.size)?;
        for (name, value) in [
            ("cache-line-size", cache.line_size),
            ("cache-sets", cache.sets),
        ] {
            if value != 0 {
                fdt.property_u32(&format!("{prefix}{name}"), value)?;
            }
        }
    }
    if let Some(shared_by) = shared_by(caches, level + 1) {
        fdt.property_u32("next-level-cache", phandle(level + 1, cpu / shared_by))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(level: u8, kind: CacheKind, size: u32) -> Cache {
        Cache {
            level,
            kind,
            size,
            line_size: 64,
            sets: 1,
            shared_by: 1,
        }
    }

    fn summary(caches: &[Cache]) -> Vec<(u8, CacheKind, u32)> {
        let caches = caches.iter();
        caches
            .map(|cache| (cache.level, cache.kind, cache.size))
            .collect()
    }

    #[test]
    fn levels_are_those_of_the_guest_and_of_the_host() {
        use CacheKind::{Data, Instruction, Unified};
        let host = [
            cache(1, Data, 1),
            cache(1, Instruction, 2),
            cache(2, Unified, 3),
        ];
        let clidr = |levels: &[u64]| {
            let levels = levels.iter().enumerate();
            levels.fold(0, |clidr, (at, ctype)| clidr | ctype << (3 * at))
        };
        let of_host = [(1, Data, 1), (1, Instruction, 2), (2, Unified, 3)];
        assert_eq!(summary(&merge(clidr(&[3]), &host)), of_host);
        assert_eq!(summary(&merge(0, &host)), of_host);
        // KVM's CLIDR_EL1 where the host has IDC and DIC.
        let merged = merge(clidr(&[4]), &host);
        assert_eq!(summary(&merged), [(1, Unified, 1), (2, Unified, 3)]);
        let merged = merge(clidr(&[3, 4, 4]), &host);
        assert_eq!(summary(&merged)[..3], of_host);
        assert_eq!(summary(&merged)[3..], [(3, Unified, 0)]);
        let unknown = [(1, Data, 0), (1, Instruction, 0), (2, Unified, 0)];
        assert_eq!(summary(&merge(clidr(&[3, 4]), &[])), unknown);
        assert_eq!(
            summary(&merge(clidr(&[1]) | 0xFF << 40, &[])),
            [(1, Instruction, 0)]
        );
        // A missing level ends the chain.
        assert_eq!(merge(clidr(&[0, 4]), &host[2..]), []);
    }

    #[test]
    fn the_register_id_is_that_of_the_kernel_headers() {
        assert_eq!(CLIDR_EL1, 0x6030_0000_0013_C801);
    }
}
