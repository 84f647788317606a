//! Puts a kernel, its initial ramdisk, boot parameters and ACPI tables into
//! guest memory.
//!
//! An uncompressed `vmlinux` starts by PVH (xen `start_info.h`), a `bzImage` by
//! the 64-bit boot protocol (Linux `Documentation/arch/x86/boot.rst`).

mod bzimage;
mod elf;
mod image;

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::loader::elf::start_info::{
    XEN_HVM_MEMMAP_TYPE_ACPI, XEN_HVM_MEMMAP_TYPE_RAM, XEN_HVM_MEMMAP_TYPE_RESERVED,
    XEN_HVM_START_MAGIC_VALUE, hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::Error;
use crate::kernel::{self, Format, KernelFile};
use crate::platform::{Initrd, Platform, PowerPorts, Range};
pub use crate::x86_64::cpu::Entry;
use crate::x86_64::{acpi, cpu, layout};
use image::{Image, ImageEntry, PAGE};

const FORMATS: &str = "an ELF vmlinux or a bzImage is needed";
/// Offset of the 64-bit entry in the protected-mode code.
const ENTRY_64: u64 = 0x200;
/// `type_of_loader` of a boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xFF;

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
    let low_end = platform.ram.first().map_or(0, Range::end);
    let image = load_kernel(memory, kernel, low_end).map_err(Error::Kernel)?;
    let initrd = initrd
        .map(|file| kernel::load_initrd(memory, file, |size| place_initrd(size, &image, low_end)))
        .transpose()
        .map_err(Error::Initrd)?;
    write_cmdline(memory, platform, image.cmdline_max)?;
    let tables = acpi::tables(platform, layout::ACPI)?;
    memory.write_slice(&tables, GuestAddress(layout::ACPI.base))?;
    write_reset_vector(memory)?;
    match image.entry {
        ImageEntry::Pvh(ip) => {
            write_start_info(memory, platform, initrd)?;
            Ok(Entry::Pvh {
                ip,
                start_info: layout::PVH_INFO,
            })
        }
        ImageEntry::Linux64(header) => {
            write_zero_page(memory, platform, initrd, header)?;
            write_page_tables(memory)?;
            let ip = u64::from(header.code32_start) + ENTRY_64;
            Ok(Entry::Linux64 {
                ip,
                zero_page: layout::ZERO_PAGE,
            })
        }
    }
}

fn load_kernel<M: GuestMemoryBackend, K: KernelFile>(
    memory: &M,
    file: &mut K,
    low_end: u64,
) -> Result<Image, kernel::Error> {
    let probe = kernel::probe(file)?;
    match &probe.format {
        format @ Format::Elf(_) if format.architecture().as_deref() == Some("x86_64") => {
            elf::load(memory, file, &probe, low_end)
        }
        Format::BzImage => bzimage::load(memory, file, probe.size, low_end),
        other => Err(kernel::refuse(other, "x86_64", FORMATS)),
    }
}

/// Address of an initial ramdisk of `size` bytes: the highest that the kernel and RAM allow.
fn place_initrd(size: u64, image: &Image, low_end: u64) -> Result<u64, kernel::Error> {
    let (end, limit) = (image.end, image.initrd_limit);
    if limit < end {
        return Err(kernel::Error::NoPlace { limit, end });
    }
    let top = limit.min(low_end);
    top.checked_sub(size)
        .map(|base| base & !(PAGE - 1))
        .filter(|&base| base >= end)
        .ok_or_else(|| kernel::does_not_fit(size, end, top))
}

fn write_cmdline<M: GuestMemoryBackend>(
    memory: &M,
    platform: &Platform,
    max: usize,
) -> Result<(), Error> {
    let room = usize::try_from(layout::CMDLINE.size - 1).unwrap_or(0);
    Error::check_cmdline(&platform.cmdline, max.min(room))?;
    let mut bytes = platform.cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, GuestAddress(layout::CMDLINE.base))?;
    Ok(())
}

/// The memory map as firmware reports it: (range, type). The type numbers of PVH and E820 are the
/// same.
fn memory_map(platform: &Platform) -> Vec<(Range, u32)> {
    let mut map = vec![
        (Range::new(0, layout::EBDA), XEN_HVM_MEMMAP_TYPE_RAM),
        (layout::ACPI, XEN_HVM_MEMMAP_TYPE_ACPI),
        (layout::FIRMWARE, XEN_HVM_MEMMAP_TYPE_RESERVED),
    ];
    for (index, ram) in platform.ram.iter().enumerate() {
        let start = if index == 0 { layout::HIMEM } else { ram.base };
        map.push((
            Range::new(start, ram.end() - start),
            XEN_HVM_MEMMAP_TYPE_RAM,
        ));
    }
    if let Some(pci) = &platform.pci {
        map.push((pci.ecam, XEN_HVM_MEMMAP_TYPE_RESERVED));
    }
    map.sort_by_key(|(range, _)| range.base);
    map
}

