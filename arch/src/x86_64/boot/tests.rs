use std::io::Cursor;

use vm_memory::GuestMemoryMmap;

use super::*;
use crate::testing::Sparse;

type Memory = GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;

fn machine(mib: u64, cmdline: &str) -> (Memory, Platform) {
    let ram = layout::ram_ranges(mib * MIB).unwrap();
    let ranges: Vec<_> = ram
        .iter()
        .map(|range| {
            (
                GuestAddress(range.base),
                usize::try_from(range.size).unwrap(),
            )
        })
        .collect();
    let platform = Platform {
        cpus: 1,
        caches: Vec::new(),
        ram,
        cmdline: cmdline.into(),
        seed: [0x5A; 32],
        serial: layout::SERIAL,
        rtc: layout::RTC,
        pci: None,
        iommu: None,
    };
    (Memory::from_ranges(&ranges).unwrap(), platform)
}

/// A bzImage: one setup sector, 64-bit entry, `code` as protected-mode code.
fn bzimage(code: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 1024];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0x1F1, &[1]);
    put(
        0x1F4,
        &u32::try_from(code.len() / 16).unwrap().to_le_bytes(),
    );
    put(0x202, b"HdrS");
    put(0x206, &0x20Fu16.to_le_bytes());
    put(0x211, &[1]);
    put(0x22C, &0x7FFF_FFFFu32.to_le_bytes());
    put(0x234, &[1]);
    put(0x236, &1u16.to_le_bytes());
    put(0x238, &32u32.to_le_bytes());
    put(0x258, &(16 * MIB).to_le_bytes());
    put(0x260, &u32::try_from(32 * MIB).unwrap().to_le_bytes());
    file.extend_from_slice(code);
    file
}

/// A vmlinux of one segment at 16 MiB with a PVH note, entered at 16 MiB + 0x40.
fn vmlinux(with_note: bool) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"\x7fELF\x02\x01\x01");
    put(16, &[2, 0, 62, 0, 1, 0, 0, 0]);
    put(24, &(16 * MIB).to_le_bytes());
    put(32, &64u64.to_le_bytes());
    put(52, &[64, 0, 56, 0, 2, 0]);
    put(64, &segment(1, 0x800, 16 * MIB, 0x800, 8 * MIB));
    let note = if with_note { 4 } else { 0 };
    put(120, &segment(note, 0x200, 0, 20, 20));
    put(0x200, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(0x20C, b"Xen\0");
    put(
        0x210,
        &u32::try_from(16 * MIB + 0x40).unwrap().to_le_bytes(),
    );
    put(0x800, b"kernel text");
    file
}

/// A program header of a vmlinux: type, offset, address, size in the file and
/// in memory.
fn segment(kind: u32, offset: u64, paddr: u64, size: u64, mem: u64) -> Vec<u8> {
    let mut phdr = kind.to_le_bytes().to_vec();
    phdr.extend(7u32.to_le_bytes());
    for value in [offset, paddr, paddr, size, mem, 4] {
        phdr.extend(value.to_le_bytes());
    }
    phdr
}

/// [`vmlinux`] with other program headers, which follow its note and text.
fn elf_with(headers: &[Vec<u8>]) -> Vec<u8> {
    let mut file = vmlinux(true);
    let (at, count) = (file.len() as u64, u16::try_from(headers.len()).unwrap());
    file[32..40].copy_from_slice(&at.to_le_bytes());
    file[56..58].copy_from_slice(&count.to_le_bytes());
    file.extend(headers.concat());
    file
}

fn boot(
    mib: u64,
    cmdline: &str,
    kernel: Vec<u8>,
    initrd: Option<Vec<u8>>,
) -> (Memory, Result<Entry, Error>) {
    let (memory, platform) = machine(mib, cmdline);
    let mut initrd = initrd.map(Cursor::new);
    let entry = load(
        &memory,
        &platform,
        &mut Cursor::new(kernel),
        initrd.as_mut(),
    );
    (memory, entry)
}

fn refusal(mib: u64, cmdline: &str, kernel: Vec<u8>, initrd: Option<Vec<u8>>) -> String {
    crate::with_reason(&boot(mib, cmdline, kernel, initrd).1.unwrap_err())
}

