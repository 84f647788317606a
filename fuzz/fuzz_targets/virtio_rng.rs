//! Random bytes in the memory of the entropy queue: a bounded number of bytes or a
//! refusal, and a valid request works afterwards.
#![no_main]

mod driver;

use std::sync::Arc;

use devices::interrupt::MsiAllocator as _;
use devices::queue::{Interrupt, RunningQueue};
use devices::testing::{Board, eventfd};
use devices::virtio::VirtioDevice as _;
use devices::virtio::rng::Rng;
use driver::{AVAIL, SIZE, TABLE, USED};
use libfuzzer_sys::fuzz_target;

type Descriptor = (u32, u16, u8, u8);

fuzz_target!(|input: (Vec<Descriptor>, Vec<u16>, Vec<(u16, [u8; 8])>)| {
    let (table, available, noise) = input;
    let ram = driver::ram();
    for (at, bytes) in &noise {
        driver::scribble(&ram, u64::from(*at), bytes);
    }
    for (slot, &(at, len, flags, next)) in (0..u64::from(SIZE)).zip(&table) {
        let entry = TABLE + slot * 16;
        driver::write(&ram, entry, u64::from(at) % (driver::RAM + 0x1000));
        driver::write(&ram, entry + 8, u32::from(len));
        driver::write(&ram, entry + 12, u16::from(flags % 8));
        driver::write(&ram, entry + 14, u16::from(next % 20));
    }
    for (at, value) in (AVAIL..AVAIL + 40).step_by(2).zip(&available) {
        driver::write(&ram, at, *value);
    }
    let mut device = Rng::new().expect("the host's pool");
    let board = Board::default();
    let interrupt = board.vector().expect("an eventfd");
    let started = || RunningQueue {
        queue: driver::queue(false),
        dma: driver::space(&ram).dma(),
        kick: Arc::new(eventfd()),
        interrupt: Interrupt::new(Arc::clone(&interrupt)),
    };
    if device.start_queue(0, started()).is_ok() {
        let _ = device.kicked(0);
    }
    device.stop_queue(0);
    device.reset();

    driver::post(&ram, &[(0x8000, 5000, true)]);
    device.start_queue(0, started()).expect("an honest request");
    assert_eq!(driver::read::<u16>(&ram, USED + 2), 1);
    assert_eq!(driver::read::<u32>(&ram, USED + 8), 4096);
});
