//! Operations of a driver on a virtio function: accesses of configuration space, the
//! BAR, and the memory of its queue. After them a reset makes the function work
//! again.
#![no_main]

mod driver;

use std::sync::Arc;

use devices::bus::{Bus, BusDevice as _};
use devices::interrupt::{Doorbells, MsiAllocator};
use devices::pci::{MsiRetranslator, PciRoot, Requester};
use devices::testing::Board;
use devices::virtio::pci::{BAR_SIZE, VirtioPci, VirtioPciResources};
use devices::virtio::rng::Rng;
use driver::{AVAIL, SIZE, TABLE, USED};
use iommu::{Gpa, GuestRam};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;

const BAR: u64 = 0x40_0000_0000;
const SLOT: u64 = 1 << 15;
const NOTIFY: u64 = 0x3000;

#[derive(Arbitrary, Debug)]
enum Op {
    /// Writes a small value to a register of the common configuration.
    Common {
        register: u8,
        value: u16,
    },
    Bar {
        offset: u16,
        value: u64,
        len: u8,
    },
    Config {
        offset: u16,
        value: u32,
        len: u8,
    },
    Read {
        offset: u16,
        len: u8,
    },
    Memory {
        at: u16,
        bytes: [u8; 16],
    },
    Kick,
    Run,
}

struct Function {
    root: PciRoot,
    memory: Arc<Bus>,
    board: Arc<Board>,
    ram: Arc<GuestRam>,
}

impl Function {
    fn new() -> Self {
        let ram = driver::ram();
        let board = Arc::new(Board::default());
        let retranslator = MsiRetranslator::new().expect("an eventfd");
        let parts = VirtioPciResources {
            requester: Requester::new(driver::space(&ram), &retranslator),
            msi: Arc::clone(&board) as Arc<dyn MsiAllocator>,
            doorbells: Arc::clone(&board) as Arc<dyn Doorbells>,
            bar: Gpa(BAR),
            ats: Some(Box::new(|_| ())),
        };
        let device = Box::new(Rng::new().expect("the host's pool"));
        let function = VirtioPci::new("fuzz", device, parts).expect("file descriptors");
        let memory = Arc::new(Bus::new());
        let root = PciRoot::new(&memory);
        root.add(1, function).expect("a slot");
        Self {
            root,
            memory,
            board,
            ram,
        }
    }

    fn config(&self, offset: u64, bytes: &[u8]) {
        self.root.write(SLOT + offset, bytes);
    }

    fn bar(&self, offset: u64, bytes: &[u8]) {
        self.memory.write(BAR + offset, bytes);
    }

    fn status(&self) -> u8 {
        let mut status = [0];
        self.memory.read(BAR + 20, &mut status);
        status[0]
    }

    /// Initializes the function and checks that it answers one request.
    fn run(&self) {
        self.config(0x10, &BAR.to_le_bytes());
        self.config(0x04, &6_u16.to_le_bytes());
        self.bar(20, &[0]);
        self.bar(20, &[3]);
        self.bar(8, &1_u32.to_le_bytes());
        self.bar(12, &1_u32.to_le_bytes());
        self.bar(20, &[11]);
        self.bar(22, &[0, 0]);
        self.bar(24, &SIZE.to_le_bytes());
        for (register, ring) in [(32, TABLE), (40, AVAIL), (48, USED)] {
            self.bar(register, &ring.to_le_bytes());
        }
        self.bar(28, &[1, 0]);
        driver::post(&self.ram, &[(0x8000, 64, true)]);
        self.bar(20, &[15]);
        assert_eq!(self.status(), 15);
        assert_eq!(driver::read::<u16>(&self.ram, USED + 2), 1);
        assert_eq!(driver::read::<u32>(&self.ram, USED + 8), 64);
        // An inline device has no doorbells.
        assert!(self.board.doorbells().is_empty());
    }
}

fuzz_target!(|ops: Vec<Op>| {
    let function = Function::new();
    for op in ops.iter().take(200) {
        match *op {
            Op::Common { register, value } => {
                let register = u64::from(register % 60);
                let len = if register == 20 { 1 } else { 2 };
                function.bar(register, &value.to_le_bytes()[..len]);
            }
            Op::Bar { offset, value, len } => {
                let len = usize::from(len % 8) + 1;
                let offset = u64::from(offset) % BAR_SIZE;
                function.bar(offset, &value.to_le_bytes()[..len]);
            }
            Op::Config { offset, value, len } => {
                let len = usize::from(len % 4) + 1;
                function.config(u64::from(offset) % 0x1010, &value.to_le_bytes()[..len]);
            }
            Op::Read { offset, len } => {
                let mut bytes = vec![0; usize::from(len % 16)];
                function.memory.read(BAR + u64::from(offset), &mut bytes);
                function.root.read(SLOT + u64::from(offset), &mut bytes);
            }
            Op::Memory { at, bytes } => driver::scribble(&function.ram, at.into(), &bytes),
            Op::Kick => function.bar(NOTIFY, &[0, 0]),
            Op::Run => function.run(),
        }
        let mut ids = [0; 4];
        function.root.read(SLOT, &mut ids);
        assert_eq!(ids, [0xf4, 0x1a, 0x44, 0x10]);
    }
    function.run();
});
