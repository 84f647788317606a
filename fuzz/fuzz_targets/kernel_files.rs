//! Files of every kernel format with any bytes changed, followed by any hole: a loader of either
//! architecture loads them or refuses them in one line, and reads and writes at most the size of
//! guest memory.
#![no_main]

use std::cell::RefCell;
use std::io::{Cursor, Write};

use arch::testing::Sparse;
use arch::{Platform, aarch64, x86_64};
use flate2::{Compression, write::GzEncoder};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};
use vm_memory::{GuestAddress, GuestMemoryMmap};

const MIB: u64 = 1 << 20;
const RAM: u64 = 64 * MIB;
/// Upper bound on bytes of headers that a loader reads.
const HEADERS: u64 = 8 * MIB;

type Memory = GuestMemoryMmap<()>;

/// Offset, value, and log2 of the length in bytes: fields have 1, 2, 4 or 8 bytes.
type Edit = (u16, u64, u8);

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    form: u8,
    edits: Vec<Edit>,
    /// Edits of the payload, before its compression.
    inner: Vec<Edit>,
    cut: u16,
    /// Length of the hole after the file: pages, or a power of two.
    hole: u8,
    initrd: Option<u16>,
    /// Edits by another program after the first read.
    later: Vec<Edit>,
    tail: &'a [u8],
}

fn edit(file: &mut [u8], edits: &[Edit]) {
    for &(at, value, exponent) in edits {
        // Most headers are at the front.
        let mask = if at & 0x8000 == 0 { 0x3FF } else { 0x7FFF };
        let at = usize::from(at & mask);
        let len = 1 << (exponent % 4);
        if let Some(place) = file.get_mut(at..at + len) {
            place.copy_from_slice(&value.to_le_bytes()[..len]);
        }
    }
}

fn put(file: &mut [u8], fields: &[(usize, &[u8])]) {
    for &(at, bytes) in fields {
        file[at..at + bytes.len()].copy_from_slice(bytes);
    }
}

/// An ELF file with one segment at 16 MiB and a PVH note.
fn vmlinux() -> Vec<u8> {
    let mut file = vec![0; 0x1000];
    let segment = |kind: u32, offset: u64, paddr: u64, size: u64, mem: u64| {
        let mut phdr = kind.to_le_bytes().to_vec();
        phdr.extend(7u32.to_le_bytes());
        for value in [offset, paddr, paddr, size, mem, 4] {
            phdr.extend(value.to_le_bytes());
        }
        phdr
    };
    let fields: [(usize, &[u8]); 9] = [
        (0, b"\x7fELF\x02\x01\x01"),
        (16, &[2, 0, 62, 0, 1, 0, 0, 0]),
        (32, &64u64.to_le_bytes()),
        (52, &[64, 0, 56, 0, 2, 0]),
        (64, &segment(1, 0x800, 16 * MIB, 0x800, 8 * MIB)),
        (120, &segment(4, 0x200, 0, 20, 20)),
        (0x200, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]),
        (0x20C, b"Xen\0"),
        (0x210, &0x100_0040u32.to_le_bytes()),
    ];
    put(&mut file, &fields);
    file
}

fn bzimage() -> Vec<u8> {
    let mut file = vec![0; 0x1400];
    let fields: [(usize, &[u8]); 11] = [
        (0x1F1, &[1]),
        (0x1F4, &0x100u32.to_le_bytes()),
        (0x202, b"HdrS"),
        (0x206, &0x20Fu16.to_le_bytes()),
        (0x211, &[1]),
        (0x22C, &0x7FFF_FFFFu32.to_le_bytes()),
        (0x234, &[1]),
        (0x236, &1u16.to_le_bytes()),
        (0x238, &2047u32.to_le_bytes()),
        (0x258, &(16 * MIB).to_le_bytes()),
        (0x260, &0x200_0000u32.to_le_bytes()),
    ];
    put(&mut file, &fields);
    file
}

