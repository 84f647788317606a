//! Loads a `bzImage` that has a 64-bit entry (Linux
//! `Documentation/arch/x86/boot.rst`). It decompresses itself, with any
//! compression.

use linux_loader::loader::bootparam::setup_header;
use vm_memory::{ByteValued, GuestMemoryBackend};

use super::image::{Image, ImageEntry, PAGE};
use crate::kernel::{self, Error, KernelFile};
use crate::x86_64::layout;

/// Offset of the setup header in the file.
const SETUP_HEADER: u64 = 0x1F1;
const SECTOR: u64 = 512;
/// The first protocol version with `xloadflags`.
const VERSION_2_12: u16 = 0x20C;
const XLF_KERNEL_64: u16 = 1;
/// `loadflags`: the protected-mode code is loaded at or above 1 MiB.
const LOADED_HIGH: u8 = 1;

pub(super) fn load<M: GuestMemoryBackend, K: KernelFile>(
    memory: &M,
    file: &mut K,
    size: u64,
    low_end: u64,
) -> Result<Image, Error> {
    let mut header = setup_header::default();
    let bytes = kernel::read_at(file, size, SETUP_HEADER, size_of::<setup_header>())?;
    header.as_mut_slice().copy_from_slice(&bytes);
    check(&header)?;
    let sectors = match header.setup_sects {
        0 => 4,
        count => u64::from(count),
    };
    let code = (sectors + 1) * SECTOR;
    let code_size = u64::from(header.syssize) * 16;
    let payload_end = u64::from(header.payload_offset) + u64::from(header.payload_length);
    let need = code + code_size.max(payload_end);
    if size < need {
        return Err(Error::Truncated { have: size, need });
    }
    // The kernel's preferred address: it then decompresses in place.
    let start = header.pref_address.max(layout::HIMEM);
    let room = (size - code).max(u64::from(header.init_size));
    let end = start.checked_add(room).filter(|&end| end <= low_end);
    let end = end.ok_or_else(|| kernel::does_not_fit(room, start, low_end))?;
    kernel::copy(memory, file, code, start, size - code)?;
    // Low RAM ends below 4 GiB.
    header.code32_start = u32::try_from(start).unwrap_or(u32::MAX);
    Ok(Image {
        end: end.next_multiple_of(PAGE),
        initrd_limit: u64::from(header.initrd_addr_max) + 1,
        cmdline_max: usize::try_from(header.cmdline_size).unwrap_or(layout::MAX_CMDLINE),
        entry: ImageEntry::Linux64(header),
    })
}

/// Refuses a kernel without a usable 64-bit entry.
fn check(header: &setup_header) -> Result<(), Error> {
    let unsupported = |why: &str| Err(Error::Unsupported(why.into()));
    if header.version < VERSION_2_12 || header.xloadflags & XLF_KERNEL_64 == 0 {
        return unsupported("the bzImage has no 64-bit entry");
    }
    if header.loadflags & LOADED_HIGH == 0 {
        return unsupported("it is a zImage; a bzImage is needed");
    }
    if header.relocatable_kernel == 0 {
        return unsupported("the bzImage is not relocatable (CONFIG_RELOCATABLE)");
    }
    Ok(())
}
