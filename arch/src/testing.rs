//! A simulated kernel file for the tests and fuzz targets of the loaders.

use std::io::{self, Read, Seek, SeekFrom};

use vm_memory::bitmap::BitmapSlice;
use vm_memory::{ReadVolatile, VolatileMemoryError, VolatileSlice};

/// Reads fail after this many bytes, so that a loader without a bound fails its test instead of
/// hanging it.
const BUDGET: u64 = 1 << 30;

/// `front`, then zeros up to `len` bytes.
#[derive(Debug)]
pub struct Sparse {
    front: Vec<u8>,
    /// Replaces `front` after the first read at offset 0.
    later: Option<Vec<u8>>,
    len: u64,
    at: u64,
    /// Bytes read so far.
    pub read: u64,
}

impl Sparse {
    /// Creates a file of `len` bytes, or of the length of `front` if that is longer.
    pub fn new(front: Vec<u8>, len: u64) -> Self {
        Self {
            len: len.max(front.len() as u64),
            front,
            later: None,
            at: 0,
            read: 0,
        }
    }

    /// The same file, into which another program writes `later` after the first read at offset 0.
    #[must_use]
    pub fn changing(self, later: Vec<u8>) -> Self {
        Self {
            later: Some(later),
            ..self
        }
    }
}

impl Read for Sparse {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.read > BUDGET {
            return Err(io::Error::other("the test's budget is used up"));
        }
        let left = self.len.saturating_sub(self.at);
        let count = buf.len().min(usize::try_from(left).unwrap_or(usize::MAX));
        buf[..count].fill(0);
        let start =
            usize::try_from(self.at).map_or(self.front.len(), |at| at.min(self.front.len()));
        let data = &self.front[start..];
        let data = &data[..data.len().min(count)];
        buf[..data.len()].copy_from_slice(data);
        if start == 0 && count > 0 {
            self.front = self.later.take().unwrap_or(std::mem::take(&mut self.front));
        }
        self.at += count as u64;
        self.read += count as u64;
        Ok(count)
    }
}

impl ReadVolatile for Sparse {
    fn read_volatile<B: BitmapSlice>(
        &mut self,
        buf: &mut VolatileSlice<B>,
    ) -> Result<usize, VolatileMemoryError> {
        let mut bytes = vec![0; buf.len().min(1 << 20)];
        let count = self
            .read(&mut bytes)
            .map_err(VolatileMemoryError::IOError)?;
        buf.copy_from(&bytes[..count]);
        Ok(count)
    }
}

impl Seek for Sparse {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::End(by) => self.len.checked_add_signed(by),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
        };
        self.at = at.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}
