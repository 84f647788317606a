//! What kind of file the user gave as a kernel, told from its first bytes.

use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

/// Why a kernel or an initial ramdisk cannot be loaded. The caller names the
/// file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading the file failed.
    #[error("cannot be read")]
    Read(#[source] io::Error),
    /// No known magic number.
    #[error("is not a Linux kernel ({expected})")]
    NotAKernel {
        /// The formats this architecture boots.
        expected: &'static str,
    },
    /// A kernel, but for another processor.
    #[error("is a kernel for {found}, this machine is {expected}")]
    OtherArchitecture {
        /// Architecture of the file.
        found: String,
        /// Architecture of the guest.
        expected: &'static str,
    },
    /// The file ends before its own header says it should.
    #[error("is truncated: {have} bytes of {need}")]
    Truncated {
        /// Length of the file.
        have: u64,
        /// Length according to the header.
        need: u64,
    },
    /// The right architecture, but not bootable by this program.
    #[error("cannot be booted: {0}")]
    Unsupported(String),
    /// The compressed data is damaged.
    #[error("cannot be decompressed")]
    Decompress(#[source] io::Error),
    /// No room in guest memory.
    #[error(
        "does not fit: it needs {need} MiB of guest memory from {from:#x}, which ends at {end:#x}"
    )]
    DoesNotFit {
        /// MiB needed, rounded up.
        need: u64,
        /// Where it would start.
        from: u64,
        /// Where memory ends (exclusive).
        end: u64,
    },
}

/// A file's format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Format {
    /// ELF with this `e_machine`.
    Elf(u16),
    /// x86 boot protocol.
    BzImage,
    /// arm64 `Image`.
    Arm64Image,
    /// RISC-V `Image`.
    RiscvImage,
    /// A gzip stream.
    Gzip,
    /// EFI self-decompressing image (arm64, RISC-V, LoongArch).
    Zboot(Zboot),
    /// None of these.
    Unknown,
}

/// The header of an EFI zboot image (Linux `drivers/firmware/efi/libstub/zboot-header.S`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Zboot {
    /// Offset of the compressed payload in the file.
    pub offset: u32,
    /// Length of the compressed payload.
    pub size: u32,
    /// Compression name, such as `gzip`.
    pub compression: String,
}

const ELF_X86_64: u16 = 62;
const ELF_AARCH64: u16 = 183;

/// Bytes of the file that [`Format::of`] wants to see.
pub const HEAD: usize = 0x206;

fn u32_at(head: &[u8], at: usize) -> Option<u32> {
    let bytes = head.get(at..at.checked_add(4)?)?;
    Some(u32::from_le_bytes(bytes.try_into().ok()?))
}

impl Format {
    /// Recognizes a file by its first bytes, at most [`HEAD`] of them.
    pub fn of(head: &[u8]) -> Self {
        if head.starts_with(b"\x7fELF")
            && let Some(&[low, high]) = head.get(18..20)
        {
            return Self::Elf(u16::from_le_bytes([low, high]));
        }
        if head.get(0x202..0x206) == Some(b"HdrS") {
            return Self::BzImage;
        }
        if head.get(0x38..0x3C) == Some(b"ARM\x64") {
            return Self::Arm64Image;
        }
        if head.get(0x38..0x3C) == Some(b"RSC\x05") {
            return Self::RiscvImage;
        }
        if head.starts_with(&[0x1F, 0x8B]) {
            return Self::Gzip;
        }
        if head.starts_with(b"MZ")
            && head.get(4..8) == Some(b"zimg")
            && let (Some(offset), Some(size)) = (u32_at(head, 8), u32_at(head, 12))
            && let Some(name) = head.get(24..56)
        {
            let name = name.split(|&byte| byte == 0).next().unwrap_or_default();
            let compression = String::from_utf8_lossy(name).into_owned();
            return Self::Zboot(Zboot {
                offset,
                size,
                compression,
            });
        }
        Self::Unknown
    }

    /// The architecture a kernel of this format runs on, when the format says.
    pub fn architecture(&self) -> Option<String> {
        Some(match self {
            Self::Elf(ELF_X86_64) | Self::BzImage => "x86_64".into(),
            Self::Elf(ELF_AARCH64) | Self::Arm64Image => "aarch64".into(),
            Self::Elf(machine) => format!("ELF machine {machine}"),
            Self::RiscvImage => "riscv64".into(),
            Self::Gzip | Self::Zboot(_) | Self::Unknown => return None,
        })
    }
}

