//! Puts an arm64 kernel, its initial ramdisk and the device tree into guest
//! memory (Linux `Documentation/arch/arm64/booting.rst`).
//!
//! The kernel is an `Image`, a gzip'd `Image`, or an EFI zboot `vmlinuz` with a
//! gzip payload.

use std::io::{self, Read, Seek, SeekFrom};

use flate2::read::GzDecoder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

use crate::Error;
use crate::aarch64::{fdt, layout};
use crate::kernel::{self, Format, HEAD, Zboot};
use crate::platform::{Initrd, Platform, Range};

/// Where the first vCPU starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// First instruction.
    pub pc: u64,
    /// Address of the device tree, for X0.
    pub fdt: u64,
}

const FORMATS: &str = "an Image, a gzip'd Image or an EFI zboot vmlinuz is needed";
/// Linux `COMMAND_LINE_SIZE` on arm64, less the NUL.
const CMDLINE_MAX: usize = 2047;
/// The kernel image must start this much past a 2 MiB boundary when its header
/// is too old to say (Linux before 3.17).
const OLD_TEXT_OFFSET: u64 = 0x8_0000;
const INITRD_ALIGN: u64 = 0x20_0000;

/// Loads everything a machine needs to start and returns where it starts.
///
/// # Errors
/// The kernel or the initial ramdisk is unsuitable, damaged or too large, the
/// command line is too long, or `memory` is not laid out as
/// [`layout::ram_ranges`] says.
pub fn load<M, K, I>(
    memory: &M,
    platform: &Platform,
    kernel: &mut K,
    initrd: Option<&mut I>,
) -> Result<Entry, Error>
where
    M: GuestMemoryBackend,
    K: Read + ReadVolatile + Seek,
    I: Read + ReadVolatile + Seek,
{
    let len = platform.cmdline.len();
    if len > CMDLINE_MAX {
        return Err(Error::Cmdline {
            len,
            max: CMDLINE_MAX,
        });
    }
    let ram_end = platform.ram.first().map_or(0, Range::end);
    let image = load_kernel(memory, kernel, ram_end).map_err(Error::Kernel)?;
    let initrd = match initrd {
        Some(file) => {
            // Right behind the kernel: within the 32 GiB around it that the
            // boot protocol asks for.
            let base = image.end().next_multiple_of(INITRD_ALIGN);
            Some(load_initrd(memory, file, base, ram_end).map_err(Error::Initrd)?)
        }
        None => None,
    };
    let tree = fdt::tree(platform, initrd)?;
    if tree.len() as u64 > layout::FDT.size {
        return Err(Error::Tables {
            len: tree.len(),
            max: layout::FDT.size,
        });
    }
    memory.write_slice(&tree, GuestAddress(layout::FDT.base))?;
    Ok(Entry {
        pc: image.base,
        fdt: layout::FDT.base,
    })
}

fn load_kernel<M, K>(memory: &M, file: &mut K, ram_end: u64) -> Result<Range, kernel::Error>
where
    M: GuestMemoryBackend,
    K: Read + ReadVolatile + Seek,
{
    let (format, size) = kernel::probe(file)?;
    match format {
        Format::Arm64Image => {
            let mut head = Vec::new();
            file.by_ref()
                .take(HEAD as u64)
                .read_to_end(&mut head)
                .map_err(kernel::Error::Read)?;
            check_complete(file, &head, size)?;
            let place = place(&head, size, ram_end)?;
            file.rewind().map_err(kernel::Error::Read)?;
            kernel::copy(memory, file, place.base, size)?;
            Ok(place)
        }
        Format::Gzip => decompress(memory, file, ram_end),
        Format::Zboot(header) => {
            check_zboot(&header, size)?;
            file.seek(SeekFrom::Start(u64::from(header.offset)))
                .map_err(kernel::Error::Read)?;
            decompress(memory, &mut file.take(u64::from(header.size)), ram_end)
        }
        other => Err(kernel::refuse(&other, "aarch64", FORMATS)),
    }
}

fn check_zboot(header: &Zboot, size: u64) -> Result<(), kernel::Error> {
    if header.compression != "gzip" {
        return Err(kernel::Error::Unsupported(format!(
            "its EFI zboot payload is compressed with {:?}; gzip is supported \
             (decompress it to an Image)",
            header.compression
        )));
    }
    let need = u64::from(header.offset) + u64::from(header.size);
    if size < need {
        return Err(kernel::Error::Truncated { have: size, need });
    }
    Ok(())
}

