//! One request (virtio 1.2 §5.2.6).

use std::io;
use std::sync::atomic::Ordering;

use iommu::DmaView;
use log::{debug, warn};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes as _, GuestAddress, GuestMemory as _, Permissions};

use super::image::{Image, SECTOR};
use super::{BlockCounters, MAX_CLEAR_SECTORS};

/// Bytes of the header: type, reserved, sector.
const HEADER: usize = 16;
/// Bytes of a discard or write-zeroes segment: sector, count, flags.
const SEGMENT: u64 = 16;
/// The only flag of a write-zeroes segment: it may be unmapped.
const UNMAP: u32 = 1;
/// Bytes of a disk's ID.
const ID: &[u8; 20] = b"portcullis\0\0\0\0\0\0\0\0\0\0";

/// A buffer of the chain.
#[derive(Clone, Copy)]
struct Buffer {
    at: GuestAddress,
    len: u64,
}

/// Why a request could not be carried out: its status.
enum Refusal {
    Unsupported,
    /// The disk, or the request, is at fault.
    Failed(io::Error),
}

impl From<io::Error> for Refusal {
    fn from(error: io::Error) -> Self {
        Self::Failed(error)
    }
}

fn invalid(what: &'static str) -> Refusal {
    Refusal::Failed(io::Error::new(io::ErrorKind::InvalidInput, what))
}

/// Carries out one request and writes its status. Returns how many bytes were
/// written to the guest, or what is wrong with a chain that has no status.
pub(super) fn execute(
    view: &DmaView<'_>,
    chain: DescriptorChain<&DmaView<'_>>,
    image: &mut Image,
    counters: &BlockCounters,
) -> Result<u32, &'static str> {
    let mut given = Vec::new();
    let mut room = Vec::new();
    for descriptor in chain {
        let buffer = Buffer {
            at: descriptor.addr(),
            len: u64::from(descriptor.len()),
        };
        if descriptor.is_write_only() {
            room.push(buffer);
        } else {
            given.push(buffer);
        }
    }
    if view.take_fault().is_some() {
        return Err("a descriptor is not in memory");
    }
    let status_at = take_last_byte(&mut room).ok_or("a request has no status byte")?;
    let header = take_header(view, &mut given).ok_or("a request has no header")?;
    counters.requests.fetch_add(1, Ordering::Relaxed);
    let outcome = perform(view, &header, &given, &room, image);
    let (status, written) = match outcome {
        Ok(Moved { read, written }) => {
            counters.read_bytes.fetch_add(read, Ordering::Relaxed);
            counters.written_bytes.fetch_add(written, Ordering::Relaxed);
            (VIRTIO_BLK_S_OK, read)
        }
        Err(Refusal::Unsupported) => (VIRTIO_BLK_S_UNSUPP, 0),
        Err(Refusal::Failed(error)) => {
            // Once as a warning: a full disk fails every write.
            if counters.errors.fetch_add(1, Ordering::Relaxed) == 0 {
                warn!("a disk request failed: {error}");
            } else {
                debug!("a disk request failed: {error}");
            }
            (VIRTIO_BLK_S_IOERR, 0)
        }
    };
    // A fault of the data is the request's error, told by its status.
    view.take_fault();
    let status = u8::try_from(status).unwrap_or(1);
    view.write_obj(status, status_at)
        .map_err(|_| "a request's status byte is not in memory")?;
    u32::try_from(written + 1).map_err(|_| "a request is too long")
}

/// Takes the byte that the device writes last.
fn take_last_byte(room: &mut Vec<Buffer>) -> Option<GuestAddress> {
    while room.last().is_some_and(|buffer| buffer.len == 0) {
        room.pop();
    }
    let last = room.last_mut()?;
    last.len -= 1;
    last.at.0.checked_add(last.len).map(GuestAddress)
}

/// Takes the header off the front of what the driver gave.
fn take_header(view: &DmaView<'_>, given: &mut [Buffer]) -> Option<[u8; HEADER]> {
    let mut header = [0; HEADER];
    let mut rest = header.as_mut_slice();
    for buffer in given {
        let take = usize::try_from(buffer.len).ok()?.min(rest.len());
        let (now, later) = rest.split_at_mut(take);
        view.read_slice(now, buffer.at).ok()?;
        buffer.at.0 = buffer.at.0.checked_add(take as u64)?;
        buffer.len -= take as u64;
        rest = later;
    }
    rest.is_empty().then_some(header)
}

/// Bytes that went to the guest and came from it.
struct Moved {
    read: u64,
    written: u64,
}

impl Moved {
    const NOTHING: Self = Self {
        read: 0,
        written: 0,
    };
}

