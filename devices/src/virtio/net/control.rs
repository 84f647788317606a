//! The control queue of a network device (virtio 1.2 §5.1.6.5), as far as it
//! goes here: how many queue pairs are in use.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_MQ, VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET, VIRTIO_NET_ERR, VIRTIO_NET_OK,
};
use virtio_queue::QueueT as _;
use vm_memory::{Bytes as _, GuestAddress};

use iommu::DmaView;

use crate::virtio::chain::{Chain, RINGS_OUTSIDE};
use crate::virtio::{DeviceError, StartedQueue};

/// Largest size of the queue, and of a chain in it (§2.7.5.3.1).
pub const CONTROL_SIZE: u16 = 64;
/// Bytes of a command that are looked at: none that we know has more.
const MAX_COMMAND: usize = 16;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Command {
    /// `VQ_PAIRS_SET`: so many pairs from now on (§5.1.6.5.6).
    Pairs(u16),
    /// What we do not offer.
    Unknown,
}

impl Command {
    fn parse(bytes: &[u8]) -> Self {
        let class = (bytes.first().copied().map(u32::from), bytes.get(1).copied());
        let pairs = (
            Some(VIRTIO_NET_CTRL_MQ),
            Some(VIRTIO_NET_CTRL_MQ_VQ_PAIRS_SET),
        );
        match (class.0, class.1.map(u32::from), bytes.get(2..4)) {
            (class, command, Some(&[low, high])) if (class, command) == pairs => {
                Self::Pairs(u16::from_le_bytes([low, high]))
            }
            _ => Self::Unknown,
        }
    }
}

/// A command that waits for its answer.
struct Asked {
    head: u16,
    command: Command,
    answer: GuestAddress,
}

/// Carries out every command that is posted, with `execute`, which is called
/// while no view of memory is open and says whether it succeeded.
///
/// # Errors
/// The driver broke the rules of the queue.
pub fn serve(
    number: u16,
    started: &mut StartedQueue,
    execute: &mut dyn FnMut(Command) -> bool,
) -> Result<(), DeviceError> {
    let dma = started.space.dma();
    let bad = |reason| DeviceError::BadQueue {
        queue: number,
        reason,
    };
    let rings = |_| bad(RINGS_OUTSIDE);
    // A ring holds no more than that; who posts more kicks again.
    for _ in 0..started.queue.size() {
        let asked = {
            let view = dma.view();
            let chain = Chain::take(&mut started.queue, &view, CONTROL_SIZE).map_err(bad)?;
            let Some(chain) = chain else {
                break;
            };
            let asked = parse(&view, &chain);
            if view.take_fault().is_some() {
                return Err(bad("a command is not in memory"));
            }
            asked.ok_or_else(|| bad("a command has no room for its answer"))?
        };
        let answer = if execute(asked.command) {
            VIRTIO_NET_OK
        } else {
            VIRTIO_NET_ERR
        };
        let view = dma.view();
        let [answer, ..] = answer.to_le_bytes();
        view.write_obj(answer, asked.answer)
            .map_err(|_| bad("an answer is not in memory"))?;
        let queue = &mut started.queue;
        queue.add_used(&view, asked.head, 1).map_err(rings)?;
        if queue.needs_notification(&view).map_err(rings)? {
            started.interrupt.signal();
        }
    }
    // With event indices the driver kicks only for what is beyond the index
    // that we show it: look again after showing it.
    let view = dma.view();
    if started.queue.enable_notification(&view).map_err(rings)? {
        let _ = started.kick.write(1);
    }
    Ok(())
}

fn parse(view: &DmaView<'_>, chain: &Chain) -> Option<Asked> {
    let mut bytes = Vec::with_capacity(MAX_COMMAND);
    for buffer in &chain.given {
        let room = MAX_COMMAND - bytes.len();
        let mut part = vec![0; room.min(buffer.len as usize)];
        view.read_slice(&mut part, buffer.at).ok()?;
        bytes.extend(part);
    }
    let answer = chain.room.iter().find(|buffer| buffer.len > 0)?.at;
    Some(Asked {
        head: chain.head,
        command: Command::parse(&bytes),
        answer,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_set_and_nothing_else_is_known() {
        assert_eq!(Command::parse(&[4, 0, 3, 1]), Command::Pairs(0x103));
        for bytes in [&[4, 0, 3][..], &[4, 1, 3, 0], &[0, 0, 1, 0], &[], &[4]] {
            assert_eq!(Command::parse(bytes), Command::Unknown);
        }
    }
}