fn text_at(memory: &Memory, at: u64, len: usize) -> String {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn a_bzimage_starts_in_64_bit_mode_with_boot_parameters() {
    let mut code = vec![0x90; 0x1000];
    code[..4].copy_from_slice(b"code");
    let initrd = vec![b'i'; 5000];
    let (memory, entry) = boot(128, "console=ttyS0", bzimage(&code), Some(initrd));
    let expected = Entry::Linux64 {
        ip: 16 * MIB + 0x200,
        zero_page: layout::ZERO_PAGE,
    };
    assert_eq!(entry.unwrap(), expected);
    assert_eq!(text_at(&memory, 16 * MIB, 4), "code");

    let params: boot_params = memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
    let cmdline = u64::from(params.hdr.cmd_line_ptr);
    assert_eq!(text_at(&memory, cmdline, 14), "console=ttyS0\0");
    let (image, size) = ({ params.hdr.ramdisk_image }, { params.hdr.ramdisk_size });
    assert_eq!((u64::from(image), size), (128 * MIB - 8192, 5000));
    assert_eq!(text_at(&memory, u64::from(image), 3), "iii");
    assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI.base);
    assert_eq!(text_at(&memory, layout::ACPI.base, 8), "RSD PTR ");
    let seed = params.hdr.setup_data;
    assert_eq!(memory.read_obj::<u32>(GuestAddress(seed + 8)).unwrap(), 9);
    assert_eq!(text_at(&memory, seed + 16, 32), "Z".repeat(32));
}

