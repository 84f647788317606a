use std::io::{Cursor, Write};

use flate2::{Compression, write::GzEncoder};
use vm_memory::GuestMemoryMmap;

use super::*;
use crate::testing::Sparse;

type Memory = GuestMemoryMmap<()>;

const MIB: u64 = 1 << 20;
const IMAGE_SIZE: u64 = 4 * MIB;

/// An `Image` with a PE section that ends with the file.
fn image() -> Vec<u8> {
    let mut file = vec![0; 0x2_0000];
    let len = u32::try_from(file.len()).unwrap();
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ");
    put(16, &IMAGE_SIZE.to_le_bytes());
    put(0x38, b"ARM\x64\x40");
    put(0x40, b"PE\0\0");
    put(0x46, &[1, 0]);
    put(0x54, &[0xA0, 0]);
    let section = 0x40 + 24 + 0xA0;
    put(section + 16, &(len - 0x1000).to_le_bytes());
    put(section + 20, &0x1000u32.to_le_bytes());
    put(0x1000, b"kernel text");
    put(0x1_FFFC, b"end.");
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
}

/// A zstd frame (RFC 8878 §3.1.1) with this window descriptor: `first`, then
/// `count` blocks of 128 KiB of zeros each.
fn zstd_of_zeros(window: u8, first: &[u8], count: usize) -> Vec<u8> {
    const RAW: u32 = 0;
    const RLE: u32 = 1;
    let block = |last: u32, kind: u32, size: u32| {
        let [a, b, c, _] = (last | kind << 1 | size << 3).to_le_bytes();
        [a, b, c]
    };
    let mut frame = vec![0x28, 0xB5, 0x2F, 0xFD, 0, window];
    frame.extend(block(0, RAW, u32::try_from(first.len()).unwrap()));
    frame.extend_from_slice(first);
    for _ in 0..count {
        frame.extend(block(0, RLE, 128 << 10));
        frame.push(0);
    }
    frame.extend(block(1, RAW, 0));
    frame
}

fn zboot(compression: &str, payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    let size = u32::try_from(payload.len()).unwrap();
    let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
    put(0, b"MZ\0\0zimg");
    put(8, &0x1000u32.to_le_bytes());
    put(12, &size.to_le_bytes());
    put(24, compression.as_bytes());
    file.extend_from_slice(payload);
    file
}

