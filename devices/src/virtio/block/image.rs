//! A raw image: a regular file or a block device.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek as _, SeekFrom};
use std::path::Path;

use vm_memory::{ReadVolatile as _, VolatileSlice, WriteVolatile as _};
use vmm_sys_util::write_zeroes::{PunchHole as _, WriteZeroesAt as _};

/// Bytes of a sector, the unit of addresses (virtio 1.2 §5.2.4).
pub(super) const SECTOR: u64 = 512;

/// Why an image cannot be used. One line for the user, without its name.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// It cannot be opened for what is wanted of it.
    #[error("cannot be opened {how}")]
    Open {
        /// For reading, or for reading and writing.
        how: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// Somebody writes to it.
    #[error("is in use: another machine or drive holds its lock")]
    InUse,
    /// It is neither a file nor a block device, or shorter than a sector.
    #[error("is no disk image: {0}")]
    NoImage(&'static str),
    /// Its length or lock cannot be had.
    #[error("cannot be examined")]
    Examine(#[source] io::Error),
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
        let how = if read_only {
            "for reading"
        } else {
            "for reading and writing (readonly=on needs less)"
        };
        let opened = OpenOptions::new().read(true).write(!read_only).open(path);
        let mut file = opened.map_err(|source| ImageError::Open { how, source })?;
        let kind = file.metadata().map_err(ImageError::Examine)?.file_type();
        let block_device = std::os::unix::fs::FileTypeExt::is_block_device(&kind);
        if !kind.is_file() && !block_device {
            return Err(ImageError::NoImage("neither a file nor a block device"));
        }
        let locked = if read_only {
            file.try_lock_shared()
        } else {
            file.try_lock()
        };
        match locked {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ImageError::InUse),
            Err(TryLockError::Error(error)) => return Err(ImageError::Examine(error)),
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

    /// Its length in sectors; a last partial one does not count.
    #[must_use]
    pub fn sectors(&self) -> u64 {
        self.sectors
    }

    /// Whether it is never written.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The byte offset of `sector` when `bytes` bytes from there on are whole
    /// sectors of the image.
    pub(super) fn offset(&self, sector: u64, bytes: u64) -> Option<u64> {
        let end = sector.checked_add(bytes / SECTOR)?;
        (bytes.is_multiple_of(SECTOR) && end <= self.sectors).then(|| sector * SECTOR)
    }

    pub(super) fn seek(&mut self, offset: u64) -> io::Result<()> {
        self.file.seek(SeekFrom::Start(offset)).map(drop)
    }

    /// Reads on from where the last access ended.
    pub(super) fn read(&mut self, to: &mut VolatileSlice<'_>) -> io::Result<()> {
        self.file.read_exact_volatile(to).map_err(io::Error::other)
    }

    /// Writes on from where the last access ended.
    pub(super) fn write(&mut self, from: &VolatileSlice<'_>) -> io::Result<()> {
        self.file.write_all_volatile(from).map_err(io::Error::other)
    }

    pub(super) fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    /// Gives the range back to the host; then it reads as zeros. `false` when
    /// the image is on something that takes nothing back.
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