#[test]
fn the_memory_map_leaves_out_tables_and_the_hole() {
    let (memory, entry) = boot(5 * 1024, "", bzimage(&[0; 64]), None);
    entry.unwrap();
    let params: boot_params = memory.read_obj(GuestAddress(layout::ZERO_PAGE)).unwrap();
    let table = params.e820_table;
    let map: Vec<_> = table[..usize::from(params.e820_entries)]
        .iter()
        .map(|entry| ({ entry.addr }, { entry.size }, { entry.r#type }))
        .collect();
    assert_eq!(
        map,
        [
            (0, layout::EBDA, 1),
            (layout::ACPI.base, layout::ACPI.size, 3),
            (layout::FIRMWARE.base, layout::FIRMWARE.size, 2),
            (MIB, (3 << 30) - MIB, 1),
            (4 << 30, 2 << 30, 1),
        ]
    );
}

#[test]
fn the_first_four_gib_are_mapped_onto_themselves() {
    let (memory, entry) = boot(128, "", bzimage(&[0; 64]), None);
    entry.unwrap();
    let entry = |table: u64, index: u64| -> u64 {
        memory
            .read_obj(GuestAddress((table & !0xFFF) + index * 8))
            .unwrap()
    };
    for address in [0, layout::ZERO_PAGE, 16 * MIB, 0xFEE0_0000] {
        let pdpt = entry(layout::PAGE_TABLES, 0);
        let directory = entry(pdpt, address >> 30);
        let large = entry(directory, (address >> 21) & 511);
        assert_eq!(large & 0x83, 0x83);
        assert_eq!(large & !0x1F_FFFF, address & !0x1F_FFFF);
    }
}

#[test]
fn a_vmlinux_starts_by_pvh() {
    let (memory, entry) = boot(128, "quiet", vmlinux(true), Some(vec![1; 100]));
    let expected = Entry::Pvh {
        ip: 16 * MIB + 0x40,
        start_info: layout::PVH_INFO,
    };
    assert_eq!(entry.unwrap(), expected);
    assert_eq!(text_at(&memory, 16 * MIB, 11), "kernel text");
    let info: hvm_start_info = memory.read_obj(GuestAddress(layout::PVH_INFO)).unwrap();
    assert_eq!(
        (info.magic, info.version, info.nr_modules),
        (0x336E_C578, 1, 1)
    );
    assert_eq!(text_at(&memory, info.cmdline_paddr, 6), "quiet\0");
    assert_eq!(info.rsdp_paddr, layout::ACPI.base);
    let module: hvm_modlist_entry = memory.read_obj(GuestAddress(info.modlist_paddr)).unwrap();
    assert_eq!((module.paddr, module.size), (128 * MIB - 4096, 100));
    let last = info.memmap_paddr + u64::from(info.memmap_entries - 1) * 24;
    let last: hvm_memmap_table_entry = memory.read_obj(GuestAddress(last)).unwrap();
    assert_eq!((last.addr, last.size, last.type_), (MIB, 127 * MIB, 1));
}

#[test]
fn entering_the_bios_resets() {
    let (memory, entry) = boot(128, "", bzimage(&[0; 64]), None);
    entry.unwrap();
    let mut code = [0; 6];
    memory
        .read_slice(&mut code, GuestAddress(layout::RESET_VECTOR))
        .unwrap();
    assert_eq!(
        code,
        [0xBA, 0x02, 0x06, 0xB0, PowerPorts::RESET_VALUE, 0xEE]
    );
}

#[test]
fn kernels_that_cannot_boot_are_refused_with_the_reason() {
    let mut arm = vec![0; 4096];
    arm[0x38..0x3C].copy_from_slice(b"ARM\x64");
    assert!(refusal(128, "", arm, None).contains("for aarch64, this machine is x86_64"));
    assert!(refusal(128, "", b"#!/bin/sh".to_vec(), None).contains("not a Linux kernel"));
    assert!(refusal(128, "", Vec::new(), None).contains("not a Linux kernel"));
    assert!(refusal(128, "", vmlinux(false), None).contains("CONFIG_PVH"));
    let mut old = bzimage(&[0; 64]);
    old[0x236] = 0;
    assert!(refusal(128, "", old, None).contains("no 64-bit entry"));
    let mut fixed = bzimage(&[0; 64]);
    fixed[0x234] = 0;
    assert!(refusal(128, "", fixed, None).contains("CONFIG_RELOCATABLE"));
}

#[test]
fn files_that_end_early_are_refused_as_truncated() {
    for (file, cut) in [
        (bzimage(&[0; 4096]), 1),
        (vmlinux(true), 1),
        (vmlinux(true), 0xF90),
    ] {
        let len = file.len() - cut;
        let error = refusal(128, "", file[..len].to_vec(), None);
        assert!(error.contains("truncated"), "{error}");
    }
    for len in 0..1024 {
        // Any cut inside the header is an error, never a panic.
        refusal(64, "", bzimage(&[])[..len].to_vec(), None);
        let elf = vmlinux(true);
        refusal(64, "", elf[..len].to_vec(), None);
    }
}

#[test]
fn what_does_not_fit_in_memory_is_refused_with_the_size() {
    let mut large = bzimage(&[0; 64]);
    large[0x260..0x264].copy_from_slice(&(49u32 << 20).to_le_bytes());
    let error = refusal(64, "", large, None);
    assert!(
        error.contains("needs 49 MiB of guest memory from 0x1000000"),
        "{error}"
    );
    let initrd = vec![0; usize::try_from(17 * MIB).unwrap()];
    let error = refusal(64, "", bzimage(&[0; 64]), Some(initrd));
    assert!(
        error.contains("ramdisk cannot be loaded: does not fit: it needs 17 MiB"),
        "{error}"
    );
}

#[test]
fn a_command_line_longer_than_the_kernel_takes_is_refused() {
    assert!(boot(64, &"x".repeat(32), bzimage(&[0; 64]), None).1.is_ok());
    let error = refusal(64, &"x".repeat(33), bzimage(&[0; 64]), None);
    assert_eq!(
        error,
        "kernel command line of 33 bytes: the kernel takes at most 32"
    );
}

/// Boots `kernel` in a guest of 512 MiB; returns the error and the number of
/// bytes that were read of it.
fn refusal_of(mut kernel: Sparse) -> (String, u64) {
    let (memory, platform) = machine(512, "");
    let entry = load::<_, _, Cursor<Vec<u8>>>(&memory, &platform, &mut kernel, None);
    (crate::with_reason(&entry.unwrap_err()), kernel.read)
}

#[test]
fn elf_headers_that_ask_for_endless_work_are_refused_from_the_headers_alone() {
    const HOLE: u64 = 400 * MIB;
    let text = segment(1, 0x800, 16 * MIB, 0x800, 8 * MIB);
    let note = segment(4, 0x200, 0, 20, 20);
    let load_hole = segment(1, 0, 16 * MIB, HOLE, HOLE);
    for (headers, why) in [
        (
            vec![segment(4, 0x1000, 0, 4096, 4096); 65535],
            "65535 program headers",
        ),
        (vec![load_hole.clone(); 65535], "65535 program headers"),
        (vec![load_hole.clone(); 2], "overlap at 0x1000000"),
        (
            vec![text.clone(), segment(4, 0x1000, 0, 16 * MIB, 16 * MIB)],
            "note segment of 16777216",
        ),
        (
            vec![text.clone(), segment(4, 0x1000, 0, u64::MAX, 0)],
            "truncated",
        ),
        (
            vec![text.clone(), segment(1, u64::MAX, 64 * MIB, 1, 1)],
            "truncated",
        ),
        (
            vec![segment(1, 0, 16 * MIB, 2, 1), note.clone()],
            "longer in the file",
        ),
        (
            vec![segment(1, 0, MIB - 1, 1, 1), note.clone()],
            "below 1 MiB",
        ),
        (
            vec![segment(1, 0, u64::MAX, 1, 1), note.clone()],
            "does not fit",
        ),
        (
            vec![segment(1, 0, 16 * MIB, 1, u64::MAX), note.clone()],
            "does not fit",
        ),
        (
            vec![segment(1, 0, 32 * MIB, 1, 1), note.clone()],
            "entry 0x1000040 is in no segment",
        ),
    ] {
        let (error, read) = refusal_of(Sparse::new(elf_with(&headers), HOLE));
        assert!(error.contains(why), "{error}");
        assert!(read < MIB, "{why}: {read} bytes are read");
    }
}

#[test]
fn elf_headers_are_read_once() {
    let mut later = vmlinux(true);
    later[..64].fill(0xFF);
    let mut kernel = Sparse::new(vmlinux(true), 0).changing(later);
    let (memory, platform) = machine(64, "");
    load::<_, _, Cursor<Vec<u8>>>(&memory, &platform, &mut kernel, None).unwrap();
}

#[test]
fn memory_without_bytes_in_the_file_belongs_to_the_kernel_too() {
    let headers = [
        segment(1, 0x800, 16 * MIB, 0x800, 0x1000),
        segment(1, 0x800, 62 * MIB, 0, MIB),
        segment(4, 0x200, 0, 20, 20),
    ];
    let error = refusal(64, "", elf_with(&headers), Some(vec![0; 0x10_0001]));
    assert!(
        error.contains("ramdisk cannot be loaded: does not fit"),
        "{error}"
    );
}

#[test]
fn bzimage_headers_beyond_the_file_or_memory_are_refused() {
    let edited = |at: usize, bytes: &[u8]| {
        let mut file = bzimage(&[0; 64]);
        file[at..at + bytes.len()].copy_from_slice(bytes);
        file
    };
    let hole = 1 << 40;
    for (file, len, why) in [
        (bzimage(&[0; 64]), hole, "does not fit"),
        (edited(0x1F4, &[0xFF; 4]), 0, "truncated"),
        (edited(0x1F1, &[0xFF]), 0, "truncated"),
        (edited(0x248, &[0xFF; 4]), 0, "truncated"),
        (edited(0x248, &[0xFF; 8]), 0, "truncated"),
        (edited(0x258, &[0xFF; 8]), 0, "does not fit"),
        (edited(0x260, &[0xFF; 4]), 0, "does not fit"),
        (edited(0x211, &[0]), 0, "zImage"),
    ] {
        let (error, read) = refusal_of(Sparse::new(file, len));
        assert!(error.contains(why), "{error}");
        assert!(read < MIB, "{why}: {read} bytes are read");
    }
}

#[test]
fn an_initrd_limit_below_the_kernel_leaves_no_room() {
    for limit in [0u32, 0x100_0000, 0x2FF_FFFE] {
        let mut kernel = bzimage(&[0; 64]);
        kernel[0x22C..0x230].copy_from_slice(&limit.to_le_bytes());
        let error = refusal(128, "", kernel.clone(), Some(vec![0; 4096]));
        assert!(
            error.contains("ramdisk cannot be loaded: cannot be placed"),
            "{error}"
        );
        boot(128, "", kernel, None).1.unwrap();
    }
}

#[test]
fn an_initrd_that_is_a_hole_is_refused_by_its_length() {
    let (memory, platform) = machine(64, "");
    for len in [1 << 40, u64::MAX] {
        let mut initrd = Sparse::new(Vec::new(), len);
        let mut kernel = Cursor::new(vmlinux(true));
        let entry = load(&memory, &platform, &mut kernel, Some(&mut initrd));
        let error = crate::with_reason(&entry.unwrap_err());
        assert!(
            error.contains("ramdisk cannot be loaded: does not fit"),
            "{error}"
        );
        assert_eq!(initrd.read, 0);
    }
}
