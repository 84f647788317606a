//! Loads an uncompressed `vmlinux` (System V gABI, chapter 5; ELF-64) that
//! starts by PVH.
//!
//! The headers are copied from the file once and checked as a whole before
//! anything is loaded. So a file cannot cause more work than guest memory is
//! large, with any headers, and also when it changes while it is read.

use std::io::{Read, Seek};

use vm_memory::GuestMemoryBackend;

use super::image::{Image, ImageEntry, PAGE};
use crate::kernel::{self, Error, KernelFile, Probe, u16_at, u32_at, u64_at};
use crate::x86_64::layout;

/// Length of the file header.
const EHDR: u64 = 64;
/// Length of a program header.
const PHDR: u16 = 56;
/// Upper bound on program headers; a vmlinux has five.
const MAX_PHDRS: u16 = 64;
/// Upper bound on the bytes of a note segment; a vmlinux has some 500.
const MAX_NOTES: u64 = 64 << 10;

const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY` (xen `elfnote.h`).
const PHYS32_ENTRY: u32 = 18;

/// A program header.
#[derive(Debug, Clone, Copy)]
struct Phdr {
    kind: u32,
    offset: u64,
    paddr: u64,
    filesz: u64,
    memsz: u64,
}

impl Phdr {
    /// Reads the [`PHDR`] bytes of a program header; missing ones are zero.
    fn of(bytes: &[u8]) -> Self {
        let word = |at| u64_at(bytes, at).unwrap_or(0);
        Self {
            kind: u32_at(bytes, 0).unwrap_or(0),
            offset: word(8),
            paddr: word(24),
            filesz: word(32),
            memsz: word(40),
        }
    }

    /// End in memory (exclusive); the highest address if it overflows.
    fn end(&self) -> u64 {
        self.paddr.saturating_add(self.memsz)
    }
}

pub(super) fn load<M: GuestMemoryBackend, K: KernelFile>(
    memory: &M,
    file: &mut K,
    probe: &Probe,
    low_end: u64,
) -> Result<Image, Error> {
    let headers = program_headers(file, probe)?;
    let segments = loadable(&headers, low_end)?;
    let entry = pvh_entry(file, probe.size, &headers)?;
    let entry = u64::from(entry.ok_or_else(|| {
        unsupported("the vmlinux has no PVH entry (CONFIG_PVH); use its bzImage")
    })?);
    let mut within = segments.iter();
    if !within.any(|segment| (segment.paddr..segment.end()).contains(&entry)) {
        return Err(unsupported(format!(
            "the PVH entry {entry:#x} is in no segment"
        )));
    }
    for segment in &segments {
        kernel::copy(memory, file, segment.offset, segment.paddr, segment.filesz)?;
    }
    let end = segments.last().map_or(layout::HIMEM, Phdr::end);
    Ok(Image {
        end: end.next_multiple_of(PAGE),
        initrd_limit: layout::HOLE.base,
        cmdline_max: layout::MAX_CMDLINE,
        entry: ImageEntry::Pvh(entry),
    })
}

fn unsupported(why: impl Into<String>) -> Error {
    Error::Unsupported(why.into())
}

/// Reads the program headers, and checks that every byte to load is within the
/// file.
fn program_headers<K: Read + Seek>(file: &mut K, probe: &Probe) -> Result<Vec<Phdr>, Error> {
    const CLASS_64_LITTLE_ENDIAN: [u8; 2] = [2, 1];
    let (head, size) = (&probe.head, probe.size);
    let fields = (u64_at(head, 32), u16_at(head, 54), u16_at(head, 56));
    let (Some(table), Some(entry_size), Some(count)) = fields else {
        let (have, need) = (size, EHDR);
        return Err(Error::Truncated { have, need });
    };
    if head.get(4..6) != Some(&CLASS_64_LITTLE_ENDIAN) {
        return Err(unsupported("it is not a little-endian 64-bit ELF"));
    }
    if entry_size != PHDR {
        return Err(unsupported(format!(
            "its program headers are {entry_size} bytes long; they must be {PHDR}"
        )));
    }
    if count > MAX_PHDRS {
        return Err(unsupported(format!(
            "it has {count} program headers; at most {MAX_PHDRS} are read"
        )));
    }
    let length = usize::from(count) * usize::from(PHDR);
    let bytes = kernel::read_at(file, size, table, length)?;
    let headers: Vec<Phdr> = bytes
        .chunks_exact(usize::from(PHDR))
        .map(Phdr::of)
        .collect();
    let used = headers
        .iter()
        .filter(|header| [PT_LOAD, PT_NOTE].contains(&header.kind));
    let need = used.map(|header| header.offset.saturating_add(header.filesz));
    match need.max() {
        Some(need) if need > size => Err(Error::Truncated { have: size, need }),
        _ => Ok(headers),
    }
}

/// Returns the segments to load, by ascending address: disjoint, above the boot
/// data and within low RAM.
fn loadable(headers: &[Phdr], low_end: u64) -> Result<Vec<Phdr>, Error> {
    let mut segments: Vec<Phdr> = headers
        .iter()
        .copied()
        .filter(|header| header.kind == PT_LOAD && header.memsz.max(header.filesz) > 0)
        .collect();
    segments.sort_by_key(|segment| segment.paddr);
    for segment in &segments {
        if segment.filesz > segment.memsz {
            return Err(unsupported(format!(
                "the segment at {:#x} is longer in the file than in memory",
                segment.paddr
            )));
        }
        if segment.paddr < layout::HIMEM {
            return Err(unsupported(format!(
                "its segment at {:#x} is below 1 MiB, where the boot data is",
                segment.paddr
            )));
        }
        if segment.end() > low_end {
            let need = segment.end() - layout::HIMEM;
            return Err(kernel::does_not_fit(need, layout::HIMEM, low_end));
        }
    }
    let mut neighbours = segments.windows(2);
    match neighbours.find(|pair| pair[0].end() > pair[1].paddr) {
        Some(pair) => Err(unsupported(format!(
            "its segments overlap at {:#x}",
            pair[1].paddr
        ))),
        None => Ok(segments),
    }
}

/// Returns the entry address of the file's first PVH note.
fn pvh_entry<K: Read + Seek>(
    file: &mut K,
    size: u64,
    headers: &[Phdr],
) -> Result<Option<u32>, Error> {
    for header in headers.iter().filter(|header| header.kind == PT_NOTE) {
        if header.filesz > MAX_NOTES {
            return Err(unsupported(format!(
                "it has a note segment of {} bytes; at most {MAX_NOTES} are read",
                header.filesz
            )));
        }
        let length = usize::try_from(header.filesz).unwrap_or(0);
        let notes = kernel::read_at(file, size, header.offset, length)?;
        if let Some(entry) = pvh_note(&notes) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// The entry point in the notes of one segment: name size, descriptor size and
/// type, then name and descriptor, each padded to four bytes.
fn pvh_note(notes: &[u8]) -> Option<u32> {
    const ALIGN: usize = 4;
    let padded = |size: u32| usize::try_from(size).ok()?.checked_next_multiple_of(ALIGN);
    let mut at = 0usize;
    loop {
        let name = at.checked_add(12)?;
        let descriptor = name.checked_add(padded(u32_at(notes, at)?)?)?;
        let is_entry = u32_at(notes, at.checked_add(8)?)? == PHYS32_ENTRY;
        if is_entry && notes.get(name..descriptor) == Some(b"Xen\0") {
            return u32_at(notes, descriptor);
        }
        at = descriptor.checked_add(padded(u32_at(notes, at.checked_add(4)?)?)?)?;
    }
}
