//! Guest RAM.

use std::fs::File;
use std::io;

use arch::Range;
use iommu::GuestRam;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap};

use super::error::Error;
use crate::config::MemBacking;

const HUGE_PAGE: u64 = 2 << 20;

/// Allocates zeroed RAM at `ranges`, in pages of the base size or, with `huge`,
/// of 2 MiB.
///
/// # Errors
/// The host has no such memory. With `huge`, also: a range is not a multiple of
/// 2 MiB, or not enough pages of 2 MiB are free.
pub(crate) fn allocate(
    ranges: &[Range],
    backing: MemBacking,
    huge: bool,
) -> Result<GuestRam, Error> {
    let bytes: u64 = ranges.iter().map(|range| range.size).sum();
    let mib = bytes >> 20;
    build(ranges, backing, huge, bytes).map_err(|source| {
        if huge {
            Error::HugePages { mib, source }
        } else {
            Error::Memory { mib, source }
        }
    })
}

fn build(ranges: &[Range], backing: MemBacking, huge: bool, bytes: u64) -> io::Result<GuestRam> {
    let odd = |range: &Range| !range.size.is_multiple_of(HUGE_PAGE);
    if huge && ranges.iter().any(odd) {
        return Err(io::Error::other("not a multiple of 2 MiB"));
    }
    let file = match backing {
        MemBacking::Anonymous => None,
        MemBacking::Memfd => Some(memfd(bytes, huge)?),
    };
    let mut offset = 0;
    let mut regions = Vec::with_capacity(ranges.len());
    for range in ranges {
        let size = usize::try_from(range.size).map_err(io::Error::other)?;
        let mut flags = match backing {
            MemBacking::Anonymous => libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            MemBacking::Memfd => libc::MAP_SHARED,
        };
        match (huge, backing) {
            // Missing pages must fail here, not as SIGBUS in the guest.
            (true, MemBacking::Anonymous) => flags |= libc::MAP_HUGETLB | libc::MAP_HUGE_2MB,
            (true, MemBacking::Memfd) => {}
            (false, _) => flags |= libc::MAP_NORESERVE,
        }
        let mut builder = MmapRegionBuilder::new_with_bitmap(size, ())
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(flags)
            .with_hugetlbfs(huge);
        if let Some(file) = &file {
            builder = builder.with_file_offset(FileOffset::new(file.try_clone()?, offset));
        }
        let mapping = builder.build().map_err(|error| match error {
            vm_memory::mmap::MmapRegionError::Mmap(source) => source,
            other => io::Error::other(other),
        })?;
        offset += range.size;
        let region = GuestRegionMmap::new(mapping, GuestAddress(range.base));
        regions.push(region.ok_or_else(|| io::Error::other("a range beyond 64 bits"))?);
    }
    GuestRam::from_regions(regions).map_err(io::Error::other)
}

fn memfd(bytes: u64, huge: bool) -> io::Result<File> {
    let mut flags = MemfdFlags::CLOEXEC;
    if huge {
        flags |= MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    }
    let file = File::from(memfd_create("portcullis-ram", flags)?);
    file.set_len(bytes)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::error::Chain;
    use vm_memory::{Bytes, GuestMemoryBackend, GuestMemoryRegion};

    const RANGES: [Range; 2] = [Range::new(0, 1 << 20), Range::new(4 << 30, 2 << 20)];

    #[test]
    fn memory_is_zeroed_and_at_its_ranges() {
        for backing in [MemBacking::Anonymous, MemBacking::Memfd] {
            let ram = allocate(&RANGES, backing, false).unwrap();
            assert_eq!(ram.num_regions(), 2);
            assert_eq!(ram.read_obj::<u64>(GuestAddress(4 << 30)).unwrap(), 0);
            ram.write_obj(7u64, GuestAddress((4 << 30) + (2 << 20) - 8))
                .unwrap();
            assert!(ram.write_obj(7u8, GuestAddress(1 << 20)).is_err());
        }
    }

    #[test]
    fn ranges_of_a_memfd_follow_one_another_in_the_file() {
        let ram = allocate(&RANGES, MemBacking::Memfd, false).unwrap();
        let offsets: Vec<u64> = ram
            .iter()
            .map(|region| region.file_offset().unwrap().start())
            .collect();
        assert_eq!(offsets, [0, 1 << 20]);
    }

    #[test]
    fn a_size_that_huge_pages_cannot_have_is_refused() {
        let odd = [Range::new(0, HUGE_PAGE + 4096)];
        for backing in [MemBacking::Anonymous, MemBacking::Memfd] {
            let error = allocate(&odd, backing, true).unwrap_err();
            let text = Chain(&error).to_string();
            assert_eq!(text.matches("not a multiple of 2 MiB").count(), 1, "{text}");
        }
    }

    #[test]
    fn more_huge_pages_than_there_are_is_an_error_with_a_hint() {
        let huge = [Range::new(0, 1 << 46)];
        for backing in [MemBacking::Anonymous, MemBacking::Memfd] {
            let error = allocate(&huge, backing, true).unwrap_err();
            let text = Chain(&error).to_string();
            assert!(text.contains("nr_hugepages"), "{text}");
            assert_eq!(text.matches("Cannot allocate memory").count(), 1, "{text}");
        }
    }
}
