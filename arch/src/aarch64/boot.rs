//! Puts an arm64 kernel, its initial ramdisk and the device tree into guest
//! memory (Linux `Documentation/arch/arm64/booting.rst`).
//!
//! The kernel is an `Image`, an `Image` compressed with gzip or zstd, or an EFI
//! zboot `vmlinuz` with such a payload.

mod image;

use std::io::{self, BufReader, Read, SeekFrom};

use flate2::bufread::GzDecoder;
use ruzstd::decoding::StreamingDecoder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::Error;
pub use crate::aarch64::cpu::Entry;
use crate::aarch64::{fdt, layout};
use crate::kernel::{self, Compression, Format, HEAD, KernelFile, Probe, Zboot};
use crate::platform::{Platform, Range};

const FORMATS: &str = "an Image, compressed or not, or an EFI zboot vmlinuz is needed";
/// Upper bound on the window of a zstd stream, in bytes: that of the highest
/// compression level, which Linux builds use. The decoder keeps at most as much
/// unpacked data.
const ZSTD_WINDOW: u64 = 128 << 20;
const INITRD_ALIGN: u64 = 0x20_0000;

/// Loads everything a machine needs to start and returns where it starts.
///
/// # Errors
/// The kernel or the initial ramdisk is unsuitable, damaged or too large, the
/// command line is too long, or `memory` is not laid out as
/// [`layout::ram_ranges`] says.
pub fn load<M: GuestMemoryBackend, K: KernelFile, I: KernelFile>(
    memory: &M,
    platform: &Platform,
    kernel: &mut K,
    initrd: Option<&mut I>,
) -> Result<Entry, Error> {
    Error::check_cmdline(&platform.cmdline, layout::MAX_CMDLINE)?;
    let ram_end = platform.ram.first().map_or(0, Range::end);
    let image = load_kernel(memory, kernel, ram_end).map_err(Error::Kernel)?;
    // Directly after the kernel: the boot protocol requires an address within
    // the 32 GiB around it.
    let base = image.end().next_multiple_of(INITRD_ALIGN);
    let place = |size: u64| match base.checked_add(size) {
        Some(end) if end <= ram_end => Ok(base),
        _ => Err(kernel::does_not_fit(size, base, ram_end)),
    };
    let initrd = initrd
        .map(|file| kernel::load_initrd(memory, file, place))
        .transpose()
        .map_err(Error::Initrd)?;
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

fn load_kernel<M: GuestMemoryBackend, K: KernelFile>(
    memory: &M,
    file: &mut K,
    ram_end: u64,
) -> Result<Range, kernel::Error> {
    let Probe { format, head, size } = kernel::probe(file)?;
    let (offset, length, compression) = match &format {
        Format::Arm64Image => {
            image::check_complete(file, &head, size)?;
            let place = image::place(&head, size, ram_end)?;
            kernel::copy(memory, file, 0, place.base, size)?;
            return Ok(place);
        }
        Format::Compressed(compression @ (Compression::Gzip | Compression::Zstd)) => {
            (0, size, *compression)
        }
        Format::Zboot(header) => {
            let compression = zboot_compression(header, size)?;
            let (offset, length) = (header.offset.into(), header.size.into());
            (offset, length, compression)
        }
        other => return Err(kernel::refuse(other, "aarch64", FORMATS)),
    };
    // A kernel larger than RAM is not read further.
    let room = ram_end.saturating_sub(layout::KERNEL);
    if length > room {
        return Err(kernel::does_not_fit(length, layout::KERNEL, ram_end));
    }
    file.seek(SeekFrom::Start(offset))
        .map_err(kernel::Error::Read)?;
    let compressed = BufReader::new(file.take(length));
    match compression {
        Compression::Zstd => {
            let stream = StreamingDecoder::new_with_max_window_size(compressed, ZSTD_WINDOW)
                .map_err(|error| kernel::Error::Decompress(io::Error::other(error)))?;
            unpack(memory, stream, ram_end)
        }
        _ => unpack(memory, GzDecoder::new(compressed), ram_end),
    }
}

/// Compression of the payload in an EFI zboot image of `size` bytes.
fn zboot_compression(header: &Zboot, size: u64) -> Result<Compression, kernel::Error> {
    let compression = match header.compression.as_str() {
        "gzip" => Compression::Gzip,
        // "zstd" up to Linux 6.13, "zstd22" since.
        "zstd" | "zstd22" => Compression::Zstd,
        other => {
            return Err(kernel::Error::Unsupported(format!(
                "its EFI zboot payload is compressed with {other:?}; gzip and zstd are supported \
                 (decompress it to an Image)"
            )));
        }
    };
    let need = u64::from(header.offset) + u64::from(header.size);
    if size < need {
        return Err(kernel::Error::Truncated { have: size, need });
    }
    Ok(compression)
}

/// Unpacks an `Image` into guest memory, up to `ram_end`.
fn unpack<M, R>(memory: &M, mut stream: R, ram_end: u64) -> Result<Range, kernel::Error>
where
    M: GuestMemoryBackend,
    R: Read,
{
    let mut chunk = vec![0; 1 << 16];
    let mut filled = fill(&mut stream, &mut chunk)?;
    let head = &chunk[..filled.min(HEAD)];
    let format = Format::of(head);
    if format != Format::Arm64Image {
        return Err(kernel::refuse(&format, "aarch64", FORMATS));
    }
    let place = image::place(head, 0, ram_end)?;
    let mut at = place.base;
    while filled > 0 {
        let end = at.saturating_add(filled as u64);
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

/// Reads until `chunk` is full or the stream ends; returns the number of bytes
/// read.
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

#[cfg(test)]
mod tests;
