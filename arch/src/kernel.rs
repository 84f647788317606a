//! Detects the format of a kernel file by its first bytes.

use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, ReadVolatile};

use crate::platform::Initrd;

/// A kernel or an initial ramdisk, which can be read to ordinary and to guest memory.
pub trait KernelFile: Read + ReadVolatile + Seek {}

impl<F: Read + ReadVolatile + Seek> KernelFile for F {}

/// Error of loading a kernel or an initial ramdisk. The caller adds the file's name.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Reading the file failed.
    #[error("cannot be read")]
    Read(#[source] io::Error),
    /// The file has no known magic number.
    #[error("is not a Linux kernel ({expected})")]
    NotAKernel {
        /// The formats this architecture boots.
        expected: &'static str,
    },
    /// A kernel for another architecture.
    #[error("is a kernel for {found}, this machine is {expected}")]
    OtherArchitecture {
        /// Architecture of the file.
        found: String,
        /// Architecture of the guest.
        expected: &'static str,
    },
    /// The file is shorter than its header says.
    #[error("is truncated: {have} bytes of {need}")]
    Truncated {
        /// Length of the file in bytes.
        have: u64,
        /// Length according to the header, in bytes.
        need: u64,
    },
    /// A kernel for the architecture that this loader cannot boot.
    #[error("cannot be booted: {0}")]
    Unsupported(String),
    /// The compressed data is damaged.
    #[error("cannot be decompressed")]
    Decompress(#[source] io::Error),
    /// The kernel or the initial ramdisk exceeds guest memory.
    #[error(
        "does not fit: it needs {need} MiB of guest memory from {from:#x}, which ends at {end:#x}"
    )]
    DoesNotFit {
        /// Size in MiB, rounded up.
        need: u64,
        /// Start address.
        from: u64,
        /// End of memory (exclusive).
        end: u64,
    },
    /// The kernel accepts an initial ramdisk only below its own end.
    #[error("cannot be placed: the kernel takes it below {limit:#x} and ends itself at {end:#x}")]
    NoPlace {
        /// The initial ramdisk must end at or below this address.
        limit: u64,
        /// The end of the kernel (exclusive).
        end: u64,
    },
}

/// Format of a file.
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
    /// A compressed file.
    Compressed(Compression),
    /// EFI self-decompressing image (arm64, RISC-V, LoongArch).
    Zboot(Zboot),
    /// Another EFI program, such as a unified kernel image: PE with this
    /// `Machine` (PE format §3.3.1).
    Efi(u16),
    /// None of these formats.
    Unknown,
}

/// Compression of a file, detected by its first bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// RFC 1952.
    Gzip,
    /// RFC 8878.
    Zstd,
    /// The .xz format.
    Xz,
    /// The .bz2 format.
    Bzip2,
    /// LZ4, as a frame or in the form that Linux builds use.
    Lz4,
}

impl Compression {
    const MAGICS: [(&[u8], Self); 6] = [
        (&[0x1F, 0x8B], Self::Gzip),
        (&[0x28, 0xB5, 0x2F, 0xFD], Self::Zstd),
        (b"\xFD7zXZ\0", Self::Xz),
        (b"BZh", Self::Bzip2),
        (&[0x04, 0x22, 0x4D, 0x18], Self::Lz4),
        (&[0x02, 0x21, 0x4C, 0x18], Self::Lz4),
    ];

    fn of(head: &[u8]) -> Option<Self> {
        let known = Self::MAGICS.iter();
        let found = known.clone().find(|(magic, _)| head.starts_with(magic));
        found.map(|&(_, compression)| compression)
    }

