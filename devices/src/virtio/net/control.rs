//! The control queue of a network device (virtio 1.2 §5.1.6.5). Its only
//! command is the number of queue pairs.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress};
use zerocopy::FromBytes;
use zerocopy::little_endian::U16;

use iommu::DmaView;

use crate::queue::RunningQueue;
use crate::queue::chain::{Chain, QueueError, gather};

/// Largest size of the queue, and of a chain in it (§2.7.5.3.1).
pub const CONTROL_SIZE: u16 = 64;
/// Bytes of a command that are read; every known command is shorter.
const MAX_COMMAND: usize = 16;
/// Upper bound on commands per turn of the thread. Each may stop and start
/// every ring of the device.
const MAX_COMMANDS: usize = 1;

/// A command of the driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `VQ_PAIRS_SET`: the number of pairs to use (§5.1.6.5.6).
    Pairs(u16),
    /// A command that the device does not implement.
    Unknown,
}

/// `struct virtio_net_ctrl_hdr` and `struct virtio_net_ctrl_mq`.
#[derive(FromBytes)]
#[repr(C)]
struct PairsCommand {
    class: u8,
    command: u8,
    pairs: U16,
}

impl Command {
    fn parse(bytes: &[u8]) -> Self {
        const SET: (u32, u32) = (VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET);
        match PairsCommand::read_from_prefix(bytes) {
            Ok((it, _)) if (it.class.into(), it.command.into()) == SET => {
                Self::Pairs(it.pairs.get())
            }
            _ => Self::Unknown,
        }
    }
}

/// A command that is not answered yet.
struct PendingCommand {
    head: u16,
    command: Command,
    answer: GuestAddress,
}

/// Executes the next commands with `execute`, which is called without a view of
/// memory and returns whether it succeeded. If more than `MAX_COMMANDS` may be
/// available, the queue kicks itself: the thread serves other clients in
/// between.
///
/// # Errors
/// The driver broke the rules of the queue.
pub fn serve(
    started: &mut RunningQueue,
    execute: &mut dyn FnMut(Command) -> bool,
) -> Result<(), QueueError> {
    let dma = &started.dma;
    for _ in 0..MAX_COMMANDS {
        let pending = {
            let view = dma.view();
            let chain = Chain::take(&mut started.queue, &view, CONTROL_SIZE)?;
            let Some(chain) = chain else {
                // With event indices the driver kicks only for entries beyond
                // the published index: check again after publishing it.
                if started.queue.enable_notification(&view)? {
                    let _ = started.kick.write(1);
                }
                return Ok(());
            };
            let command = parse(&view, &chain);
            if view.take_fault().is_some() {
                return Err(QueueError("a command is not in memory"));
            }
            command.ok_or(QueueError("a command has no room for its answer"))?
        };
        let answer = if execute(pending.command) {
            VIRTIO_NET_OK
        } else {
            VIRTIO_NET_ERR
        };
        let view = dma.view();
        let [answer, ..] = answer.to_le_bytes();
        view.write_obj(answer, pending.answer)
            .map_err(|_| QueueError("an answer is not in memory"))?;
        let queue = &mut started.queue;
        queue.add_used(&view, pending.head, 1)?;
        if queue.needs_notification(&view)? {
            started.interrupt.signal();
        }
    }
    let _ = started.kick.write(1);
    Ok(())
}

fn parse(view: &DmaView<'_>, chain: &Chain) -> Option<PendingCommand> {
    let mut bytes = [0; MAX_COMMAND];
    let len = gather(view, &chain.readable, &mut bytes).ok()?;
    let answer = chain.writable.iter().find(|buffer| buffer.len > 0)?.at;
    Some(PendingCommand {
        head: chain.head,
        command: Command::parse(bytes.get(..len)?),
        answer,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use iommu::AddressSpace;

    use super::*;
    use crate::interrupt::MsiAllocator as _;
    use crate::queue::Interrupt;
    use crate::testing::{self, Board, Ring};

    #[test]
    fn commands_are_carried_out_in_turns_until_none_is_posted() {
        let ram = testing::ram();
        let ring = Ring::new(&ram, 0x1000, 16);
        let board = Board::default();
        let mut started = RunningQueue {
            queue: ring.queue(),
            dma: AddressSpace::identity(testing::REQUESTER, Arc::clone(&ram)).dma(),
            kick: Arc::new(testing::eventfd()),
            interrupt: Interrupt::new(board.vector().unwrap()),
        };
        for slot in 0..3_u16 {
            let at = 0x8000 + 0x100 * u64::from(slot);
            ring.write(at, [4_u8, 0, 1 + u8::try_from(slot).unwrap(), 0]);
            ring.describe(ring.base, 2 * slot, (at, 4), testing::NEXT, 2 * slot + 1);
            ring.describe(ring.base, 2 * slot + 1, (at + 8, 1), testing::WRITE, 0);
            ring.make_available(2 * slot);
        }
        let mut executed = Vec::new();
        let mut turns = 0;
        loop {
            let mut execute = |command| {
                executed.push(command);
                command != Command::Pairs(2)
            };
            serve(&mut started, &mut execute).unwrap();
            turns += 1;
            assert!(executed.len() <= turns * MAX_COMMANDS);
            if started.kick.read().is_err() {
                break;
            }
        }
        assert_eq!(executed, [1, 2, 3].map(Command::Pairs));
        assert_eq!(ring.done(), 3);
        let answers = [0x8008, 0x8108, 0x8208].map(|at| ring.read::<u8>(at));
        assert_eq!(answers, [0, 1, 0]);
        assert_eq!(board.allocated(0).signals(), 3);
    }

    #[test]
    fn commands_other_than_pairs_are_unknown() {
        assert_eq!(Command::parse(&[4, 0, 3, 1]), Command::Pairs(0x103));
        for bytes in [&[4, 0, 3][..], &[4, 1, 3, 0], &[0, 0, 1, 0], &[], &[4]] {
            assert_eq!(Command::parse(bytes), Command::Unknown);
        }
    }
}
