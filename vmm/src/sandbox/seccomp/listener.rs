//! The thread `sandbox`, which makes forbidden calls with `--sandbox log`.
//!
//! `SECCOMP_RET_LOG` would write to the audit log, which a user of the monitor
//! does not see, and a SIGSYS handler cannot make the call in place. Instead
//! each filter notifies this thread, which lets the kernel make the call
//! (`SECCOMP_USER_NOTIF_FLAG_CONTINUE`) and then logs it, once for each pair of
//! kind and call.
#![allow(unsafe_code)] // The ioctls of a listener.

use std::collections::BTreeSet;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::Builder;

use devices::thread::ThreadKind;
use libc::{SECCOMP_IOCTL_NOTIF_RECV, SECCOMP_IOCTL_NOTIF_SEND, c_int};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::names;

/// Token of the eventfd; the token of a filter is its index.
const WAKE: u64 = u64::MAX;
/// Upper bound on the logged pairs of kind and call.
const MAX_LOGGED: usize = 1024;

static STARTED: OnceLock<(Sender<Filter>, EventFd)> = OnceLock::new();

/// The listener of a thread's filter.
struct Filter {
    listener: OwnedFd,
    kind: ThreadKind,
    /// Name of the thread.
    name: String,
}

/// Starts the thread, which is not confined. Later calls do nothing.
///
/// # Errors
/// No thread or file descriptor is left.
pub(super) fn start() -> io::Result<()> {
    let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let epoll = Epoll::new()?;
    let event = EpollEvent::new(EventSet::IN, WAKE);
    epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event)?;
    let (sender, added) = channel();
    if STARTED.set((sender, wake)).is_ok() {
        Builder::new()
            .name("sandbox".to_owned())
            .spawn(move || run(&epoll, &added))?;
    }
    Ok(())
}

/// Passes the listener of the calling thread's filter to the thread. Makes
/// permitted calls only: no forbidden one would be answered yet.
///
/// # Errors
/// The thread has ended.
pub(super) fn add(listener: OwnedFd, kind: ThreadKind) -> io::Result<()> {
    let (sender, wake) = STARTED.get().ok_or(io::ErrorKind::NotFound)?;
    let thread = std::thread::current();
    let filter = Filter {
        listener,
        kind,
        name: thread.name().unwrap_or_default().to_owned(),
    };
    sender.send(filter).map_err(io::Error::other)?;
    wake.write(1)
}

fn run(epoll: &Epoll, added: &Receiver<Filter>) {
    let mut filters: Vec<Filter> = Vec::new();
    let mut logged = BTreeSet::new();
    let mut events = [EpollEvent::default(); 8];
    loop {
        let count = match epoll.wait(-1, &mut events) {
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => {
                log::error!("waiting for forbidden system calls: {error}");
                return;
            }
        };
        for event in events.iter().take(count) {
            if event.data() == WAKE {
                if let Some((_, wake)) = STARTED.get() {
                    let _ = wake.read();
                }
                while let Ok(filter) = added.try_recv() {
                    let fd = filter.listener.as_raw_fd();
                    let token = u64::try_from(filters.len()).unwrap_or(WAKE);
                    let event = EpollEvent::new(EventSet::IN, token);
                    if let Err(error) = epoll.ctl(ControlOperation::Add, fd, event) {
                        log::error!("watching for forbidden system calls: {error}");
                    }
                    filters.push(filter);
                }
                continue;
            }
            let index = usize::try_from(event.data()).unwrap_or(usize::MAX);
            let Some(filter) = filters.get(index) else {
                continue;
            };
            if event.event_set().contains(EventSet::HANG_UP) {
                // The thread has ended.
                let fd = filter.listener.as_raw_fd();
                let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
                continue;
            }
            // Continued first: the thread may hold the lock of the log.
            if let Some((number, address)) = filter.continue_call()
                && logged.len() < MAX_LOGGED
                && logged.insert((filter.kind as u8, number))
            {
                let call = names::name(number.into()).unwrap_or("unknown");
                let name = &filter.name;
                log::warn!(
                    "thread {name} makes the forbidden system call {call} ({number}) at \
                     {address:#x}; later ones of its kind are not logged"
                );
            }
        }
    }
}

impl Filter {
    /// Lets the kernel make the pending call. Returns its number and address;
    /// `None` when a signal has withdrawn it.
    fn continue_call(&self) -> Option<(c_int, u64)> {
        let fd = self.listener.as_raw_fd();
        let mut pending = MaybeUninit::<libc::seccomp_notif>::zeroed();
        // SAFETY: the kernel reads and writes a structure of this size, which
        // must be zero.
        if unsafe { libc::ioctl(fd, SECCOMP_IOCTL_NOTIF_RECV, pending.as_mut_ptr()) } != 0 {
            return None;
        }
        // SAFETY: all zeros is a value of the structure, and the kernel has
        // filled it.
        let pending = unsafe { pending.assume_init() };
        let answer = libc::seccomp_notif_resp {
            id: pending.id,
            val: 0,
            error: 0,
            flags: u32::try_from(libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE).unwrap_or(1),
        };
        // SAFETY: the kernel reads a structure of this size.
        let sent = unsafe { libc::ioctl(fd, SECCOMP_IOCTL_NOTIF_SEND, &raw const answer) };
        (sent == 0).then_some((pending.data.nr, pending.data.instruction_pointer))
    }
}