/// Reads the format and the length of `file`, leaving it at its start.
///
/// # Errors
/// The file cannot be read.
pub fn probe<F: Read + Seek>(file: &mut F) -> Result<(Format, u64), Error> {
    let size = length(file)?;
    let mut head = Vec::with_capacity(HEAD);
    file.by_ref()
        .take(HEAD as u64)
        .read_to_end(&mut head)
        .map_err(Error::Read)?;
    file.rewind().map_err(Error::Read)?;
    Ok((Format::of(&head), size))
}

/// The length of `file`, which is left at its start.
pub(crate) fn length<F: Seek>(file: &mut F) -> Result<u64, Error> {
    let size = file.seek(SeekFrom::End(0)).map_err(Error::Read)?;
    file.rewind().map_err(Error::Read)?;
    Ok(size)
}

/// Copies `size` bytes of `file`, from where it stands, to guest memory at
/// `base`. The caller has checked that there is RAM.
pub(crate) fn copy<M, F>(memory: &M, file: &mut F, base: u64, size: u64) -> Result<(), Error>
where
    M: GuestMemoryBackend,
    F: ReadVolatile,
{
    let count = usize::try_from(size).unwrap_or(usize::MAX);
    memory
        .read_exact_volatile_from(GuestAddress(base), file, count)
        .map_err(|error| Error::Read(io::Error::other(error)))
}

/// The error for `size` bytes that find no room from `from` to `end`.
pub(crate) fn does_not_fit(size: u64, from: u64, end: u64) -> Error {
    Error::DoesNotFit {
        need: size.div_ceil(1 << 20),
        from,
        end,
    }
}

/// The error for a file that is no kernel of architecture `expected`.
pub(crate) fn refuse(format: &Format, expected: &'static str, formats: &'static str) -> Error {
    match format.architecture() {
        Some(found) if found != expected => Error::OtherArchitecture { found, expected },
        _ => Error::NotAKernel { expected: formats },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(edits: &[(usize, &[u8])]) -> Vec<u8> {
        let mut head = vec![0; HEAD];
        for (at, bytes) in edits {
            head[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        head
    }

    #[test]
    fn each_format_is_told_from_its_magic() {
        let elf = head(&[(0, b"\x7fELF"), (18, &[183, 0])]);
        assert_eq!(Format::of(&elf), Format::Elf(183));
        assert_eq!(Format::of(&elf).architecture().unwrap(), "aarch64");
        let bz = head(&[(0, b"MZ"), (0x202, b"HdrS")]);
        assert_eq!(Format::of(&bz), Format::BzImage);
        let image = head(&[(0, b"MZ"), (0x38, b"ARM\x64")]);
        assert_eq!(Format::of(&image), Format::Arm64Image);
        assert_eq!(Format::of(&[0x1F, 0x8B, 8]), Format::Gzip);
        let zboot = head(&[
            (0, b"MZ\0\0zimg"),
            (8, &0x1000u32.to_le_bytes()),
            (12, &0x2000u32.to_le_bytes()),
            (24, b"zstd"),
        ]);
        assert_eq!(
            Format::of(&zboot),
            Format::Zboot(Zboot {
                offset: 0x1000,
                size: 0x2000,
                compression: "zstd".into()
            })
        );
    }

    #[test]
    fn short_or_foreign_files_are_unknown() {
        for bytes in [&b""[..], b"\x7fELF", b"MZ\0\0zimg", b"#!/bin/sh\n", b"\x1f"] {
            assert_eq!(Format::of(bytes), Format::Unknown, "{bytes:?}");
        }
    }

    #[test]
    fn the_wrong_architecture_is_named_with_the_right_one() {
        let text = refuse(&Format::Arm64Image, "x86_64", "vmlinux or bzImage").to_string();
        assert_eq!(text, "is a kernel for aarch64, this machine is x86_64");
        let text = refuse(&Format::Unknown, "x86_64", "vmlinux or bzImage").to_string();
        assert_eq!(text, "is not a Linux kernel (vmlinux or bzImage)");
    }
}