    /// Name of the format, and command that decompresses it.
    fn name_and_tool(self) -> (&'static str, &'static str) {
        match self {
            Self::Gzip => ("gzip", "gunzip"),
            Self::Zstd => ("zstd", "unzstd"),
            Self::Xz => ("xz", "unxz"),
            Self::Bzip2 => ("bzip2", "bunzip2"),
            Self::Lz4 => ("lz4", "unlz4"),
        }
    }
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
/// PE `Machine` numbers, the same as the architecture's ELF tools print.
const PE_AMD64: u16 = 0x8664;
const PE_ARM64: u16 = 0xAA64;

/// Bytes of the file that [`Format::of`] reads.
pub const HEAD: usize = 0x206;

/// Returns the `N` bytes at `at`, if the header is long enough.
pub(crate) fn bytes_at<const N: usize>(head: &[u8], at: usize) -> Option<[u8; N]> {
    head.get(at..at.checked_add(N)?)?.try_into().ok()
}

/// Returns the little-endian `u16` at `at`, if the header is long enough.
pub(crate) fn u16_at(head: &[u8], at: usize) -> Option<u16> {
    bytes_at(head, at).map(u16::from_le_bytes)
}

/// Returns the little-endian `u32` at `at`, if the header is long enough.
pub(crate) fn u32_at(head: &[u8], at: usize) -> Option<u32> {
    bytes_at(head, at).map(u32::from_le_bytes)
}

/// Returns the little-endian `u64` at `at`, if the header is long enough.
pub(crate) fn u64_at(head: &[u8], at: usize) -> Option<u64> {
    bytes_at(head, at).map(u64::from_le_bytes)
}

impl Format {
    /// Detects the format by the first bytes of a file, at most [`HEAD`] of them.
    pub fn of(head: &[u8]) -> Self {
        if head.starts_with(b"\x7fELF")
            && let Some(machine) = u16_at(head, 18)
        {
            return Self::Elf(machine);
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
        if let Some(compression) = Compression::of(head) {
            return Self::Compressed(compression);
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
        Self::efi(head).unwrap_or(Self::Unknown)
    }

    /// Any other PE file whose header is within `head`.
    fn efi(head: &[u8]) -> Option<Self> {
        let pe = usize::try_from(u32_at(head, 0x3C)?).ok()?;
        let magics = (head.get(..2)?, bytes_at(head, pe)?);
        let machine = u16_at(head, pe.checked_add(4)?)?;
        (magics == (b"MZ", *b"PE\0\0")).then_some(Self::Efi(machine))
    }

    /// The architecture of a kernel of this format, if the format contains it.
    pub fn architecture(&self) -> Option<String> {
        Some(match self {
            Self::Elf(ELF_X86_64) | Self::BzImage | Self::Efi(PE_AMD64) => "x86_64".into(),
            Self::Elf(ELF_AARCH64) | Self::Arm64Image | Self::Efi(PE_ARM64) => "aarch64".into(),
            Self::Elf(machine) => format!("ELF machine {machine}"),
            Self::RiscvImage => "riscv64".into(),
            Self::Efi(machine) => format!("EFI machine {machine:#x}"),
            Self::Compressed(_) | Self::Zboot(_) | Self::Unknown => return None,
        })
    }
}

/// Format, first bytes and length of a kernel file that is not loaded yet.
#[derive(Debug)]
pub(crate) struct Probe {
    /// Format of the file.
    pub(crate) format: Format,
    /// Its first bytes, at most [`HEAD`]. The loaders read every header field from here or from
    /// their own copy: the file may change at any time.
    pub(crate) head: Vec<u8>,
    /// Its length in bytes.
    pub(crate) size: u64,
}

/// Reads the format, the first bytes and the length of `file`.
///
/// # Errors
/// The file cannot be read.
pub(crate) fn probe<F: Read + Seek>(file: &mut F) -> Result<Probe, Error> {
    let size = length(file)?;
    let mut head = Vec::with_capacity(HEAD);
    file.by_ref()
        .take(HEAD as u64)
        .read_to_end(&mut head)
        .map_err(Error::Read)?;
    let format = Format::of(&head);
    Ok(Probe { format, head, size })
}

/// Reads the `len` bytes of `file` at `at`; `size` is the file's length.
///
/// # Errors
/// The file ends within them, or cannot be read.
pub(crate) fn read_at<F: Read + Seek>(
    file: &mut F,
    size: u64,
    at: u64,
    len: usize,
) -> Result<Vec<u8>, Error> {
    let need = at.saturating_add(len as u64);
    if size < need {
        return Err(Error::Truncated { have: size, need });
    }
    let mut bytes = vec![0; len];
    file.seek(SeekFrom::Start(at)).map_err(Error::Read)?;
    file.read_exact(&mut bytes).map_err(Error::Read)?;
    Ok(bytes)
}

/// The length of `file`, which is left at its start.
pub(crate) fn length<F: Seek>(file: &mut F) -> Result<u64, Error> {
    let size = file.seek(SeekFrom::End(0)).map_err(Error::Read)?;
    file.rewind().map_err(Error::Read)?;
    Ok(size)
}

/// Copies `size` bytes of `file` at `offset` to guest memory at `base`. The caller has checked that
/// RAM is there.
pub(crate) fn copy<M: GuestMemoryBackend, F: KernelFile>(
    memory: &M,
    file: &mut F,
    offset: u64,
    base: u64,
    size: u64,
) -> Result<(), Error> {
    file.seek(SeekFrom::Start(offset)).map_err(Error::Read)?;
    let count = usize::try_from(size).unwrap_or(usize::MAX);
    memory
        .read_exact_volatile_from(GuestAddress(base), file, count)
        .map_err(|error| Error::Read(io::Error::other(error)))
}

/// Copies an initial ramdisk to the address that `place` returns for its length in bytes.
///
/// # Errors
/// `place` fails, or the file cannot be read.
pub(crate) fn load_initrd<M: GuestMemoryBackend, F: KernelFile>(
    memory: &M,
    file: &mut F,
    place: impl FnOnce(u64) -> Result<u64, Error>,
) -> Result<Initrd, Error> {
    let size = length(file)?;
    let base = place(size)?;
    copy(memory, file, 0, base, size)?;
    Ok(Initrd { base, size })
}

/// Creates the error for `size` bytes that do not fit between `from` and `end`.
pub(crate) fn does_not_fit(size: u64, from: u64, end: u64) -> Error {
    Error::DoesNotFit {
        need: size.div_ceil(1 << 20),
        from,
        end,
    }
}

/// Creates the error for a file that is not a kernel of architecture `expected`, or whose
/// compression this architecture's loader does not support.
pub(crate) fn refuse(format: &Format, expected: &'static str, formats: &'static str) -> Error {
    match (format, format.architecture()) {
        (_, Some(found)) if found != expected => Error::OtherArchitecture { found, expected },
        (Format::Compressed(compression), _) => {
            let (name, tool) = compression.name_and_tool();
            Error::Unsupported(format!(
                "it is compressed with {name}; decompress it first ({tool})"
            ))
        }
        (Format::Efi(_), _) => Error::Unsupported(
            "it is an EFI program; take the kernel out of a unified kernel image with \
             \"objcopy --dump-section .linux=vmlinuz FILE\""
                .into(),
        ),
        (Format::Zboot(_), _) => Error::Unsupported(format!(
            "it is an EFI zboot image, a form of arm64 and RISC-V kernels; {formats}"
        )),
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
    fn each_format_is_detected_by_its_magic() {
        let elf = head(&[(0, b"\x7fELF"), (18, &[183, 0])]);
        assert_eq!(Format::of(&elf), Format::Elf(183));
        assert_eq!(Format::of(&elf).architecture().unwrap(), "aarch64");
        let bz = head(&[(0, b"MZ"), (0x202, b"HdrS")]);
        assert_eq!(Format::of(&bz), Format::BzImage);
        let image = head(&[(0, b"MZ"), (0x38, b"ARM\x64")]);
        assert_eq!(Format::of(&image), Format::Arm64Image);
        for (magic, compression) in Compression::MAGICS {
            assert_eq!(Format::of(magic), Format::Compressed(compression));
        }
        let efi = head(&[
            (0, b"MZ"),
            (0x3C, &[0x78]),
            (0x78, b"PE\0\0"),
            (0x7C, &[0x64, 0x86]),
        ]);
        assert_eq!(Format::of(&efi), Format::Efi(PE_AMD64));
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
        let far = head(&[(0, b"MZ"), (0x3C, &[0xFF; 4])]);
        for bytes in [
            &b""[..],
            b"\x7fELF",
            b"MZ\0\0zimg",
            b"#!/bin/sh\n",
            b"\x1f",
            &far,
        ] {
            assert_eq!(Format::of(bytes), Format::Unknown, "{bytes:?}");
        }
    }

    #[test]
    fn an_unsupported_compression_is_named_with_the_fix() {
        let refused = |format| refuse(&format, "x86_64", "").to_string();
        let text = refused(Format::Compressed(Compression::Xz));
        assert_eq!(
            text,
            "cannot be booted: it is compressed with xz; decompress it first (unxz)"
        );
        let text = refused(Format::Efi(PE_AMD64));
        assert!(text.contains("objcopy --dump-section .linux="), "{text}");
        let text = refused(Format::Efi(PE_ARM64));
        assert_eq!(text, "is a kernel for aarch64, this machine is x86_64");
    }

    #[test]
    fn the_wrong_architecture_is_named_with_the_right_one() {
        let text = refuse(&Format::Arm64Image, "x86_64", "vmlinux or bzImage").to_string();
        assert_eq!(text, "is a kernel for aarch64, this machine is x86_64");
        let text = refuse(&Format::Unknown, "x86_64", "vmlinux or bzImage").to_string();
        assert_eq!(text, "is not a Linux kernel (vmlinux or bzImage)");
    }
}
