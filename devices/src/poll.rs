//! A thread that waits for its sources with epoll.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::thread::{ThreadKind, spawn};

/// Token of the eventfd that ends [`Poll::run`].
const EXIT: u64 = u64::MAX;
/// Upper bound on events per wait.
const EVENTS: usize = 32;

/// Token of a source that belongs to a numbered owner.
pub(crate) fn token(owner: u32, source: u32) -> u64 {
    u64::from(owner) << 32 | u64::from(source)
}

/// Owner and source of a [`token`].
pub(crate) fn owner_and_source(token: u64) -> (u32, u32) {
    let half = |value: u64| u32::try_from(value & u64::from(u32::MAX)).unwrap_or(u32::MAX);
    (half(token >> 32), half(token))
}

/// The watched sources of a thread.
pub(crate) struct Poll {
    epoll: Epoll,
    exit: EventFd,
}

impl Poll {
    /// A set without sources.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub(crate) fn new() -> io::Result<Self> {
        let poll = Self {
            epoll: Epoll::new()?,
            exit: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        };
        poll.add(&poll.exit, EventSet::IN, EXIT)?;
        Ok(poll)
    }

    /// Watches `source` for `events`. `token` must not be `u64::MAX`.
    ///
    /// # Errors
    /// Of epoll_ctl(2): the source is watched already, or cannot be.
    pub(crate) fn add(&self, source: &dyn AsRawFd, events: EventSet, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(events, token);
        self.epoll
            .ctl(ControlOperation::Add, source.as_raw_fd(), event)
    }

    /// Ends [`add`](Self::add) of a source.
    ///
    /// # Errors
    /// Of epoll_ctl(2): the source is not watched.
    pub(crate) fn remove(&self, source: &dyn AsRawFd) -> io::Result<()> {
        let none = EpollEvent::default();
        self.epoll
            .ctl(ControlOperation::Delete, source.as_raw_fd(), none)
    }

    /// Calls `ready` with the token of each event, until the [`PollThread`] is
    /// dropped.
    ///
    /// # Errors
    /// Of epoll_wait(2), except an interruption.
    pub(crate) fn run(&self, mut ready: impl FnMut(u64)) -> io::Result<()> {
        let mut events = [EpollEvent::default(); EVENTS];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            for event in events.iter().take(count) {
                match event.data() {
                    EXIT => return Ok(()),
                    token => ready(token),
                }
            }
        }
    }
}

/// The thread of a [`Poll`], which ends when this is dropped.
pub struct PollThread {
    poll: Arc<Poll>,
    handle: Option<JoinHandle<()>>,
}

impl PollThread {
    /// Starts the thread `name`. `work` returns when [`Poll::run`] does.
    ///
    /// # Errors
    /// No thread is left.
    pub(crate) fn spawn(
        kind: ThreadKind,
        name: impl Into<String>,
        poll: &Arc<Poll>,
        work: impl FnOnce(&Poll) + Send + 'static,
    ) -> io::Result<Self> {
        let polled = Arc::clone(poll);
        let handle = spawn(kind, name, move || work(&polled))?;
        Ok(Self {
            poll: Arc::clone(poll),
            handle: Some(handle),
        })
    }
}

impl Drop for PollThread {
    fn drop(&mut self) {
        let _ = self.poll.exit.write(1);
        // The thread may drop its owner last, after a callback: it cannot join
        // itself.
        let current = std::thread::current().id();
        let handle = self.handle.take();
        if let Some(handle) = handle.filter(|it| it.thread().id() != current) {
            let _ = handle.join();
        }
    }
}
