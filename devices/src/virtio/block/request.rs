//! Requests of a disk and their execution (virtio 1.2 §5.2.6).

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use iommu::{DmaSpace, DmaView};
use log::{debug, warn};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::{Queue, QueueT as _};
use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, Permissions};
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros as _, IntoBytes};

use super::image::{Image, SECTOR};
use crate::queue::chain::{Buffer, Chain, QueueError, scatter, total};
use crate::virtio::BlockCounters;

/// Largest size of a queue.
pub(super) const QUEUE_SIZE: u16 = 256;
/// Upper bound on data segments of a request (`seg_max`): a ring's worth without header
/// and status.
pub(super) const SEG_MAX: u16 = QUEUE_SIZE - 2;
/// Upper bound on descriptors of a request: its segments, header and status.
pub(super) const MAX_DESCRIPTORS: u16 = SEG_MAX + 2;
/// Upper bound on bytes of a segment (`size_max`), and on bytes that move while the
/// stream's gate is held.
pub(super) const SIZE_MAX: u32 = 1 << 20;
/// Upper bound on bytes of a request: what `seg_max` and `size_max` allow together.
pub(super) const MAX_REQUEST: u64 = SEG_MAX as u64 * SIZE_MAX as u64;
/// Upper bound on sectors of one discard or write-zeroes segment (128 MiB), for
/// a host that has to write the zeros.
pub(super) const MAX_CLEAR_SECTORS: u32 = 1 << 18;
/// The only flag of a write-zeroes segment: the device may unmap it.
const UNMAP: u32 = 1;
/// Bytes of a disk's name in the reply to `VIRTIO_BLK_T_GET_ID`.
const ID: usize = 20;

/// The header of `struct virtio_blk_req`.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(FromBytes, IntoBytes)]
#[repr(C)]
struct Segment {
    sector: U64,
    num_sectors: U32,
    flags: U32,
}

/// A request of the driver, without its header.
struct Request {
    head: u16,
    kind: u32,
    sector: u64,
    /// The device-readable buffers after the header.
    readable: Vec<Buffer>,
    /// The device-writable buffers without the status byte at their end.
    writable: Vec<Buffer>,
    status: GuestAddress,
}

impl Request {
    /// Parses a chain. The driver may split its parts anywhere (§2.7.4.1).
    fn parse(view: &DmaView<'_>, chain: Chain) -> Result<Self, QueueError> {
        let Chain {
            head,
            mut readable,
            mut writable,
        } = chain;
        let status =
            take_last_byte(&mut writable).ok_or(QueueError("a request has no status byte"))?;
        let mut header = Header::new_zeroed();
        if !take_front(view, &mut readable, header.as_mut_bytes()) {
            return Err(QueueError("a request has no header"));
        }
        Ok(Self {
            head,
            kind: header.kind.get(),
            sector: header.sector.get(),
            readable,
            writable,
            status,
        })
    }

    fn writes(&self) -> bool {
        matches!(
            self.kind,
            VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
        )
    }
}

/// Removes the last device-writable byte, the status. Returns its address.
fn take_last_byte(writable: &mut Vec<Buffer>) -> Option<GuestAddress> {
    while writable.last().is_some_and(|buffer| buffer.len == 0) {
        writable.pop();
    }
    let last = writable.last_mut()?;
    last.len -= 1;
    let at = last.at.0.checked_add(u64::from(last.len))?;
    Some(GuestAddress(at))
}

/// Removes bytes from the front of the buffers to fill `bytes`. `false` when
/// there are fewer, or they are not in memory.
fn take_front(view: &DmaView<'_>, readable: &mut [Buffer], bytes: &mut [u8]) -> bool {
    let mut rest = bytes;
    for buffer in readable {
        let take = rest.len().min(buffer.len as usize);
        let (now, later) = rest.split_at_mut(take);
        if view.read_slice(now, buffer.at).is_err() {
            return false;
        }
        // The access did not wrap, so this is 2^64 at most, which is 0.
        buffer.at.0 = buffer.at.0.wrapping_add(take as u64);
        buffer.len -= u32::try_from(take).unwrap_or(buffer.len);
        rest = later;
    }
    rest.is_empty()
}

/// Removes up to `most` bytes from the front of a buffer. `None` when the
/// buffer ends beyond 2^64.
fn take_part(rest: &mut Buffer, most: u32) -> Option<Buffer> {
    rest.at
        .0
        .checked_add(u64::from(rest.len.saturating_sub(1)))?;
    let part = Buffer {
        at: rest.at,
        len: rest.len.min(most),
    };
    // A buffer may end with the last byte of the address space.
    rest.at.0 = rest.at.0.wrapping_add(u64::from(part.len));
    rest.len -= part.len;
    Some(part)
}