fn image() -> Vec<u8> {
    let mut file = vec![0; 0x2000];
    let fields: [(usize, &[u8]); 8] = [
        (0, b"MZ"),
        (16, &(4 * MIB).to_le_bytes()),
        (0x38, b"ARM\x64\x40"),
        (0x40, b"PE\0\0"),
        (0x46, &[1, 0]),
        (0x54, &[0xA0, 0]),
        (0x108, &0x1000u32.to_le_bytes()),
        (0x10C, &0x1000u32.to_le_bytes()),
    ];
    put(&mut file, &fields);
    file
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn zstd(bytes: &[u8]) -> Vec<u8> {
    compress_to_vec(bytes, CompressionLevel::Fastest)
}

fn zboot(compression: &str, payload: &[u8]) -> Vec<u8> {
    let mut file = vec![0; 0x200];
    let fields: [(usize, &[u8]); 4] = [
        (0, b"MZ\0\0zimg"),
        (8, &0x200u32.to_le_bytes()),
        (12, &u32::try_from(payload.len()).unwrap().to_le_bytes()),
        (24, compression.as_bytes()),
    ];
    put(&mut file, &fields);
    file.extend(payload);
    file
}

struct Machines {
    x86: (Memory, Platform),
    arm: (Memory, Platform),
}

fn machine(ram: Vec<arch::Range>) -> (Memory, Platform) {
    let ranges = ram
        .iter()
        .map(|range| (GuestAddress(range.base), range.size as usize));
    let ranges: Vec<_> = ranges.collect();
    let platform = Platform {
        cpus: 1,
        caches: Vec::new(),
        ram,
        cmdline: "console=ttyS0".into(),
        seed: [0x5A; 32],
        serial: arch::layout::SERIAL,
        rtc: arch::layout::RTC,
        pci: None,
        iommu: None,
    };
    (Memory::from_ranges(&ranges).unwrap(), platform)
}

thread_local! {
    static MACHINES: RefCell<Machines> = RefCell::new(Machines {
        x86: machine(x86_64::layout::ram_ranges(RAM).unwrap()),
        arm: machine(aarch64::layout::ram_ranges(RAM).unwrap()),
    });
}

fn form(input: &Input) -> Vec<u8> {
    let mut inner = image();
    edit(&mut inner, &input.inner);
    match input.form % 8 {
        0 => vmlinux(),
        1 => bzimage(),
        2 => inner,
        3 => gzip(&inner),
        4 => zstd(&inner),
        5 => zboot("gzip", &gzip(&inner)),
        6 => zboot("zstd22", &zstd(&inner)),
        _ => Vec::new(),
    }
}

fn check<E>(loaded: Result<E, arch::Error>, file: &Sparse) {
    if let Err(error) = loaded {
        assert!(!error.to_string().contains('\n'));
    }
    assert!(file.read <= RAM + HEADERS, "{} bytes are read", file.read);
}

fuzz_target!(|input: Input| {
    let mut bytes = form(&input);
    edit(&mut bytes, &input.edits);
    bytes.extend_from_slice(input.tail);
    if input.cut != 0 {
        bytes.truncate(usize::from(input.cut));
    }
    let mut later = bytes.clone();
    edit(&mut later, &input.later);
    let hole = match input.hole {
        pages @ 0..192 => u64::from(pages) << 12,
        exponent => 1 << (exponent % 63),
    };
    let len = (bytes.len() as u64).saturating_add(hole);
    let mut initrd = input
        .initrd
        .map(|len| Cursor::new(vec![7u8; usize::from(len)]));
    MACHINES.with_borrow(|machines| {
        let (memory, platform) = &machines.x86;
        let mut file = Sparse::new(bytes.clone(), len).changing(later.clone());
        let loaded = x86_64::boot::load(memory, platform, &mut file, initrd.as_mut());
        check(loaded, &file);
        let (memory, platform) = &machines.arm;
        let mut file = Sparse::new(bytes, len).changing(later);
        let loaded = aarch64::boot::load(memory, platform, &mut file, initrd.as_mut());
        check(loaded, &file);
    });
});
