//! The header of an arm64 `Image` (Linux `Documentation/arch/arm64/booting.rst`)
//! and the PE header in it.

use std::io::{Read, Seek};

use crate::aarch64::layout;
use crate::kernel::{self, Error, u16_at, u32_at, u64_at};
use crate::platform::Range;

/// Offset of the image from a 2 MiB boundary when its header is too old to give
/// it (Linux before 3.17).
pub(super) const OLD_TEXT_OFFSET: u64 = 0x8_0000;
/// Length of the arm64 header.
const HEADER: u64 = 64;

/// Compares the file's length with the end of the sections in its PE header;
/// the arm64 header itself gives the size in memory only. An image without a
/// PE header (no EFI stub) cannot be checked.
pub(super) fn check_complete<K: Read + Seek>(
    file: &mut K,
    head: &[u8],
    size: u64,
) -> Result<(), Error> {
    const PE_HEADER: u64 = 24;
    const SECTION: usize = 40;
    /// Upper bound on sections (PE format §3.3.1).
    const MAX_SECTIONS: u16 = 96;
    let pe = u64::from(if head.starts_with(b"MZ") {
        u32_at(head, 0x3C).unwrap_or(0)
    } else {
        0
    });
    let truncated = |need| Error::Truncated { have: size, need };
    let need = HEADER.max(pe + PE_HEADER);
    if size < need {
        return Err(truncated(need));
    }
    let header = usize::try_from(pe).ok().and_then(|pe| head.get(pe..));
    let Some(header) = header.filter(|header| header.starts_with(b"PE\0\0")) else {
        return Ok(());
    };
    let (Some(sections), Some(optional)) = (u16_at(header, 6), u16_at(header, 20)) else {
        return Ok(());
    };
    if sections > MAX_SECTIONS {
        return Err(Error::Unsupported(format!(
            "its PE header has {sections} sections; at most {MAX_SECTIONS} are read"
        )));
    }
    let table = pe + PE_HEADER + u64::from(optional);
    let table = kernel::read_at(file, size, table, usize::from(sections) * SECTION)?;
    let ends = table.chunks_exact(SECTION).map(|section| {
        let word = |at| u64::from(u32_at(section, at).unwrap_or(0));
        word(16) + word(20)
    });
    match ends.max() {
        Some(need) if need > size => Err(truncated(need)),
        _ => Ok(()),
    }
}

/// Range of an image with this header: from its first byte to the end of its
/// BSS. `size` is the length of the file, a lower bound of the range's.
pub(super) fn place(head: &[u8], size: u64, ram_end: u64) -> Result<Range, Error> {
    const BIG_ENDIAN: u64 = 1;
    let word = |at| u64_at(head, at).unwrap_or(0);
    let (text_offset, image_size, flags) = (word(8), word(16), word(24));
    if flags & BIG_ENDIAN != 0 {
        return Err(Error::Unsupported("it is a big-endian kernel".into()));
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
