//! The thread that serves every vhost file of the machine, also while the
//! control plane is busy or the guest is paused.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;

use iommu::lock::LeafMutex;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::thread::{ThreadKind, spawn};

/// Token of the eventfd that ends the thread.
const EXIT: u64 = u64::MAX;
/// Shift of the client's number in a token; the source is in the low half.
const CLIENT_SHIFT: u32 = 32;

/// A client whose sources the thread watches.
pub trait EpollClient: Send + Sync {
    /// Handles a readable source. `false` when the source is broken and must
    /// not be watched any longer.
    fn ready(&self, source: u32) -> bool;
}

#[derive(Clone)]
struct Client {
    served: Weak<dyn EpollClient>,
    sources: Vec<RawFd>,
}

struct Clients {
    next: u64,
    known: BTreeMap<u64, Client>,
}

struct Shared {
    epoll: Epoll,
    exit: EventFd,
    clients: LeafMutex<Clients>,
}

/// Owner of the thread, which ends when this is dropped.
pub struct VhostWorker {
    shared: Arc<Shared>,
    handle: Option<JoinHandle<()>>,
}

impl VhostWorker {
    /// Starts the thread, without clients.
    ///
    /// # Errors
    /// No file descriptor or thread is left.
    pub fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            epoll: Epoll::new()?,
            exit: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            clients: LeafMutex::new(Clients {
                next: 0,
                known: BTreeMap::new(),
            }),
        });
        shared.watch(&shared.exit, EXIT)?;
        let worker = Arc::clone(&shared);
        let handle = spawn(ThreadKind::VhostWorker, "iotlb", move || worker.run())?;
        Ok(Self {
            shared,
            handle: Some(handle),
        })
    }

    /// Serves `client` from now on: calls [`EpollClient::ready`] with the index
    /// of each readable source. A dropped client is removed; dropping it closes
    /// its files.
    ///
    /// # Errors
    /// A source cannot be watched.
    pub fn serve(&self, client: Weak<dyn EpollClient>, sources: &[&dyn AsRawFd]) -> io::Result<()> {
        let number = {
            let mut clients = self.shared.clients.lock();
            let gone = |known: &Client| known.served.strong_count() == 0;
            clients.known.retain(|_, known| !gone(known));
            clients.next += 1;
            let number = clients.next;
            let client = Client {
                served: client,
                sources: sources.iter().map(|fd| fd.as_raw_fd()).collect(),
            };
            clients.known.insert(number, client);
            number
        };
        for (source, fd) in (0_u64..).zip(sources) {
            self.shared.watch(*fd, number << CLIENT_SHIFT | source)?;
        }
        Ok(())
    }
}

impl Drop for VhostWorker {
    fn drop(&mut self) {
        let _ = self.shared.exit.write(1);
        if let Some(handle) = self.handle.take() {
            // The last client may drop this on the thread itself, which
            // cannot join itself.
            if handle.thread().id() != std::thread::current().id() {
                let _ = handle.join();
            }
        }
    }
}

impl Shared {
    fn watch(&self, source: &dyn AsRawFd, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(EventSet::IN, token);
        self.epoll
            .ctl(ControlOperation::Add, source.as_raw_fd(), event)
    }

    fn run(&self) {
        let mut events = [EpollEvent::default(); 32];
        loop {
            let count = match self.epoll.wait(-1, &mut events) {
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => {
                    log::error!("waiting for the host's vhost: {error}");
                    return;
                }
            };
            for event in events.iter().take(count) {
                let token = event.data();
                if token == EXIT {
                    return;
                }
                self.dispatch(token);
            }
        }
    }

    fn dispatch(&self, token: u64) {
        let client = self
            .clients
            .lock()
            .known
            .get(&(token >> CLIENT_SHIFT))
            .cloned();
        let source = u32::try_from(token & 0xffff_ffff).unwrap_or(u32::MAX);
        let Some(client) = client else {
            return;
        };
        let good = client.served.upgrade().map(|served| served.ready(source));
        if good != Some(true)
            && let Some(&fd) = client.sources.get(source as usize)
        {
            let none = EpollEvent::default();
            let _ = self.epoll.ctl(ControlOperation::Delete, fd, none);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    struct TestClient {
        fd: EventFd,
        calls: Mutex<Sender<u32>>,
        broken: bool,
    }

    impl EpollClient for TestClient {
        fn ready(&self, source: u32) -> bool {
            if !self.broken {
                self.fd.read().unwrap();
            }
            self.calls.lock().unwrap().send(source).unwrap();
            !self.broken
        }
    }

    fn client(broken: bool) -> (Arc<TestClient>, std::sync::mpsc::Receiver<u32>) {
        let (calls, received) = channel();
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let calls = Mutex::new(calls);
        (Arc::new(TestClient { fd, calls, broken }), received)
    }

    #[test]
    fn client_is_called_for_its_sources_until_one_is_broken() {
        let thread = VhostWorker::start().unwrap();
        let (good, good_calls) = client(false);
        let (broken, broken_calls) = client(true);
        for served in [&good, &broken] {
            let (other, _) = client(false);
            let client: Weak<TestClient> = Arc::downgrade(served);
            let sources: [&dyn AsRawFd; 2] = [&other.fd, &served.fd];
            thread.serve(client, &sources).unwrap();
            served.fd.write(1).unwrap();
        }
        assert_eq!(broken_calls.recv(), Ok(1));
        assert_eq!(good_calls.recv(), Ok(1));
        good.fd.write(1).unwrap();
        assert_eq!(good_calls.recv(), Ok(1));
        assert!(broken_calls.try_recv().is_err(), "it is still watched");
        drop(thread);
    }
}