fn machine(mib: u64, cmdline: &str) -> (Memory, Platform) {
    let ram = layout::ram_ranges(mib * MIB).unwrap();
    let size = usize::try_from(ram[0].size).unwrap();
    let memory = Memory::from_ranges(&[(GuestAddress(ram[0].base), size)]).unwrap();
    let platform = Platform {
        cpus: 1,
        caches: Vec::new(),
        ram,
        cmdline: cmdline.into(),
        seed: [0; 32],
        serial: layout::SERIAL,
        rtc: layout::RTC,
        pci: None,
        iommu: None,
    };
    (memory, platform)
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

fn refusal(mib: u64, kernel: Vec<u8>, initrd: Option<Vec<u8>>) -> String {
    crate::with_reason(&boot(mib, "", kernel, initrd).1.unwrap_err())
}

fn text_at(memory: &Memory, at: u64, len: usize) -> String {
    let mut bytes = vec![0; len];
    memory.read_slice(&mut bytes, GuestAddress(at)).unwrap();
    String::from_utf8(bytes).unwrap()
}

#[test]
fn every_compression_of_an_image_loads_the_same_memory() {
    let image = image();
    for kernel in [
        image.clone(),
        gzip(&image),
        zboot("gzip", &gzip(&image)),
        zstd(&image),
        zboot("zstd", &zstd(&image)),
        zboot("zstd22", &zstd(&image)),
    ] {
        let (memory, entry) = boot(64, "", kernel, Some(b"initrd".to_vec()));
        let expected = Entry {
            pc: layout::KERNEL,
            fdt: layout::FDT.base,
        };
        assert_eq!(entry.unwrap(), expected);
        assert_eq!(text_at(&memory, layout::KERNEL + 0x1000, 11), "kernel text");
        assert_eq!(text_at(&memory, layout::KERNEL + 0x1_FFFC, 4), "end.");
        let magic: u32 = memory.read_obj(GuestAddress(layout::FDT.base)).unwrap();
        assert_eq!(magic, 0xD00D_FEEDu32.to_be());
        // After the BSS, not after the file.
        assert_eq!(text_at(&memory, layout::KERNEL + IMAGE_SIZE, 6), "initrd");
    }
}

#[test]
fn an_old_image_is_placed_at_the_offset_of_its_time() {
    let mut old = image();
    old[16..24].fill(0);
    let (_, entry) = boot(64, "", old, None);
    assert_eq!(entry.unwrap().pc, layout::KERNEL + image::OLD_TEXT_OFFSET);
}

#[test]
fn kernels_that_cannot_boot_are_refused_with_the_reason() {
    let mut x86 = vec![0; 1024];
    x86[0x202..0x206].copy_from_slice(b"HdrS");
    assert!(refusal(64, x86.clone(), None).contains("for x86_64, this machine is aarch64"));
    assert!(refusal(64, gzip(&x86), None).contains("for x86_64, this machine is aarch64"));
    assert!(refusal(64, b"text".to_vec(), None).contains("not a Linux kernel"));
    assert!(refusal(64, gzip(b"text"), None).contains("not a Linux kernel"));
    let error = refusal(64, zboot("lzma", b"payload"), None);
    let why = "\"lzma\"; gzip and zstd are supported";
    assert!(error.contains(why), "{error}");
    let error = refusal(64, b"\xFD7zXZ\0".to_vec(), None);
    assert!(error.contains("compressed with xz"), "{error}");
    let mut big_endian = image();
    big_endian[24] = 1;
    assert!(refusal(64, big_endian, None).contains("big-endian"));
}

#[test]
fn files_that_end_early_are_refused() {
    let whole = image();
    let error = refusal(64, whole[..whole.len() - 1].to_vec(), None);
    assert!(
        error.contains("truncated: 131071 bytes of 131072"),
        "{error}"
    );
    let packed = gzip(&whole);
    let error = refusal(64, packed[..packed.len() / 2].to_vec(), None);
    assert!(error.contains("cannot be decompressed"), "{error}");
    let wrapped = zboot("gzip", &packed);
    let error = refusal(64, wrapped[..wrapped.len() - 1].to_vec(), None);
    assert!(error.contains("truncated"), "{error}");
    for len in 0..0x200 {
        // Any cut inside a header is an error, never a panic.
        refusal(64, whole[..len].to_vec(), None);
        refusal(64, wrapped[..len].to_vec(), None);
    }
}

#[test]
fn what_does_not_fit_in_memory_is_refused_with_the_size() {
    let mut large = image();
    large[16..24].copy_from_slice(&(63 * MIB).to_le_bytes());
    let error = refusal(64, large, None);
    assert!(
        error.contains("needs 63 MiB of guest memory from 0x40200000"),
        "{error}"
    );
    let mut endless = image();
    endless[8..16].fill(0xFF);
    assert!(refusal(64, endless, None).contains("does not fit"));
    let initrd = vec![0; usize::try_from(59 * MIB).unwrap()];
    let error = refusal(64, image(), Some(initrd));
    assert!(
        error.contains("ramdisk cannot be loaded: does not fit: it needs 59 MiB"),
        "{error}"
    );
}

#[test]
fn a_decompression_bomb_stops_at_the_end_of_memory() {
    let mut bomb = image();
    bomb.resize(usize::try_from(70 * MIB).unwrap(), 0);
    assert!(refusal(64, gzip(&bomb), None).contains("does not fit"));
    // 128 GiB, with a window of 128 KiB.
    let error = refusal(64, zstd_of_zeros(7 << 3, &image(), 1 << 20), None);
    assert!(error.contains("does not fit"), "{error}");
}

#[test]
fn a_zstd_window_beyond_the_bound_is_refused() {
    // RFC 8878 §3.1.1.1.2: 2^(10 + exponent), the exponent in bits 3 to 7.
    let window = |log: u8| zstd_of_zeros((log - 10) << 3, &image(), 0);
    boot(64, "", window(27), None).1.unwrap();
    for log in [28, 41] {
        let error = refusal(64, window(log), None);
        assert!(error.contains("cannot be decompressed"), "{error}");
    }
}

/// Boots `kernel`; returns the error and the number of bytes that were read of
/// it.
fn refusal_of(mut kernel: Sparse) -> (String, u64) {
    let (memory, platform) = machine(64, "");
    let entry = load::<_, _, Cursor<Vec<u8>>>(&memory, &platform, &mut kernel, None);
    (crate::with_reason(&entry.unwrap_err()), kernel.read)
}

#[test]
fn files_larger_than_memory_are_refused_by_their_length() {
    let mut sections = image();
    sections[0x46..0x48].fill(0xFF);
    let mut endless = zboot("gzip", b"");
    endless[12..16].fill(0xFF);
    for (front, len, why) in [
        (image(), 1 << 40, "does not fit"),
        (gzip(b""), 1 << 40, "does not fit"),
        (zstd(b""), 1 << 40, "does not fit"),
        (endless, 1 << 40, "does not fit"),
        (sections, 0, "65535 sections"),
    ] {
        let (error, read) = refusal_of(Sparse::new(front, len));
        assert!(error.contains(why), "{error}");
        assert!(read < MIB, "{why}: {read} bytes are read");
    }
}

#[test]
fn a_command_line_longer_than_the_kernel_takes_is_refused() {
    assert!(boot(64, &"x".repeat(2047), image(), None).1.is_ok());
    let error = boot(64, &"x".repeat(2048), image(), None)
        .1
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "kernel command line of 2048 bytes: the kernel takes at most 2047"
    );
}