/// Compares the file's length with what the sections of its PE header need;
/// the arm64 header itself gives the size in memory only. An image without a
/// PE header (no EFI stub) cannot be checked.
fn check_complete<K: Read + Seek>(
    file: &mut K,
    head: &[u8],
    size: u64,
) -> Result<(), kernel::Error> {
    const HEADER: u64 = 64;
    const PE_HEADER: usize = 24;
    const SECTION: u64 = 40;
    const RAW_SIZE_AND_OFFSET: u64 = 16;
    let u16_at = |at: usize| {
        head.get(at..at + 2)
            .map_or(0, |b| u16::from_le_bytes([b[0], b[1]]))
    };
    let pe = match head.starts_with(b"MZ") {
        true => usize::from(u16_at(0x3C)),
        false => 0,
    };
    let headers = HEADER.max((pe + PE_HEADER) as u64);
    if size < headers {
        return Err(kernel::Error::Truncated {
            have: size,
            need: headers,
        });
    }
    if head.get(pe..pe + 4) != Some(b"PE\0\0") {
        return Ok(());
    }
    let sections = u64::from(u16_at(pe + 6));
    let table = (pe + PE_HEADER) as u64 + u64::from(u16_at(pe + 20));
    let mut need = table + sections * SECTION;
    for index in 0..sections {
        let mut raw = [0; 8];
        let at = table + index * SECTION + RAW_SIZE_AND_OFFSET;
        file.seek(SeekFrom::Start(at))
            .map_err(kernel::Error::Read)?;
        if file.read_exact(&mut raw).is_err() {
            break;
        }
        let [s0, s1, s2, s3, o0, o1, o2, o3] = raw;
        let end = u64::from(u32::from_le_bytes([s0, s1, s2, s3]))
            + u64::from(u32::from_le_bytes([o0, o1, o2, o3]));
        need = need.max(end);
    }
    if size < need {
        return Err(kernel::Error::Truncated { have: size, need });
    }
    Ok(())
}

/// Where an image with this header goes: from its first byte to the end of its
/// BSS. `size` is the length of the file, at least.
fn place(head: &[u8], size: u64, ram_end: u64) -> Result<Range, kernel::Error> {
    const BIG_ENDIAN: u64 = 1;
    let word = |at: usize| {
        let bytes = head.get(at..at + 8).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u64::from_le_bytes)
    };
    let (text_offset, image_size, flags) = (word(8), word(16), word(24));
    if flags & BIG_ENDIAN != 0 {
        return Err(kernel::Error::Unsupported(
            "it is a big-endian kernel".into(),
        ));
    }
    let text_offset = if image_size == 0 {
        OLD_TEXT_OFFSET
    } else {
        text_offset
    };
    let size = size.max(image_size);
    let base = layout::KERNEL.saturating_add(text_offset);
    if base.checked_add(size).is_none_or(|end| end > ram_end) {
        return Err(kernel::does_not_fit(size, base, ram_end));
    }
    Ok(Range::new(base, size))
}

/// Unpacks a gzip stream into guest memory, as much as there is room for.
fn decompress<M, R>(memory: &M, compressed: &mut R, ram_end: u64) -> Result<Range, kernel::Error>
where
    M: GuestMemoryBackend,
    R: Read,
{
    let mut stream = GzDecoder::new(compressed);
    let mut chunk = vec![0; 1 << 16];
    let mut filled = fill(&mut stream, &mut chunk)?;
    let format = Format::of(&chunk[..filled.min(HEAD)]);
    if format != Format::Arm64Image {
        return Err(kernel::refuse(&format, "aarch64", FORMATS));
    }
    let place = place(&chunk, 0, ram_end)?;
    let mut at = place.base;
    while filled > 0 {
        let end = at + filled as u64;
        if end > ram_end {
            return Err(kernel::does_not_fit(end - place.base, place.base, ram_end));
        }
        memory
            .write_slice(&chunk[..filled], GuestAddress(at))
            .map_err(|error| kernel::Error::Read(io::Error::other(error)))?;
        at = end;
        filled = fill(&mut stream, &mut chunk)?;
    }
    Ok(Range::new(place.base, place.size.max(at - place.base)))
}

/// Reads until `chunk` is full or the stream ends; returns how much it holds.
fn fill<R: Read>(stream: &mut R, chunk: &mut [u8]) -> Result<usize, kernel::Error> {
    let mut filled = 0;
    while filled < chunk.len() {
        match stream.read(&mut chunk[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(kernel::Error::Decompress(error)),
        }
    }
    Ok(filled)
}

fn load_initrd<M, I>(
    memory: &M,
    file: &mut I,
    base: u64,
    ram_end: u64,
) -> Result<Initrd, kernel::Error>
where
    M: GuestMemoryBackend,
    I: ReadVolatile + Seek,
{
    let size = kernel::length(file)?;
    if base.checked_add(size).is_none_or(|end| end > ram_end) {
        return Err(kernel::does_not_fit(size, base, ram_end));
    }
    kernel::copy(memory, file, base, size)?;
    Ok(Initrd { base, size })
}

#[cfg(test)]
mod tests;
