//! The steps of the test. Each starts the function anew, so that no step depends on another.
//!
//! A step shows in two halves that the access does not happen: for a while no answer comes; once
//! the mapping exists, the stalled access is made. So a silent device, a lost kick or an
//! unreachable peer does not pass for isolation.

use std::cell::Cell;
use std::net::Ipv4Addr;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::conversation::{CANARY, Conversation, SLOTS};
use crate::vfio::Access;
use crate::virtio_net::Function;

/// Time to wait for a forbidden access.
const QUIET: Duration = Duration::from_secs(1);
/// Time to wait for it in each of many rounds.
const SHORT_QUIET: Duration = Duration::from_millis(200);
/// Rounds of a race between the device and an unmap.
const ROUNDS: u16 = 10;
/// Requests in flight at the unmap.
const BURST: u16 = 8;

/// Inputs of the steps.
pub struct Stage<'a> {
    function: &'a Function,
    own: Ipv4Addr,
    peer: Ipv4Addr,
    askers: Cell<u8>,
}

/// A step of the test.
pub struct Step {
    /// Its name on the command line and in the output.
    pub name: &'static str,
    /// Runs the step; returns an observation or the failure.
    pub run: fn(&Stage) -> Result<String>,
}

/// All steps, in the order of their execution.
pub const STEPS: &[Step] = &[
    Step {
        name: "exchange",
        run: exchange,
    },
    Step {
        name: "interrupt",
        run: interrupt,
    },
    Step {
        name: "unmapped-transmit",
        run: unmapped_transmit,
    },
    Step {
        name: "unmapped-receive",
        run: unmapped_receive,
    },
    Step {
        name: "read-only-receive",
        run: read_only_receive,
    },
    Step {
        name: "unmapped-used-ring",
        run: unmapped_used_ring,
    },
    Step {
        name: "unmap-receive-in-use",
        run: unmap_receive_in_use,
    },
    Step {
        name: "unmap-transmit-in-use",
        run: unmap_transmit_in_use,
    },
    Step {
        name: "again",
        run: exchange,
    },
];

impl<'a> Stage<'a> {
    /// Creates the inputs for `function`, with requests to `peer` from `own` and the addresses
    /// after it.
    pub fn new(function: &'a Function, own: Ipv4Addr, peer: Ipv4Addr) -> Self {
        Self {
            function,
            own,
            peer,
            askers: Cell::new(1),
        }
    }

    /// A sender that has sent no request yet, and never `own`; after 127 they repeat.
    fn new_asker(&self) -> Ipv4Addr {
        let count = self.askers.get();
        self.askers.set(count % 127 + 1);
        let [a, b, c, last] = self.own.octets();
        Ipv4Addr::new(a, b, c, last.wrapping_add(count))
    }

    fn start(&self, receive_access: Access) -> Result<Conversation<'a>> {
        Conversation::start(self.function, self.peer, receive_access, None)
    }

    /// Starts a conversation and completes one exchange, so that all translations were used.
    fn start_and_exchange(&self) -> Result<Conversation<'a>> {
        let mut conversation = self.start(Access::ReadWrite)?;
        conversation.exchange(self.new_asker())?;
        Ok(conversation)
    }
}

/// Frames go out and come in, often enough for the ring indices to wrap.
fn exchange(stage: &Stage) -> Result<String> {
    const TIMES: u32 = 100;
    let mut conversation = stage.start(Access::ReadWrite)?;
    for _ in 0..TIMES {
        conversation.exchange(stage.new_asker())?;
    }
    Ok(format!("{TIMES} requests answered"))
}

/// The device signals a used receive buffer by MSI-X.
fn interrupt(stage: &Stage) -> Result<String> {
    let interrupt = stage.function.device().msix()?;
    let mut conversation =
        Conversation::start(stage.function, stage.peer, Access::ReadWrite, Some(0))?;
    conversation.exchange(stage.new_asker())?;
    ensure!(
        interrupt.came_within(Duration::from_secs(10)),
        "an answer came without an interrupt"
    );
    Ok("an answer came with an interrupt".to_owned())
}

/// A descriptor with an unmapped address is not read.
fn unmapped_transmit(stage: &Stage) -> Result<String> {
    let mut conversation = stage.start_and_exchange()?;
    conversation.transmit.unmap()?;
    let used = conversation.queues.transmit.ring.used_index();
    let asker = stage.new_asker();
    let iova = conversation.send(asker)?;
    ensure!(
        !conversation.answered_within(asker, QUIET)?,
        "a frame was read at {iova:#x}, which is not mapped"
    );
    ensure!(
        conversation.queues.transmit.ring.used_index() == used,
        "a buffer at {iova:#x}, which is not mapped, was used"
    );
    conversation.transmit.map(Access::Read)?;
    let how = conversation.resumes(asker)?;
    Ok(format!("no read at {iova:#x}; {how}"))
}

/// Checks that no receive buffer is used from now on and that the unused ones are unchanged.
/// Buffers are made available and used in the order of their slots until the first one is used.
fn ensure_untouched(conversation: &Conversation, used: u16) -> Result<()> {
    let now = conversation.queues.receive.ring.used_index();
    ensure!(
        now == used,
        "{} receive buffers were used though the device cannot reach them",
        now.wrapping_sub(used)
    );
    let memory = &conversation.receive.memory;
    let bytes = memory.len() / usize::from(SLOTS);
    let untouched = memory.read(
        bytes * usize::from(used),
        memory.len() - bytes * usize::from(used),
    );
    let touched = untouched.iter().position(|byte| *byte != CANARY);
    ensure!(
        touched.is_none(),
        "byte {:#x} of unused receive buffers was written",
        touched.unwrap_or_default()
    );
    Ok(())
}

