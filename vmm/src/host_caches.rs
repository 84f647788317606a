//! The caches of the host's first processor, from sysfs
//! (Linux `Documentation/ABI/testing/sysfs-devices-system-cpu`).

use std::fs::File;
use std::io::Read;
use std::path::Path;

use arch::{Cache, CacheKind};

/// Contains a directory `index0`, `index1`, … for each cache.
#[cfg(target_arch = "aarch64")]
pub(crate) const SYSFS: &str = "/sys/devices/system/cpu/cpu0/cache";

/// Upper bound on the directories that are read.
const MAX_CACHES: usize = 16;
/// Upper bound on the bytes that are read of a file.
const MAX_TEXT: u64 = 4096;

/// Reads the caches below `directory`. Fields that the host does not describe
/// are zero; a cache without level or type is left out.
pub(crate) fn read(directory: &Path) -> Vec<Cache> {
    let indices = (0..MAX_CACHES).map(|index| directory.join(format!("index{index}")));
    indices.filter_map(|index| read_one(&index)).collect()
}

fn read_one(index: &Path) -> Option<Cache> {
    let text = |name: &str| {
        let file = File::open(index.join(name)).ok()?;
        let mut text = String::new();
        file.take(MAX_TEXT).read_to_string(&mut text).ok()?;
        Some(text.trim().to_owned())
    };
    let number = |name: &str| text(name)?.parse().ok();
    let kind = match text("type")?.as_str() {
        "Data" => CacheKind::Data,
        "Instruction" => CacheKind::Instruction,
        "Unified" => CacheKind::Unified,
        _ => return None,
    };
    Some(Cache {
        level: text("level")?.parse().ok()?,
        kind,
        size: text("size").and_then(|size| bytes(&size)).unwrap_or(0),
        line_size: number("coherency_line_size").unwrap_or(0),
        sets: number("number_of_sets").unwrap_or(0),
        shared_by: text("shared_cpu_list").map_or(1, |list| count(&list)),
    })
}

/// Converts a size such as `32K` to bytes.
fn bytes(size: &str) -> Option<u32> {
    size.strip_suffix('K')?
        .parse::<u32>()
        .ok()?
        .checked_mul(1 << 10)
}

/// Number of processors in a list such as `0-3,8`; at least one.
fn count(list: &str) -> u32 {
    let ranges = list.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last): (u32, u32) = (first.parse().ok()?, last.parse().ok()?);
        last.checked_sub(first)?.checked_add(1)
    });
    ranges.fold(0, u32::saturating_add).max(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(bytes("32K"), Some(32 << 10));
        assert_eq!(bytes("32768K"), Some(32 << 20));
        for odd in ["", "K", "32", "32M", "-1K", "4194304K"] {
            assert_eq!(bytes(odd), None, "{odd}");
        }
        for (list, cpus) in [("0", 1), ("0-3", 4), ("0-3,8", 5), ("", 1), ("5-2,x", 1)] {
            assert_eq!(count(list), cpus, "{list}");
        }
        assert_eq!(count("0-4294967295,0-4294967295"), 1);
    }

    #[test]
    fn caches_are_read_from_a_directory_of_the_kernels_form() {
        let name = format!("portcullis-caches-{}", std::process::id());
        let root = std::env::temp_dir().join(name);
        let write = |index: &str, files: &[(&str, &str)]| {
            let directory = root.join(index);
            std::fs::create_dir_all(&directory).unwrap();
            for (name, value) in files {
                std::fs::write(directory.join(name), format!("{value}\n")).unwrap();
            }
        };
        write(
            "index0",
            &[("level", "1"), ("type", "Data"), ("size", "48K")],
        );
        write("index1", &[("type", "Instruction")]);
        let unified = [
            ("level", "2"),
            ("type", "Unified"),
            ("size", "512K"),
            ("coherency_line_size", "64"),
            ("number_of_sets", "1024"),
            ("shared_cpu_list", "0-1"),
        ];
        write("index2", &unified);
        let caches = read(&root);
        std::fs::remove_dir_all(&root).unwrap();
        let [data, unified] = caches[..] else {
            panic!("{caches:?}");
        };
        let (level, kind) = (data.level, data.kind);
        assert_eq!((level, kind, data.size), (1, CacheKind::Data, 48 << 10));
        assert_eq!((data.sets, data.shared_by), (0, 1));
        let expected = Cache {
            level: 2,
            kind: CacheKind::Unified,
            size: 512 << 10,
            line_size: 64,
            sets: 1024,
            shared_by: 2,
        };
        assert_eq!(unified, expected);
        assert_eq!(read(&root), []);
    }
}