/// Error of a request.
enum Refusal {
    /// The queue is being stopped.
    Stopping,
    /// The request's type is unknown or not offered.
    Unsupported,
    /// The request breaks the rule that the text names.
    Invalid(&'static str),
    /// The host's storage failed.
    Host(io::Error),
}

/// Result of serving a queue's next request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// No request is available, or the queue is being stopped and the request
    /// stays in it.
    Nothing,
    /// The request is in the used ring.
    Done {
        /// The driver requires an interrupt for it (§2.7.7).
        interrupt: bool,
    },
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Host(error)
    }
}

const OUTSIDE: Refusal = Refusal::Invalid("its buffers are not in memory");

/// Executes requests on an image, one after the other.
pub struct Disk {
    image: Image,
    name: String,
    counters: Arc<BlockCounters>,
    /// An error of the host's storage was logged as a warning.
    logged: bool,
}

impl Disk {
    /// The disk over `image`. `name` is for the log and for the guest, which
    /// reads its first 20 bytes.
    #[must_use]
    pub fn new(name: &str, image: Image) -> Self {
        Self {
            image,
            name: name.to_owned(),
            counters: Arc::default(),
            logged: false,
        }
    }

    /// The image that requests access.
    #[must_use]
    pub fn image(&self) -> &Image {
        &self.image
    }

    /// Counters of the executed requests.
    #[must_use]
    pub fn counters(&self) -> &Arc<BlockCounters> {
        &self.counters
    }

    /// Executes the next request of `queue`. Once `leave` is set, a request
    /// whose data is not yet transferred stays in the queue: it is executed
    /// from its beginning when the queue starts from that position again.
    ///
    /// The stream's gate is held for at most `SIZE_MAX` bytes of a transfer,
    /// and not while the host flushes or clears. An unmap of the guest waits
    /// for no more than that.
    ///
    /// # Errors
    /// The rule that the driver broke, when no status can report it.
    pub fn serve(
        &mut self,
        queue: &mut Queue,
        dma: &DmaSpace,
        leave: &AtomicBool,
    ) -> Result<Served, QueueError> {
        let mut request = {
            let view = dma.view();
            let Some(chain) = Chain::take(queue, &view, MAX_DESCRIPTORS)? else {
                return Ok(Served::Nothing);
            };
            Request::parse(&view, chain)?
        };
        let Some((status, written)) = self.answer(dma, &mut request, leave) else {
            queue.set_next_avail(queue.next_avail().wrapping_sub(1));
            return Ok(Served::Nothing);
        };
        let view = dma.view();
        let [status, ..] = status.to_le_bytes();
        view.write_obj(status, request.status)
            .map_err(|_| QueueError("a request's status byte is not in memory"))?;
        // The length of a chain is below 4 GiB.
        let written = u32::try_from(written + 1).unwrap_or(u32::MAX);
        queue.add_used(&view, request.head, written)?;
        let interrupt = queue.needs_notification(&view)?;
        Ok(Served::Done { interrupt })
    }

    /// Executes a request. Returns its status and the number of bytes written
    /// to the guest; `None` when it was interrupted because the queue is
    /// stopped.
    fn answer(
        &mut self,
        dma: &DmaSpace,
        request: &mut Request,
        leave: &AtomicBool,
    ) -> Option<(u32, u64)> {
        let result = self.perform(dma, request, leave);
        if matches!(result, Err(Refusal::Stopping)) {
            return None;
        }
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        let refusal = match result {
            Ok(written) => return Some((VIRTIO_BLK_S_OK, written)),
            Err(refusal) => refusal,
        };
        self.counters.errors.fetch_add(1, Ordering::Relaxed);
        let name = &self.name;
        match refusal {
            Refusal::Stopping => return None,
            Refusal::Unsupported => return Some((VIRTIO_BLK_S_UNSUPP, 0)),
            Refusal::Invalid(what) => debug!("{name}: a request is refused: {what}"),
            // Only the first is a warning: a full disk fails every write.
            Refusal::Host(error) if !self.logged => {
                warn!("{name}: a request failed on the host: {error}");
                self.logged = true;
            }
            Refusal::Host(error) => debug!("{name}: a request failed on the host: {error}"),
        }
        Some((VIRTIO_BLK_S_IOERR, 0))
    }

