//! The thread that serves every vhost file of the machine, also while the
//! control plane is busy or the guest is paused.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::{Arc, Weak};

use iommu::lock::LeafMutex;
use vmm_sys_util::epoll::EventSet;

use crate::poll::{Poll, PollThread, owner_and_source, token};
use crate::thread::ThreadKind;

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

#[derive(Default)]
struct Clients {
    next: u32,
    known: BTreeMap<u32, Client>,
}

struct Shared {
    poll: Arc<Poll>,
    clients: LeafMutex<Clients>,
}

/// Owner of the thread, which ends when this is dropped.
pub struct VhostWorker {
    shared: Arc<Shared>,
    _thread: PollThread,
}

impl VhostWorker {
    /// Starts the thread, without clients.
    ///
    /// # Errors
    /// No file descriptor or thread is left.
    pub fn start() -> io::Result<Self> {
        let poll = Arc::new(Poll::new()?);
        let shared = Arc::new(Shared {
            poll: Arc::clone(&poll),
            clients: LeafMutex::default(),
        });
        let worker = Arc::clone(&shared);
        let work = move |poll: &Poll| {
            if let Err(error) = poll.run(|token| worker.dispatch(token)) {
                log::error!("waiting for the host's vhost: {error}");
            }
        };
        Ok(Self {
            shared,
            _thread: PollThread::spawn(ThreadKind::VhostWorker, "iotlb", &poll, work)?,
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
            clients.next = clients.next.wrapping_add(1);
            let number = clients.next;
            let client = Client {
                served: client,
                sources: sources.iter().map(|fd| fd.as_raw_fd()).collect(),
            };
            clients.known.insert(number, client);
            number
        };
        for (source, fd) in (0..).zip(sources) {
            let poll = &self.shared.poll;
            poll.add(*fd, EventSet::IN, token(number, source))?;
        }
        Ok(())
    }
}

impl Shared {
    fn dispatch(&self, token: u64) {
        let (number, source) = owner_and_source(token);
        let client = self.clients.lock().known.get(&number).cloned();
        let Some(client) = client else {
            return;
        };
        let good = client.served.upgrade().map(|served| served.ready(source));
        if good != Some(true)
            && let Some(fd) = client.sources.get(source as usize)
        {
            let _ = self.poll.remove(fd);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};

    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

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