fn perform(
    view: &DmaView<'_>,
    header: &[u8; HEADER],
    given: &[Buffer],
    room: &[Buffer],
    image: &mut Image,
) -> Result<Moved, Refusal> {
    let [a, b, c, d, _, _, _, _, sector @ ..] = *header;
    let kind = u32::from_le_bytes([a, b, c, d]);
    let sector = u64::from_le_bytes(sector);
    let total = |buffers: &[Buffer]| buffers.iter().map(|buffer| buffer.len).sum::<u64>();
    let writes = matches!(
        kind,
        VIRTIO_BLK_T_OUT | VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES
    );
    if writes && image.read_only() {
        return Err(invalid("the disk is read-only"));
    }
    match kind {
        VIRTIO_BLK_T_IN => {
            let read = total(room);
            transfer(view, room, image, sector, Direction::ToGuest)?;
            Ok(Moved { read, written: 0 })
        }
        VIRTIO_BLK_T_OUT => {
            let written = total(given);
            transfer(view, given, image, sector, Direction::ToDisk)?;
            Ok(Moved { read: 0, written })
        }
        VIRTIO_BLK_T_FLUSH => {
            image.flush()?;
            Ok(Moved::NOTHING)
        }
        VIRTIO_BLK_T_GET_ID => {
            let mut id = ID.as_slice();
            for buffer in room {
                let take = id.len().min(usize::try_from(buffer.len).unwrap_or(0));
                let (now, later) = id.split_at(take);
                let put = view.write_slice(now, buffer.at);
                put.map_err(|_| invalid("its buffer is not in memory"))?;
                id = later;
            }
            let read = (ID.len() - id.len()) as u64;
            Ok(Moved { read, written: 0 })
        }
        VIRTIO_BLK_T_DISCARD | VIRTIO_BLK_T_WRITE_ZEROES => {
            clear(view, given, image, kind == VIRTIO_BLK_T_DISCARD)?;
            Ok(Moved::NOTHING)
        }
        _ => Err(Refusal::Unsupported),
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Direction {
    ToGuest,
    ToDisk,
}

/// Moves whole sectors between the image and the buffers, which may be
/// scattered over any number of mappings.
fn transfer(
    view: &DmaView<'_>,
    buffers: &[Buffer],
    image: &mut Image,
    sector: u64,
    direction: Direction,
) -> Result<(), Refusal> {
    let bytes = buffers.iter().map(|buffer| buffer.len).sum();
    let offset = image.offset(sector, bytes);
    let offset = offset.ok_or_else(|| invalid("a request goes beyond the disk"))?;
    let access = match direction {
        Direction::ToGuest => Permissions::Write,
        Direction::ToDisk => Permissions::Read,
    };
    let outside = |_| invalid("its buffer is not in memory");
    image.seek(offset)?;
    for buffer in buffers {
        let len = usize::try_from(buffer.len).map_err(|_| invalid("a buffer is too long"))?;
        for slice in view.get_slices(buffer.at, len, access).map_err(outside)? {
            let mut slice = slice.map_err(outside)?;
            match direction {
                Direction::ToGuest => image.read(&mut slice)?,
                Direction::ToDisk => image.write(&slice)?,
            }
        }
    }
    Ok(())
}

/// A discard or write-zeroes segment (§5.2.6.2): one a request.
fn clear(
    view: &DmaView<'_>,
    given: &[Buffer],
    image: &mut Image,
    discard: bool,
) -> Result<(), Refusal> {
    let segment = given.iter().find(|buffer| buffer.len != 0);
    let segment = segment.filter(|buffer| buffer.len == SEGMENT);
    let segment = segment.ok_or_else(|| invalid("it needs exactly one segment"))?;
    let outside = |_| invalid("its segment is not in memory");
    let first: u64 = view.read_obj(segment.at).map_err(outside)?;
    let rest = GuestAddress(segment.at.0.wrapping_add(8));
    let [count, flags]: [u32; 2] = view.read_obj(rest).map_err(outside)?;
    let (first, count) = (u64::from_le(first), u32::from_le(count));
    let flags = u32::from_le(flags);
    if flags & !UNMAP != 0 || discard && flags != 0 {
        return Err(Refusal::Unsupported);
    }
    if count > MAX_CLEAR_SECTORS {
        return Err(invalid("its segment is longer than the disk allows"));
    }
    let bytes = u64::from(count) * SECTOR;
    let offset = image.offset(first, bytes);
    let offset = offset.ok_or_else(|| invalid("a segment goes beyond the disk"))?;
    if bytes == 0 {
        return Ok(());
    }
    if discard || flags & UNMAP != 0 {
        image.discard(offset, bytes)?;
    } else {
        image.zero(offset, bytes)?;
    }
    Ok(())
}
