//! The link status of a network device: that of its tap.

use std::io;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use log::{info, warn};

use super::Shared;
use super::rings::State;
use crate::error::Chain;
use crate::failure::DeviceError;
use crate::tap::Link;
use crate::vhost::RINGS;
use crate::vhost::worker::{EpollClient, VhostWorker};

impl Shared {
    /// Makes the thread follow the tap's link.
    ///
    /// # Errors
    /// The link cannot be watched.
    pub(super) fn watch_link(self: &Arc<Self>, thread: &VhostWorker) -> io::Result<()> {
        let client = Arc::downgrade(self) as Weak<dyn EpollClient>;
        let mut state = self.state.lock();
        state.link = state.tap.link();
        // The carrier is reported some time after the tap was opened.
        if state.link == Link::Down {
            self.log(&state, Link::Up);
        }
        let up = state.link == Link::Up;
        self.counters.link_up.store(up, Ordering::Relaxed);
        thread.serve(client, &[state.tap.links()])
    }

    /// Handles changes of links of the host: notifies the driver if this one
    /// changed. A tap that was deleted and created again is used again.
    pub(super) fn follow_link(&self) {
        let mut state = self.state.lock();
        if !state.tap.links().take_changes() {
            return;
        }
        let before = state.link;
        state.link = state.tap.link();
        if state.link == Link::Gone {
            if before != Link::Gone {
                state.stop_rings();
            }
            if let Err(error) = state.reattach_tap(&self.id) {
                self.failure.record(error);
            }
        }
        if state.link == before {
            return;
        }
        self.log(&state, before);
        let up = state.link == Link::Up;
        drop(state);
        if self.counters.link_up.swap(up, Ordering::Relaxed) != up {
            self.link_changed.store(true, Ordering::Release);
            self.failure.request_check();
        }
    }

    /// Logs a loss of the link as a warning, other changes as information.
    fn log(&self, state: &State, before: Link) {
        let (id, tap) = (&self.id, state.tap.name());
        match state.link {
            Link::NoCarrier | Link::Down if before == Link::Gone => {
                info!("{id}: there is a tap {tap} again, and it is not up yet");
            }
            Link::Up => info!("{id}: the link of tap {tap} is up"),
            Link::NoCarrier => warn!("{id}: tap {tap} has no carrier: the guest has no link"),
            Link::Down => {
                warn!("{id}: tap {tap} is down: the guest has no link until `ip link set {tap} up`")
            }
            Link::Gone => warn!(
                "{id}: tap {tap} was deleted: the guest has no link until there is one of the name"
            ),
        }
    }
}

impl State {
    /// Removes the back end of every ring.
    fn stop_rings(&mut self) {
        for pair in 0..self.pairs.len() {
            for ring in 0..RINGS {
                self.stop_ring(pair, ring);
            }
        }
    }

    /// Uses the new tap of the name, if there is one. One that cannot be used
    /// counts as absent, with one warning: the next change of a link tries
    /// again.
    fn reattach_tap(&mut self, id: &str) -> Result<(), DeviceError> {
        match self.tap.reattach() {
            Ok(true) => {}
            Ok(false) => {
                self.refused = false;
                return Ok(());
            }
            Err(error) => {
                if !std::mem::replace(&mut self.refused, true) {
                    warn!("{id}: {}", Chain(&error));
                }
                return Ok(());
            }
        }
        self.refused = false;
        self.link = self.tap.link();
        for pair in 0..self.active {
            for ring in 0..RINGS {
                self.start_ring(pair, ring)?;
            }
        }
        Ok(())
    }
}