/// A descriptor with an unmapped address is not written.
fn unmapped_receive(stage: &Stage) -> Result<String> {
    let mut conversation = stage.start_and_exchange()?;
    conversation.receive.unmap()?;
    // After any number of used buffers, every buffer is blank now.
    conversation.receive.memory.fill(CANARY);
    let used = conversation.queues.receive.ring.used_index();
    let iova = conversation.receive.buffer(used).iova;
    let asker = stage.new_asker();
    conversation.send(asker)?;
    sleep(QUIET);
    let now = conversation.queues.receive.ring.used_index();
    ensure!(now == used, "a buffer that is not mapped was used");
    let touched = conversation.receive.memory.first_other_than(CANARY);
    ensure!(
        touched.is_none(),
        "byte {:#x} of a pool that is not mapped was written",
        touched.unwrap_or_default()
    );
    conversation.receive.map(Access::ReadWrite)?;
    let how = conversation.resumes(asker)?;
    Ok(format!("no write at {iova:#x}; {how}"))
}

/// A buffer that is mapped read-only is not written.
fn read_only_receive(stage: &Stage) -> Result<String> {
    let mut conversation = stage.start(Access::Read)?;
    let iova = conversation.receive.buffer(0).iova;
    let asker = stage.new_asker();
    conversation.send(asker)?;
    sleep(QUIET);
    ensure_untouched(&conversation, 0)?;
    conversation.receive.unmap()?;
    conversation.receive.map(Access::ReadWrite)?;
    let how = conversation.resumes(asker)?;
    Ok(format!("no write at {iova:#x}; {how}"))
}

/// An unmapped used ring is not written.
fn unmapped_used_ring(stage: &Stage) -> Result<String> {
    let mut conversation = stage.start_and_exchange()?;
    let queue = &mut conversation.queues.receive;
    let iova = queue.device_iova;
    queue.unmap_used_ring()?;
    let area = queue.ring.device_area();
    let before = area.read(0, area.len());
    let asker = stage.new_asker();
    conversation.send(asker)?;
    sleep(QUIET);
    let queue = &mut conversation.queues.receive;
    let area = queue.ring.device_area();
    ensure!(
        area.read(0, area.len()) == before,
        "the used ring was written though it is not mapped"
    );
    let container = stage.function.device().container();
    queue.map_used_ring(container)?;
    let how = conversation.resumes(asker)?;
    Ok(format!("no write at {iova:#x}; {how}"))
}

/// Receive buffers that are unmapped while frames come in are not written afterwards.
fn unmap_receive_in_use(stage: &Stage) -> Result<String> {
    let mut used_before = 0;
    let mut first_iova = None;
    for round in 0..ROUNDS {
        let mut conversation = stage.start(Access::ReadWrite)?;
        for _ in 0..BURST {
            conversation.offer_request(stage.own)?;
        }
        conversation.queues.kick_transmit();
        if round % 2 == 0 {
            // In half of the rounds the device is certainly active.
            wait_for_use(&conversation)?;
        }
        conversation.receive.unmap()?;
        let used = conversation.queues.receive.ring.used_index();
        for _ in 0..BURST {
            conversation.offer_request(stage.own)?;
        }
        conversation.queues.kick_transmit();
        sleep(SHORT_QUIET);
        ensure_untouched(&conversation, used)?;
        used_before += used;
        first_iova.get_or_insert(conversation.receive.buffer(used).iova);
    }
    let iova = first_iova.unwrap_or_default();
    Ok(format!(
        "{ROUNDS} rounds, {used_before} frames came before an unmap and none after; \
         the first time no write at {iova:#x}"
    ))
}

fn wait_for_use(conversation: &Conversation) -> Result<()> {
    for _ in 0..20_000 {
        if conversation.queues.receive.ring.used_index() != 0 {
            return Ok(());
        }
        sleep(Duration::from_millis(1));
    }
    anyhow::bail!("no frame came within 20 s")
}

/// Transmit buffers that are unmapped while frames go out are not read afterwards: later contents
/// are not sent until the buffers are mapped again.
fn unmap_transmit_in_use(stage: &Stage) -> Result<String> {
    let mut sent_before = 0;
    let mut how = "";
    let mut first_iova = None;
    for _ in 0..ROUNDS {
        let mut conversation = stage.start(Access::ReadWrite)?;
        for _ in 0..BURST {
            conversation.offer_request(stage.own)?;
        }
        conversation.queues.kick_transmit();
        conversation.transmit.unmap()?;
        let used = conversation.queues.transmit.ring.used_index();
        sent_before += used;
        // Frames are read in order, so the next one is where the device stalls.
        first_iova.get_or_insert(conversation.transmit.buffer(used).iova);
        let secret = stage.new_asker();
        conversation.rewrite_requests(secret)?;
        conversation.send(secret)?;
        ensure!(
            !conversation.answered_within(secret, SHORT_QUIET)?,
            "what was written to a buffer after its unmap went out"
        );
        conversation.transmit.map(Access::Read)?;
        how = conversation.resumes(secret)?;
    }
    let iova = first_iova.unwrap_or_default();
    Ok(format!(
        "{ROUNDS} rounds, {sent_before} frames went before an unmap and none after; \
         the first time no read at {iova:#x}; {how}"
    ))
}
