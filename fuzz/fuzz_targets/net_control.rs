//! Commands and random bytes in a network device's control queue: a well-formed
//! command in any number of buffers is executed once and answered in one byte.
//! Anything else is refused, and a well-formed command works afterwards.
#![no_main]

mod driver;

use std::sync::Arc;

use devices::interrupt::{MsiAllocator as _, MsiVector};
use devices::queue::chain::QueueError;
use devices::queue::{Interrupt, RunningQueue};
use devices::testing::{Board, eventfd};
use devices::virtio::net::control::{self, Command};
use driver::{AVAIL, SIZE, TABLE, USED};
use iommu::GuestRam;
use libfuzzer_sys::{arbitrary, fuzz_target};
use vm_memory::{Bytes as _, GuestAddress};

/// Addresses of a command's first part and of its answer, and the distance of its
/// parts in bytes.
const COMMAND: u64 = 0x8000;
const PART: u64 = 0x100;
const ANSWER: u64 = 0x9000;
/// Upper bound on commands per turn, with a margin: a device's thread serves other
/// clients between two turns.
const MOST_COMMANDS: usize = 4;

#[derive(Debug, arbitrary::Arbitrary)]
enum Step {
    /// Adds a command in well-formed buffers.
    Command {
        bytes: [u8; 24],
        len: u8,
        /// Bytes of each buffer but the last.
        parts: [u8; 3],
        /// Bytes for the answer; 0 breaks the rules of the chain.
        room: u8,
        event_idx: bool,
        succeeds: bool,
    },
    /// Writes random bytes to the rings and memory.
    Noise {
        table: Vec<(u16, u16, u8, u8)>,
        available: Vec<u16>,
        bytes: Vec<(u16, [u8; 8])>,
        event_idx: bool,
    },
}

struct Rig {
    ram: Arc<GuestRam>,
    vector: Arc<dyn MsiVector>,
}

impl Rig {
    fn started(&self, event_idx: bool) -> RunningQueue {
        RunningQueue {
            queue: driver::queue(event_idx),
            dma: driver::space(&self.ram).dma(),
            kick: Arc::new(eventfd()),
            interrupt: Interrupt::new(Arc::clone(&self.vector)),
        }
    }

    /// Serves until no kick is pending or the driver has broken a rule. Returns
    /// the executed commands.
    fn serve(&self, event_idx: bool, succeeds: bool) -> Result<Vec<Command>, &'static str> {
        let mut started = self.started(event_idx);
        let mut done = Vec::new();
        // Each turn but the last takes a chain, and the ring holds `SIZE`.
        for _ in 0..=SIZE {
            let before = done.len();
            let mut execute = |command| {
                done.push(command);
                succeeds
            };
            let served = control::serve(&mut started, &mut execute);
            assert!(done.len() - before <= MOST_COMMANDS);
            served.map_err(|QueueError(rule)| rule)?;
            if started.kick.read().is_err() {
                return Ok(done);
            }
        }
        panic!("the queue kicks itself without end");
    }

    fn command(&self, bytes: &[u8], parts: &[u8], room: u8, event_idx: bool, succeeds: bool) {
        let mut buffers = Vec::new();
        let mut left = bytes;
        for (index, part) in (0_u64..).zip(parts.iter().chain(&[u8::MAX])) {
            let (part, rest) = left.split_at(left.len().min(usize::from(*part)));
            let at = COMMAND + index * PART;
            self.ram
                .write_slice(part, GuestAddress(at))
                .expect("it is inside");
            buffers.push((at, u32::try_from(part.len()).expect("it is short"), false));
            left = rest;
        }
        if room > 0 {
            buffers.push((ANSWER, room.into(), true));
        }
        driver::write(&self.ram, ANSWER, [0xaa_u8; 2]);
        driver::post(&self.ram, &buffers);
        let served = self.serve(event_idx, succeeds);
        if room == 0 {
            assert!(served.is_err(), "an answer without room");
            return;
        }
        let expected = match bytes {
            // VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET (§5.1.6.5.6).
            [4, 0, low, high, ..] => Command::Pairs(u16::from_le_bytes([*low, *high])),
            _ => Command::Unknown,
        };
        assert_eq!(served, Ok(vec![expected]));
        let answer = driver::read::<[u8; 2]>(&self.ram, ANSWER);
        assert_eq!(answer, [u8::from(!succeeds), 0xaa]);
        assert_eq!(driver::read::<u16>(&self.ram, USED + 2), 1);
        assert_eq!(driver::read::<u32>(&self.ram, USED + 8), 1);
    }

    fn noise(&self, table: &[(u16, u16, u8, u8)], available: &[u16], event_idx: bool) {
        for (slot, &(at, len, flags, next)) in (0..u64::from(SIZE)).zip(table) {
            let entry = TABLE + slot * 16;
            let at = u64::from(at) * 4 % (driver::RAM + 0x1000);
            driver::write(&self.ram, entry, at);
            driver::write(&self.ram, entry + 8, u32::from(len));
            driver::write(&self.ram, entry + 12, u16::from(flags % 8));
            driver::write(&self.ram, entry + 14, u16::from(next % 20));
        }
        for (at, value) in (AVAIL..AVAIL + 40).step_by(2).zip(available) {
            driver::write(&self.ram, at, *value);
        }
        // An error, or up to a ring of commands.
        let _ = self.serve(event_idx, true);
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let board = Board::default();
    let rig = Rig {
        ram: driver::ram(),
        vector: board.vector().expect("an eventfd"),
    };
    for step in &steps {
        match step {
            Step::Command {
                bytes,
                len,
                parts,
                room,
                event_idx,
                succeeds,
            } => {
                let bytes = &bytes[..usize::from(*len) % (bytes.len() + 1)];
                rig.command(bytes, parts, *room, *event_idx, *succeeds);
            }
            Step::Noise {
                table,
                available,
                bytes,
                event_idx,
            } => {
                for (at, bytes) in bytes {
                    driver::scribble(&rig.ram, u64::from(*at), bytes);
                }
                rig.noise(table, available, *event_idx);
            }
        }
    }
    rig.command(&[4, 0, 2, 0], &[], 1, false, true);
});
