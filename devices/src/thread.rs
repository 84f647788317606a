//! Starts the threads of the running monitor.
//!
//! The process has one confinement, so its entry is set once for the process
//! and not passed to each device that starts a thread.

use std::cell::Cell;
use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::sync_channel;
use std::thread::{Builder, JoinHandle};

/// Kinds of threads. Each kind has its own list of permitted system calls.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ThreadKind {
    /// Runs a vCPU, and the register accesses that it exits with.
    Vcpu,
    /// Answers the misses of vhost files.
    VhostWorker,
    /// Translates interrupts again.
    Msi,
    /// Serves a disk.
    Disk,
    /// Writes the guest's output.
    Console,
    /// Serves the API socket.
    Api,
    /// Answers queries that read the devices' state, and drops the machine.
    Queries,
    /// The main thread: the controller.
    EventLoop,
}

impl ThreadKind {
    /// All kinds.
    pub const ALL: [Self; 8] = [
        Self::Vcpu,
        Self::VhostWorker,
        Self::Msi,
        Self::Disk,
        Self::Console,
        Self::Api,
        Self::Queries,
        Self::EventLoop,
    ];
}

thread_local! {
    static VCPU: Cell<Option<u32>> = const { Cell::new(None) };
}

/// Index of the vCPU that the calling thread runs; `None` on other threads.
#[must_use]
pub fn vcpu() -> Option<u32> {
    VCPU.get()
}

/// Sets the index of the vCPU that the calling thread runs.
pub fn set_vcpu(index: u32) {
    VCPU.set(Some(index));
}

/// Confines the calling thread, of the given kind.
type Entry = Box<dyn Fn(ThreadKind) -> io::Result<()> + Send + Sync>;

static ENTRY: OnceLock<Entry> = OnceLock::new();

/// Sets the entry of every thread that is started from now on. Only the first
/// call has an effect.
pub fn set_entry(entry: impl Fn(ThreadKind) -> io::Result<()> + Send + Sync + 'static) {
    let _ = ENTRY.set(Box::new(entry));
}

fn enter(kind: ThreadKind) -> io::Result<()> {
    ENTRY.get().map_or(Ok(()), |entry| entry(kind))
}

/// Starts a thread whose first act is to confine itself; returns when it has
/// done so.
///
/// # Errors
/// No thread is left, or it cannot be confined; then `work` is not called.
pub fn spawn(
    kind: ThreadKind,
    name: impl Into<String>,
    work: impl FnOnce() + Send + 'static,
) -> io::Result<JoinHandle<()>> {
    let (sender, entered) = sync_channel(1);
    let thread = Builder::new().name(name.into()).spawn(move || {
        let outcome = enter(kind);
        let confined = outcome.is_ok();
        // The receiver waits for it.
        let _ = sender.send(outcome);
        drop(sender);
        if confined {
            work();
        }
    })?;
    let confined = entered.recv().map_err(io::Error::other).flatten();
    confined.map(|()| thread)
}
