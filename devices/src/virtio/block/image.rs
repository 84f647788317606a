//! A raw image: a regular file or a block device.

use std::fs::{File, TryLockError};
use std::io::{self, Seek as _, SeekFrom};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::Path;

use vm_memory::{ReadVolatile as _, VolatileSlice, WriteVolatile as _};
use vmm_sys_util::write_zeroes::{PunchHole as _, WriteZeroesAt as _};

use crate::host_file::{self, FileError};

/// Bytes of a sector, the unit of addresses (virtio 1.2 §5.2.4).
pub(super) const SECTOR: u64 = 512;

/// Error of an image. The text is one line for the user, without the file's
/// name.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened with the requested access.
    #[error(transparent)]
    File(FileError),
    /// It cannot be opened for writing, but may be readable.
    #[error("cannot be opened for writing; add readonly=on (is_read_only) or allow it")]
    NotWritable(#[source] io::Error),
    /// Another process has locked it.
    #[error("is in use: another machine or drive holds its lock")]
    InUse,
    /// It is a block device that refuses writes.
    #[error("is a read-only block device; add readonly=on (is_read_only)")]
    ReadOnly,
    /// It is neither a file nor a block device, or shorter than a sector.
    #[error("is no disk image: {0}")]
    NoImage(&'static str),
    /// Its length or lock is not available.
    #[error("cannot be examined")]
    Examine(#[source] io::Error),
}

impl From<FileError> for ImageError {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Kind { .. } => Self::NoImage("neither a file nor a block device"),
            other => Self::File(other),
        }
    }
}

/// Converts an error of opening an image. Read-only access is the fix only
/// where reading may be permitted.
fn refusal(error: FileError, read_only: bool) -> ImageError {
    match error {
        FileError::Open { source, .. }
            if !read_only
                && matches!(
                    source.kind(),
                    io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem
                ) =>
        {
            ImageError::NotWritable(source)
        }
        other => other.into(),
    }
}

/// An open image, locked: one writer, or any number of readers.
#[derive(Debug)]
pub struct Image {
    file: File,
    sectors: u64,
    read_only: bool,
}

impl Image {
    /// Opens and locks an image.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn open(path: &Path, read_only: bool) -> Result<Self, ImageError> {
        let image = Self::examine(path, read_only)?;
        let locked = if read_only {
            image.file.try_lock_shared()
        } else {
            image.file.try_lock()
        };
        match locked {
            Ok(()) => Ok(image),
            Err(TryLockError::WouldBlock) => Err(ImageError::InUse),
            Err(TryLockError::Error(error)) => Err(ImageError::Examine(error)),
        }
    }

    /// Checks that [`open`](Self::open) would succeed, except for the lock,
    /// which another machine may hold.
    ///
    /// # Errors
    /// See [`ImageError`].
    pub fn check(path: &Path, read_only: bool) -> Result<(), ImageError> {
        Self::examine(path, read_only).map(drop)
    }

    /// Opens an image without a lock.
    fn examine(path: &Path, read_only: bool) -> Result<Self, ImageError> {
        let mut file =
            host_file::open_image(path, read_only).map_err(|error| refusal(error, read_only))?;
        let kind = file.metadata().map_err(ImageError::Examine)?.file_type();
        if !read_only && kind.is_block_device() {
            let refuses_writes =
                host_file::block_device_is_read_only(&file).map_err(ImageError::Examine)?;
            if refuses_writes {
                return Err(ImageError::ReadOnly);
            }
        }
        let len = file.seek(SeekFrom::End(0)).map_err(ImageError::Examine)?;
        let sectors = len / SECTOR;
        if sectors == 0 {
            return Err(ImageError::NoImage("shorter than a sector of 512 bytes"));
        }
        Ok(Self {
            file,
            sectors,
            read_only,
        })
    }

    /// Texts of warnings about a probable mistake of the user, without the
    /// image's name. Empty when the image is whole sectors of raw data.
    #[must_use]
    pub fn doubts(&self) -> Vec<String> {
        let mut doubts = Vec::new();
        let mut start = [0; 32];
        // A short image fills a part; an error leaves zeros, which have no
        // format.
        let _ = self.file.read_at(&mut start, 0);
        if let Some(format) = image_format(&start) {
            doubts.push(format!(
                "begins with the header of a {format} image and is used as raw data; \
                 convert it (qemu-img convert -O raw)"
            ));
        }
        let len = self.file.metadata().map_or(0, |metadata| metadata.len());
        let rest = len % SECTOR;
        if rest != 0 {
            doubts.push(format!(
                "is {len} bytes long, which is no multiple of 512; \
                 the guest does not see the last {rest}"
            ));
        }
        doubts
    }

    /// Length in sectors of 512 bytes, without a partial one.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether the image is open for reading only.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// Byte offset of `sector`; `None` unless `bytes` bytes from there on are
    /// whole sectors of the image.
    pub(super) fn offset(&self, sector: u64, bytes: u64) -> Option<u64> {
        let end = sector.checked_add(bytes / SECTOR)?;
        (bytes.is_multiple_of(SECTOR) && end <= self.sectors).then(|| sector * SECTOR)
    }

    pub(super) fn seek(&mut self, offset: u64) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(offset)).map(drop)
    }

    /// Reads from the present position, and advances it.
    pub(super) fn read(&mut self, to: &mut VolatileSlice<'_>) -> io::Result<()> {
        self.file.read_exact_volatile(to).map_err(io::Error::other)
    }

    /// Writes at the present position, and advances it.
    pub(super) fn write(&mut self, from: &VolatileSlice<'_>) -> io::Result<()> {
        self.file.write_all_volatile(from).map_err(io::Error::other)
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Deallocates the range in the host's storage; it then reads as zeros.
    /// `false` when the storage does not support that.
    pub(super) fn discard(&mut self, offset: u64, bytes: u64) -> io::Result<bool> {
        match self.file.punch_hole(offset, bytes) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(false),
            Err(error) => Err(error),
        }
    }

    pub(super) fn zero(&mut self, offset: u64, bytes: u64) -> io::Result<()> {
        let bytes = usize::try_from(bytes).map_err(io::Error::other)?;
        self.file.write_all_zeroes_at(offset, bytes)
    }
}

/// Format of a disk image by its first bytes; `None` for a raw image.
fn image_format(start: &[u8]) -> Option<&'static str> {
    let headers: [(&[u8], &str); 7] = [
        (b"QFI\xfb", "qcow2"),
        (b"KDMV", "VMDK"),
        (b"COWD", "VMDK"),
        (b"# Disk DescriptorFile", "VMDK"),
        (b"vhdxfile", "VHDX"),
        (b"conectix", "VHD"),
        (b"<<< ", "VDI"),
    ];
    let known = headers.iter().find(|(header, _)| start.starts_with(header));
    known.map(|&(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Chain;

    #[test]
    fn readonly_is_the_fix_only_where_writing_is_refused() {
        let text = |errno, read_only| {
            let source = io::Error::from_raw_os_error(errno);
            let how = "for reading and writing";
            Chain(&refusal(FileError::Open { how, source }, read_only)).to_string()
        };
        for errno in [libc::EACCES, libc::EROFS] {
            assert!(text(errno, false).contains("add readonly=on"));
            assert!(!text(errno, true).contains("readonly=on"));
        }
        let missing = text(libc::ENOENT, false);
        assert!(!missing.contains("readonly=on"), "{missing}");
        assert_eq!(missing.matches("No such file").count(), 1, "{missing}");
    }
}
