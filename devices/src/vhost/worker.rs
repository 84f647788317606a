//! The thread that answers every vhost file of the machine: also while the
//! control plane is busy or the guest is paused.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// The token of the eventfd that ends the thread.
const EXIT: u64 = u64::MAX;
/// A token is a client's number in the high half and its source in the low.
const CLIENT_SHIFT: u32 = 32;

/// Who is served.
pub trait EpollClient: Send + Sync {
    /// Its source of that number is readable. `false` when the source is broken
    /// and not to be watched any more.
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
    clients: Mutex<Clients>,
}

/// The thread. It ends when this is dropped.
pub struct VhostWorker {
    shared: Arc<Shared>,
    handle: Option<JoinHandle<()>>,
}

impl VhostWorker {
    /// Starts it, with nothing to do.
    ///
    /// # Errors
    /// No file descriptor or thread is left.
    pub fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            epoll: Epoll::new()?,
            exit: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            clients: Mutex::new(Clients {
                next: 0,
                known: BTreeMap::new(),
            }),
        });
        shared.watch(&shared.exit, EXIT)?;
        let worker = Arc::clone(&shared);
        let handle = std::thread::Builder::new()
            .name("iotlb".into())
            .spawn(move || worker.run())?;
        Ok(Self {
            shared,
            handle: Some(handle),
        })
    }

    /// Serves `client` from now on: whenever one of `sources` is readable, it
    /// is told the source's index. It is forgotten when it is dropped, which
    /// also closes its files.
    ///
    /// # Errors
    /// A source cannot be watched.
    pub fn serve(&self, client: Weak<dyn EpollClient>, sources: &[&dyn AsRawFd]) -> io::Result<()> {
        let number = {
            let mut clients = self.shared.clients();
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
            // The last user may have been served, and gone, on the thread
            // itself.
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
        let client = self.clients().known.get(&(token >> CLIENT_SHIFT)).cloned();
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

    fn clients(&self) -> MutexGuard<'_, Clients> {
        self.clients.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Sender, channel};

    use super::*;

    struct Bell {
        fd: EventFd,
        rung: Mutex<Sender<u32>>,
        broken: bool,
    }

    impl EpollClient for Bell {
        fn ready(&self, source: u32) -> bool {
            if !self.broken {
                self.fd.read().unwrap();
            }
            self.rung.lock().unwrap().send(source).unwrap();
            !self.broken
        }
    }

    fn bell(broken: bool) -> (Arc<Bell>, std::sync::mpsc::Receiver<u32>) {
        let (rung, heard) = channel();
        let fd = EventFd::new(EFD_NONBLOCK).unwrap();
        let rung = Mutex::new(rung);
        (Arc::new(Bell { fd, rung, broken }), heard)
    }

    #[test]
    fn client_is_told_of_its_sources_until_one_is_broken() {
        let thread = VhostWorker::start().unwrap();
        let (good, good_heard) = bell(false);
        let (broken, broken_heard) = bell(true);
        for client in [&good, &broken] {
            let (other, _) = bell(false);
            let served: Weak<Bell> = Arc::downgrade(client);
            let sources: [&dyn AsRawFd; 2] = [&other.fd, &client.fd];
            thread.serve(served, &sources).unwrap();
            client.fd.write(1).unwrap();
        }
        assert_eq!(broken_heard.recv(), Ok(1));
        assert_eq!(good_heard.recv(), Ok(1));
        good.fd.write(1).unwrap();
        assert_eq!(good_heard.recv(), Ok(1));
        assert!(broken_heard.try_recv().is_err(), "it is still watched");
        drop(thread);
    }
}