fn write_start_info<M: GuestMemoryBackend>(
    memory: &M,
    platform: &Platform,
    initrd: Option<Initrd>,
) -> Result<(), Error> {
    let map = memory_map(platform);
    let modules = layout::PVH_INFO + size_of::<hvm_start_info>() as u64;
    let map_start = modules + size_of::<hvm_modlist_entry>() as u64;
    let mut info = hvm_start_info {
        magic: XEN_HVM_START_MAGIC_VALUE,
        version: 1,
        cmdline_paddr: layout::CMDLINE.base,
        rsdp_paddr: layout::ACPI.base,
        memmap_paddr: map_start,
        memmap_entries: u32::try_from(map.len()).unwrap_or(0),
        ..hvm_start_info::default()
    };
    if let Some(initrd) = initrd {
        info.nr_modules = 1;
        info.modlist_paddr = modules;
        let module = hvm_modlist_entry {
            paddr: initrd.base,
            size: initrd.size,
            ..hvm_modlist_entry::default()
        };
        memory.write_obj(module, GuestAddress(modules))?;
    }
    memory.write_obj(info, GuestAddress(layout::PVH_INFO))?;
    let mut at = map_start;
    for (range, type_) in map {
        let entry = hvm_memmap_table_entry {
            addr: range.base,
            size: range.size,
            type_,
            reserved: 0,
        };
        memory.write_obj(entry, GuestAddress(at))?;
        at += size_of::<hvm_memmap_table_entry>() as u64;
    }
    Ok(())
}

fn write_zero_page<M: GuestMemoryBackend>(
    memory: &M,
    platform: &Platform,
    initrd: Option<Initrd>,
    header: setup_header,
) -> Result<(), Error> {
    let low = |value: u64| u32::try_from(value & 0xFFFF_FFFF).unwrap_or(0);
    let mut params = boot_params {
        hdr: header,
        ..boot_params::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = low(layout::CMDLINE.base);
    params.acpi_rsdp_addr = layout::ACPI.base;
    if let Some(initrd) = initrd {
        params.hdr.ramdisk_image = low(initrd.base);
        params.hdr.ramdisk_size = low(initrd.size);
        params.ext_ramdisk_image = low(initrd.base >> 32);
        params.ext_ramdisk_size = low(initrd.size >> 32);
    }
    let mut table = params.e820_table;
    let map = memory_map(platform);
    for (slot, (range, type_)) in table.iter_mut().zip(&map) {
        *slot = boot_e820_entry {
            addr: range.base,
            size: range.size,
            r#type: *type_,
        };
    }
    params.e820_entries = u8::try_from(map.len().min(table.len())).unwrap_or(0);
    params.e820_table = table;
    write_seed(memory, &platform.seed)?;
    params.hdr.setup_data = layout::SETUP_DATA;
    memory.write_obj(params, GuestAddress(layout::ZERO_PAGE))?;
    Ok(())
}

/// Writes a `struct setup_data`: next, type, length, data.
fn write_seed<M: GuestMemoryBackend>(memory: &M, seed: &[u8; 32]) -> Result<(), Error> {
    const SETUP_RNG_SEED: u32 = 9;
    let mut data = 0u64.to_le_bytes().to_vec();
    data.extend(SETUP_RNG_SEED.to_le_bytes());
    data.extend(32u32.to_le_bytes());
    data.extend(seed);
    memory.write_slice(&data, GuestAddress(layout::SETUP_DATA))?;
    Ok(())
}

/// Writes the code of a BIOS's real-mode entry: a jump there resets.
///
/// Linux restarts a hardware-reduced machine through EFI and, without EFI, by entering the BIOS; it
/// does not reach ACPI's reset register.
fn write_reset_vector<M: GuestMemoryBackend>(memory: &M) -> Result<(), Error> {
    let Some(ports) = layout::POWER else {
        return Ok(());
    };
    let [low, high] = ports.reset.to_le_bytes();
    let code = [
        0xBA,
        low,
        high, // mov dx, port
        0xB0,
        PowerPorts::RESET_VALUE, // mov al, value
        0xEE,                    // out dx, al
        0xF4,                    // hlt
        0xEB,
        0xFD, // jmp to the hlt
    ];
    memory.write_slice(&code, GuestAddress(layout::RESET_VECTOR))?;
    Ok(())
}

/// Maps the first four GiB onto themselves in 2 MiB pages, and writes the GDT.
fn write_page_tables<M: GuestMemoryBackend>(memory: &M) -> Result<(), Error> {
    const PRESENT_WRITABLE: u64 = 0b11;
    const LARGE: u64 = 1 << 7;
    const GIB: u64 = 4;
    let pdpt = layout::PAGE_TABLES + PAGE;
    memory.write_obj(pdpt | PRESENT_WRITABLE, GuestAddress(layout::PAGE_TABLES))?;
    for gib in 0..GIB {
        let directory = pdpt + PAGE * (gib + 1);
        memory.write_obj(directory | PRESENT_WRITABLE, GuestAddress(pdpt + gib * 8))?;
        let entries: Vec<u8> = (0..512u64)
            .flat_map(|i| ((gib << 30 | i << 21) | LARGE | PRESENT_WRITABLE).to_le_bytes())
            .collect();
        memory.write_slice(&entries, GuestAddress(directory))?;
    }
    for (index, descriptor) in cpu::GDT.iter().enumerate() {
        memory.write_obj(*descriptor, GuestAddress(layout::GDT + 8 * index as u64))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
