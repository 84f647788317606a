//! The queue pairs of a network device and their back ends.

use std::io;
use std::sync::Arc;

use crate::failure::DeviceError;
use crate::queue::RunningQueue;
use crate::tap::{Link, Tap};
use crate::vhost::pairs::QueuePairs;
use crate::vhost::{RINGS, Vhost};

/// Error of a change of the number of queue pairs.
#[derive(Debug, thiserror::Error)]
pub(super) enum PairsError {
    /// The device has fewer pairs, or the tap refused.
    #[error(transparent)]
    Refused(#[from] io::Error),
    /// A queue cannot be started: the device needs a reset.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

pub(super) struct State {
    pub(super) tap: Tap,
    /// The tap's link at the last check.
    pub(super) link: Link,
    /// The new tap of the name could not be used, and the warning was logged.
    pub(super) refused: bool,
    pub(super) pairs: Vec<Pair>,
    /// Selects the pair of a new mapping.
    pub(super) all: Arc<QueuePairs>,
    /// Number of pairs that the driver uses; the others have no back end.
    pub(super) active: usize,
    pub(super) control: Option<(u16, RunningQueue)>,
    /// Index of the control queue with the negotiated features.
    pub(super) control_number: u16,
}

/// A receive queue and a transmit queue.
pub(super) struct Pair {
    pub(super) vhost: Vhost,
    pub(super) rings: [Option<Ring>; RINGS],
}

pub(super) struct Ring {
    pub(super) started: RunningQueue,
    pub(super) running: bool,
}

impl State {
    /// Starts a ring if the driver has enabled it and its pair is in use. If
    /// the tap was deleted, the ring starts when the tap is used again.
    pub(super) fn start_ring(&mut self, pair: usize, index: usize) -> Result<(), DeviceError> {
        if self.link == Link::Gone {
            return Ok(());
        }
        let tap = self.tap.queue(pair);
        let Some(known) = self.pairs.get_mut(pair) else {
            return Ok(());
        };
        let Some(Some(ring)) = known.rings.get_mut(index) else {
            return Ok(());
        };
        if ring.running {
            return Ok(());
        }
        let number = u16::try_from(RINGS * pair + index).unwrap_or(u16::MAX);
        known.vhost.set_up_ring(index, number, &ring.started)?;
        ring.running = true;
        if let Err(source) = known.vhost.kernel().set_tap(index, tap) {
            if self.tap.is_gone() {
                self.stop_ring(pair, index);
                return Ok(());
            }
            let failed = DeviceError::backend("starting a queue of the host's vhost-net");
            return Err(failed(source));
        }
        // The kernel ignores kicks from before it had the tap.
        let _ = ring.started.kick.write(1);
        Ok(())
    }

    /// Stops a ring, if it runs, and records its position.
    pub(super) fn stop_ring(&mut self, pair: usize, index: usize) {
        let Some(known) = self.pairs.get_mut(pair) else {
            return;
        };
        let Some(Some(ring)) = known.rings.get_mut(index) else {
            return;
        };
        if !std::mem::take(&mut ring.running) {
            return;
        }
        if let Err(error) = known.vhost.kernel().set_tap(index, None) {
            log::error!("stopping a queue of the host's vhost-net: {error}");
        }
        let position = known.vhost.ring_stopped(index);
        ring.started.set_position(position);
    }

    /// Sets the number of pairs in use, without starting or stopping a ring.
    pub(super) fn set_active(&mut self, pairs: usize) {
        self.active = pairs;
        self.all
            .set_active(u32::try_from(pairs).unwrap_or(u32::MAX));
    }

    /// Uses the first `pairs` pairs from now on.
    ///
    /// # Errors
    /// [`PairsError`]
    pub(super) fn use_pairs(&mut self, pairs: usize) -> Result<(), PairsError> {
        if pairs == 0 || pairs > self.pairs.len() {
            return Err(io::Error::from(io::ErrorKind::InvalidInput).into());
        }
        for pair in pairs..self.active {
            for ring in 0..RINGS {
                self.stop_ring(pair, ring);
            }
            self.tap.set_attached(pair, false)?;
            self.set_active(pair.min(self.active));
        }
        for pair in self.active..pairs {
            self.tap.set_attached(pair, true)?;
        }
        let new = self.active..pairs;
        self.set_active(pairs);
        for pair in new {
            for ring in 0..RINGS {
                self.start_ring(pair, ring)?;
            }
        }
        Ok(())
    }
}

/// Index of a data queue's pair, and of its ring in the pair.
pub(super) fn split(index: u16) -> (usize, usize) {
    (usize::from(index) / RINGS, usize::from(index) % RINGS)
}

pub(super) fn ring_total(pairs: usize) -> u16 {
    u16::try_from(RINGS * pairs).unwrap_or(u16::MAX)
}
