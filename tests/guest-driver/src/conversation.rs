//! A running function, buffers for it, and a peer that answers.

use std::collections::HashSet;
use std::net::Ipv4Addr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::frame::{arp_reply, arp_request};
use crate::memory::Shared;
use crate::ring::Buffer;
use crate::vfio::{Access, Container, Mapping};
use crate::virtio_net::{Function, Queues};

/// Number of buffers in a pool.
pub const SLOTS: u16 = 32;
/// Length of a buffer in bytes.
const SLOT: u32 = 2048;
/// Content of buffers before a device writes them.
pub const CANARY: u8 = 0xc5;

/// IOVA of the transmit buffers.
pub const TRANSMIT_IOVA: u64 = 0x4000_0000;
/// IOVA of the receive buffers: above 32 bits, so that a lost half of an address is detected.
pub const RECEIVE_IOVA: u64 = 0x1_4000_0000;

/// Time limit of an answer on a slow, busy machine.
const TIMEOUT: Duration = Duration::from_secs(20);

/// Buffers of one direction, mapped as a whole or not at all.
pub struct Pool {
    mapping: Option<Mapping>,
    /// Their bytes.
    pub memory: Shared,
    container: Container,
    iova: u64,
    device_writes: bool,
}

impl Pool {
    fn new(container: &Container, iova: u64, device_writes: bool) -> Result<Self> {
        let memory = Shared::anonymous(usize::from(SLOTS) * usize::try_from(SLOT)?)?;
        memory.fill(CANARY);
        Ok(Self {
            mapping: None,
            memory,
            container: container.clone(),
            iova,
            device_writes,
        })
    }

    /// Maps the buffers for the device.
    pub fn map(&mut self, access: Access) -> Result<()> {
        self.mapping = Some(self.container.map(&self.memory, self.iova, access)?);
        Ok(())
    }

    /// Unmaps the buffers, and returns when the device no longer uses them.
    pub fn unmap(&mut self) -> Result<()> {
        let mapping = self.mapping.take().context("the pool is not mapped")?;
        mapping.unmap()
    }

    /// Buffer `slot`, as it is made available to the device.
    pub fn buffer(&self, slot: u16) -> Buffer {
        Buffer {
            iova: self.iova + u64::from(slot % SLOTS) * u64::from(SLOT),
            len: SLOT,
            device_writes: self.device_writes,
        }
    }

    /// Offset of the bytes that the device reaches at the address of `buffer`.
    fn offset(&self, buffer: Buffer) -> Result<usize> {
        let offset = usize::try_from(buffer.iova.wrapping_sub(self.iova))?;
        ensure!(offset < self.memory.len(), "{buffer:?} is not of this pool");
        Ok(offset)
    }
}

/// Requests sent through a running function, and their answers.
pub struct Conversation<'a> {
    /// The function's queues; dropped first, so that the function is reset before its buffers are
    /// unmapped.
    pub queues: Queues<'a>,
    /// Device-readable buffers of the requests.
    pub transmit: Pool,
    /// Device-writable buffers of the answers.
    pub receive: Pool,
    mac: [u8; 6],
    peer: Ipv4Addr,
    next_slot: u16,
    answered: HashSet<Ipv4Addr>,
}

impl<'a> Conversation<'a> {
    /// Starts `function` with every receive buffer available. The receive pool is mapped with
    /// `receive_access`, the transmit pool for reading.
    pub fn start(
        function: &'a Function,
        peer: Ipv4Addr,
        receive_access: Access,
        vector: Option<u16>,
    ) -> Result<Self> {
        let container = function.device().container();
        let mut transmit = Pool::new(container, TRANSMIT_IOVA, false)?;
        let mut receive = Pool::new(container, RECEIVE_IOVA, true)?;
        transmit.map(Access::Read)?;
        receive.map(receive_access)?;
        let mut queues = function.start(vector)?;
        for slot in 0..SLOTS {
            queues.receive.ring.offer(receive.buffer(slot));
        }
        queues.kick_receive();
        Ok(Self {
            queues,
            transmit,
            receive,
            mac: function.mac(),
            peer,
            next_slot: 0,
            answered: HashSet::new(),
        })
    }

    /// Writes a request of `asker` into the next transmit buffer and makes it available, without a
    /// kick.
    pub fn offer_request(&mut self, asker: Ipv4Addr) -> Result<Buffer> {
        let request = arp_request(self.mac, asker, self.peer);
        let whole = self.transmit.buffer(self.next_slot);
        self.next_slot = self.next_slot.wrapping_add(1);
        self.transmit
            .memory
            .write(self.transmit.offset(whole)?, &request);
        let buffer = Buffer {
            len: u32::try_from(request.len())?,
            ..whole
        };
        self.queues.transmit.ring.offer(buffer);
        Ok(buffer)
    }

    /// Overwrites every transmit buffer with a request of `asker`, without making any available.
    pub fn rewrite_requests(&self, asker: Ipv4Addr) -> Result<()> {
        let request = arp_request(self.mac, asker, self.peer);
        for slot in 0..SLOTS {
            let offset = self.transmit.offset(self.transmit.buffer(slot))?;
            self.transmit.memory.write(offset, &request);
        }
        Ok(())
    }

    /// Sends a request of `asker`, and returns the address at which the device reads it.
    pub fn send(&mut self, asker: Ipv4Addr) -> Result<u64> {
        let buffer = self.offer_request(asker)?;
        self.queues.kick_transmit();
        Ok(buffer.iova)
    }

    /// Consumes the buffers used since the last call.
    fn collect(&mut self) -> Result<()> {
        while self.queues.transmit.ring.take_used()?.is_some() {}
        while let Some((buffer, len)) = self.queues.receive.ring.take_used()? {
            ensure!(len <= SLOT, "{len} bytes in a buffer of {SLOT}");
            let offset = self.receive.offset(buffer)?;
            let frame = self.receive.memory.read(offset, usize::try_from(len)?);
            self.answered.extend(arp_reply(&frame, self.peer));
            self.queues.receive.ring.offer(buffer);
            self.queues.kick_receive();
        }
        Ok(())
    }

    /// Whether `asker` is answered within `limit`.
    pub fn answered_within(&mut self, asker: Ipv4Addr, limit: Duration) -> Result<bool> {
        let end = Instant::now() + limit;
        loop {
            self.collect()?;
            if self.answered.contains(&asker) {
                return Ok(true);
            }
            if Instant::now() > end {
                return Ok(false);
            }
            sleep(Duration::from_millis(1));
        }
    }

    /// Sends a request of `asker` and waits for the answer.
    pub fn exchange(&mut self, asker: Ipv4Addr) -> Result<()> {
        self.send(asker)?;
        let answered = self.answered_within(asker, TIMEOUT)?;
        ensure!(answered, "no answer to {asker} from {}", self.peer);
        Ok(())
    }

    /// Waits for the answer to `asker` that a missing mapping stalled, after it was mapped again:
    /// first without a kick, as long as a device may need to notice the mapping, then with kicks of
    /// both queues. Returns which of the two it was.
    pub fn resumes(&mut self, asker: Ipv4Addr) -> Result<&'static str> {
        if self.answered_within(asker, Duration::from_secs(3))? {
            return Ok("resumed by itself");
        }
        self.queues.kick_transmit();
        self.queues.kick_receive();
        let answered = self.answered_within(asker, TIMEOUT)?;
        ensure!(
            answered,
            "{asker} is not answered though the mapping is back"
        );
        Ok("resumed by a kick")
    }
}
