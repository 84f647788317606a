//! The link of a network device follows that of its tap.

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
    /// Has the thread follow the tap's link from now on.
    ///
    /// # Errors
    /// The link cannot be watched.
    pub(super) fn watch_link(self: &Arc<Self>, thread: &VhostWorker) -> io::Result<()> {
        let client = Arc::downgrade(self) as Weak<dyn EpollClient>;
        let mut state = self.state();
        state.link = state.tap.link();
        // The carrier comes a moment after the tap was opened.
        if state.link == Link::Down {
            self.log(&state, Link::Up);
        }
        let up = state.link == Link::Up;
        self.counters.link_up.store(up, Ordering::Relaxed);
        thread.serve(client, &[state.tap.links()])
    }

    /// Links of the host have changed: shows the driver if this one did. A tap
    /// that was deleted is used again when there is one of its name.
    pub(super) fn follow_link(&self) {
        let mut state = self.state();
        if !state.tap.links().take_changes() {
            return;
        }
        let before = state.link;
        state.link = state.tap.link();
        if state.link == Link::Gone {
            if before != Link::Gone {
                state.stop_rings();
            }
            if let Err(error) = state.come_back(&self.id) {
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

    /// A warning for each loss of the link, and a note of the rest.
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
    /// Takes the back end away from every ring.
    fn stop_rings(&mut self) {
        for pair in 0..self.pairs.len() {
            for ring in 0..RINGS {
                self.stop_ring(pair, ring);
            }
        }
    }

    /// Uses the new tap of the name, if there is one. What cannot be used is
    /// none, with a warning the first time: the next change of a link tries
    /// again.
    fn come_back(&mut self, id: &str) -> Result<(), DeviceError> {
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
