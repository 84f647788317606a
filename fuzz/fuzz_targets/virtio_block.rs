//! Random bytes in the memory of a disk's queue: every request is answered or
//! refused, the image keeps its length, and a valid request works afterwards.
#![no_main]

mod driver;

use std::cell::RefCell;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use devices::virtio::block::{Disk, Image, Served};
use driver::{AVAIL, SIZE, TABLE, USED};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

const LEN: u64 = 64 << 10;
const HEADER: u64 = 0x8000;
const STATUS: u64 = 0x9000;
const DATA: u64 = 0xa000;

#[derive(Arbitrary, Debug)]
struct Input {
    event_idx: bool,
    /// Type of the request.
    kind: u8,
    sector: u16,
    /// Descriptors: kind of address (one of four, or raw), address, length, flags and
    /// next index.
    table: Vec<(u8, u64, u16, u8, u8)>,
    /// Entries of the available ring.
    available: Vec<u16>,
    /// Further bytes and their addresses.
    noise: Vec<(u16, [u8; 8])>,
}

struct Rig {
    path: PathBuf,
    disk: Disk,
}

impl Drop for Rig {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

thread_local! {
    static RIG: RefCell<Rig> = RefCell::new({
        let name = format!("portcullis-fuzz-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let file = std::fs::File::create(&path).expect("an image");
        file.set_len(LEN).expect("an image");
        let image = Image::open(&path, false).expect("an image");
        Rig { path, disk: Disk::new("fuzz", image) }
    });
}

fn place(which: u8, raw: u64) -> u64 {
    match which % 6 {
        0 => HEADER,
        1 => STATUS,
        2 => DATA,
        3 => raw % driver::RAM,
        4 => TABLE + raw % 0x100,
        _ => raw,
    }
}

fuzz_target!(|input: Input| {
    RIG.with_borrow_mut(|rig| run(rig, &input));
});

fn run(rig: &mut Rig, input: &Input) {
    let ram = driver::ram();
    for (at, bytes) in &input.noise {
        driver::scribble(&ram, u64::from(*at), bytes);
    }
    driver::write(&ram, HEADER, u64::from(input.kind % 16));
    driver::write(&ram, HEADER + 8, u64::from(input.sector));
    let slots = 0..u64::from(SIZE);
    for (slot, &(which, raw, len, flags, next)) in slots.zip(&input.table) {
        let entry = TABLE + slot * 16;
        driver::write(&ram, entry, place(which, raw));
        driver::write(&ram, entry + 8, u32::from(len));
        driver::write(&ram, entry + 12, u16::from(flags % 8));
        driver::write(&ram, entry + 14, u16::from(next % 20));
    }
    for (at, value) in (AVAIL..AVAIL + 40).step_by(2).zip(&input.available) {
        driver::write(&ram, at, *value);
    }
    let dma = driver::space(&ram).dma();
    let go_on = AtomicBool::new(false);
    let mut queue = driver::queue(input.event_idx);
    // The ring has at most this number of requests, and no driver adds more.
    for _ in 0..SIZE {
        match rig.disk.serve(&mut queue, &dma, &go_on) {
            Ok(Served::Done { .. }) => {}
            Ok(Served::Nothing) => break,
            Err(reason) => {
                assert!(!reason.0.is_empty());
                break;
            }
        }
    }
    let length = std::fs::metadata(&rig.path).expect("the image").len();
    assert_eq!(length, LEN);

    driver::write(&ram, HEADER, [1_u64, 7]);
    driver::write(&ram, DATA, [0x5a_u8; 32]);
    let write = [(HEADER, 16, false), (DATA, 512, false), (STATUS, 1, true)];
    driver::post(&ram, &write);
    let mut queue = driver::queue(false);
    assert_eq!(
        rig.disk.serve(&mut queue, &dma, &go_on),
        Ok(Served::Done { interrupt: true })
    );
    driver::write(&ram, HEADER, [0_u64, 7]);
    let read = [
        (HEADER, 16, false),
        (DATA + 512, 512, true),
        (STATUS, 1, true),
    ];
    driver::post(&ram, &read);
    let mut queue = driver::queue(false);
    assert_eq!(
        rig.disk.serve(&mut queue, &dma, &go_on),
        Ok(Served::Done { interrupt: true })
    );
    assert_eq!(driver::read::<u8>(&ram, STATUS), 0);
    assert_eq!(driver::read::<[u8; 32]>(&ram, DATA + 512), [0x5a; 32]);
    assert_eq!(driver::read::<u32>(&ram, USED + 8), 513);
}