    fn perform(
        &mut self,
        dma: &DmaSpace,
        request: &mut Request,
        leave: &AtomicBool,
    ) -> Result<u64, Refusal> {
        if request.writes() && self.image.read_only() {
            return Err(Refusal::Invalid("the disk is read-only"));
        }
        match request.kind {
            VIRTIO_BLK_T_IN => {
                self.transfer(dma, request, Permissions::Write, leave)?;
                let read = total(&request.writable);
                self.counters.read_bytes.fetch_add(read, Ordering::Relaxed);
                Ok(read)
            }
            VIRTIO_BLK_T_OUT => {
                self.transfer(dma, request, Permissions::Read, leave)?;
                let written = total(&request.readable);
                let counter = &self.counters.written_bytes;
                counter.fetch_add(written, Ordering::Relaxed);
                Ok(0)
            }
            VIRTIO_BLK_T_FLUSH => {
                self.image.flush()?;
                Ok(0)
            }
            VIRTIO_BLK_T_GET_ID => self.write_name(dma, &request.writable),
            VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
                let mut segment = Segment::new_zeroed();
                let bytes = segment.as_mut_bytes();
                let whole = take_front(&dma.view(), &mut request.readable, bytes);
                if !whole || total(&request.readable) != 0 {
                    return Err(Refusal::Invalid("it needs exactly one segment"));
                }
                self.clear(&segment, request.kind == VIRTIO_BLK_T_DISCARD)?;
                Ok(0)
            }
            _ => Err(Refusal::Unsupported),
        }
    }

    /// Transfers whole sectors between the image and the buffers, which may
    /// have any number of mappings; `access` is the access to guest memory.
    /// Each [`SIZE_MAX`] bytes have a view of their own.
    fn transfer(
        &mut self,
        dma: &DmaSpace,
        request: &Request,
        access: Permissions,
        leave: &AtomicBool,
    ) -> Result<(), Refusal> {
        let buffers = match access {
            Permissions::Write => &request.writable,
            _ => &request.readable,
        };
        let bytes = total(buffers);
        if bytes > MAX_REQUEST {
            return Err(Refusal::Invalid("it is longer than the device offers"));
        }
        let offset = self.image.offset(request.sector, bytes);
        let offset = offset.ok_or(Refusal::Invalid("it goes beyond the disk"))?;
        self.image.seek(offset)?;
        let mut view = dma.view();
        let mut left = SIZE_MAX;
        for buffer in buffers {
            let mut rest = *buffer;
            while rest.len != 0 {
                if left == 0 {
                    drop(view);
                    if leave.load(Ordering::Acquire) {
                        return Err(Refusal::Stopping);
                    }
                    view = dma.view();
                    left = SIZE_MAX;
                }
                let part = take_part(&mut rest, left).ok_or(OUTSIDE)?;
                self.move_part(&view, part, access)?;
                left -= part.len;
            }
        }
        Ok(())
    }

    fn move_part(
        &mut self,
        view: &DmaView<'_>,
        part: Buffer,
        access: Permissions,
    ) -> Result<(), Refusal> {
        let slices = view.get_slices(part.at, part.len as usize, access);
        for slice in slices.map_err(|_| OUTSIDE)? {
            let mut slice = slice.map_err(|_| OUTSIDE)?;
            match access {
                Permissions::Write => self.image.read(&mut slice)?,
                _ => self.image.write(&slice)?,
            }
        }
        Ok(())
    }

    /// Writes the name, padded with zeros (§5.2.6.1).
    fn write_name(&self, dma: &DmaSpace, writable: &[Buffer]) -> Result<u64, Refusal> {
        let mut id = [0; ID];
        for (to, from) in id.iter_mut().zip(self.name.bytes()) {
            *to = from;
        }
        let written = scatter(&dma.view(), writable, &id).map_err(|_| OUTSIDE)?;
        Ok(written as u64)
    }

    /// Discards or clears one segment.
    fn clear(&mut self, segment: &Segment, discard: bool) -> Result<(), Refusal> {
        let (count, flags) = (segment.num_sectors.get(), segment.flags.get());
        if flags & !UNMAP != 0 || discard && flags != 0 {
            return Err(Refusal::Unsupported);
        }
        if count > MAX_CLEAR_SECTORS {
            return Err(Refusal::Invalid("its segment is too long"));
        }
        let bytes = u64::from(count) * SECTOR;
        let offset = self.image.offset(segment.sector.get(), bytes);
        let offset = offset.ok_or(Refusal::Invalid("its segment goes beyond the disk"))?;
        if bytes == 0 {
            return Ok(());
        }
        let given_back = if discard || flags & UNMAP != 0 {
            self.image.discard(offset, bytes)?
        } else {
            false
        };
        if !given_back && !discard {
            self.image.zero(offset, bytes)?;
        }
        Ok(())
    }
}
