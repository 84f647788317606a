//! The poll loop and its thread.

pub mod connection;
mod limits;

use crate::http::{Request, Response};
use crate::route::{self, View};
use crate::socket::Socket;
use connection::{Connection, Step};
pub use limits::Limits;
use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use vmm::action::{Action, Client, MetricFamily, Outcome, Reply};
use vmm::error::Chain;
use vmm::thread::{ThreadKind, spawn};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Upper bound on the connections beyond [`Limits::connections`] that are answered 503 at a time.
/// Further ones wait in the kernel's queue.
const REFUSED_AT_A_TIME: usize = 8;

/// Pause of accepting after the host refused a descriptor.
const ACCEPT_REST: Duration = Duration::from_millis(100);

const LISTENER: u64 = 0;
const WAKE: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

/// Error of starting the server.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No epoll or eventfd descriptor is available.
    #[error("cannot watch the API socket")]
    Watch(#[source] io::Error),
    /// No thread is available.
    #[error("cannot start the API thread")]
    Thread(#[source] io::Error),
}

/// A running server. Dropping it finishes the responses in progress, closes every connection and
/// removes the socket.
pub struct Server {
    signal: Arc<Signal>,
    thread: Option<JoinHandle<()>>,
    /// Removed from the file system when the thread has ended: the thread itself may not.
    _socket: Socket,
}

/// Wakes the poll loop from other threads.
struct Signal {
    stop: AtomicBool,
    wake: EventFd,
}

impl Server {
    /// Serves `socket` on a new thread, and sends the machine's actions to `client`.
    ///
    /// # Errors
    /// A descriptor or the thread is not available.
    pub fn start(socket: Socket, client: Client, limits: Limits) -> Result<Self, ServerError> {
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(ServerError::Watch)?;
        let stop = AtomicBool::new(false);
        let signal = Arc::new(Signal { stop, wake });
        let listener = socket.listener().try_clone().map_err(ServerError::Watch)?;
        let poll_loop =
            Loop::new(listener, client, limits, Arc::clone(&signal)).map_err(ServerError::Watch)?;
        let thread = spawn(ThreadKind::Api, "api", move || poll_loop.run());
        Ok(Self {
            signal,
            thread: Some(thread.map_err(ServerError::Thread)?),
            _socket: socket,
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.signal.stop.store(true, Ordering::Release);
        // It fails only when the counter would overflow, and then the loop is awake anyway.
        let _ = self.signal.wake.write(1);
        if let Some(thread) = self.thread.take() {
            // The panic hook has reported a panic of the thread.
            let _ = thread.join();
        }
    }
}

/// Outcome of an action, for one connection.
struct Delivery {
    connection: u64,
    call: u64,
    outcome: Outcome,
}

struct Loop {
    epoll: Epoll,
    listener: UnixListener,
    client: Client,
    limits: Limits,
    signal: Arc<Signal>,
    deliveries: (Sender<Delivery>, Receiver<Delivery>),
    connections: BTreeMap<u64, Connection>,
    next_token: u64,
    /// Whether the listener is watched; if not, the time from which it is again.
    listening: bool,
    rest_until: Option<Instant>,
    /// Time at which the loop ends, although responses are in progress.
    end_at: Option<Instant>,
    responses: BTreeMap<u16, u64>,
}

impl Loop {
    fn new(
        listener: UnixListener,
        client: Client,
        limits: Limits,
        signal: Arc<Signal>,
    ) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let wake = EpollEvent::new(EventSet::IN, WAKE);
        epoll.ctl(ControlOperation::Add, signal.wake.as_raw_fd(), wake)?;
        let acceptable = EpollEvent::new(EventSet::IN, LISTENER);
        epoll.ctl(ControlOperation::Add, listener.as_raw_fd(), acceptable)?;
        Ok(Self {
            epoll,
            listener,
            client,
            limits,
            signal,
            deliveries: mpsc::channel(),
            connections: BTreeMap::new(),
            next_token: FIRST_CONNECTION,
            listening: true,
            rest_until: None,
            end_at: None,
            responses: BTreeMap::new(),
        })
    }

    fn run(mut self) {
        let mut events = vec![EpollEvent::default(); 64];
        loop {
            let ready = match self.epoll.wait(self.timeout(), &mut events) {
                Ok(ready) => ready,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => 0,
                Err(error) => {
                    log::error!("the API ends, its poll failed: {error}");
                    return;
                }
            };
            for event in events.iter().take(ready) {
                match event.data() {
                    LISTENER => self.accept(),
                    WAKE => self.wake_up(),
                    token => self.on_event(token, event.event_set()),
                }
            }
            self.expire();
            self.listen_or_rest();
            if self.has_ended() {
                return;
            }
        }
    }

    /// Milliseconds until the next deadline, rounded up; -1 if there is none.
    fn timeout(&self) -> i32 {
        let deadlines = self.connections.values().map(Connection::deadline);
        let Some(next) = deadlines.chain(self.rest_until).chain(self.end_at).min() else {
            return -1;
        };
        let left = next.saturating_duration_since(Instant::now());
        i32::try_from(left.as_millis().saturating_add(1)).unwrap_or(i32::MAX)
    }

    fn accept(&mut self) {
        let stream = match self.listener.accept() {
            Ok((stream, _)) => stream,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
            Err(error) => {
                log::warn!("the API cannot accept a connection now: {error}");
                self.rest_until = Some(Instant::now() + ACCEPT_REST);
                return;
            }
        };
        let full = self.connections.len() >= self.limits.connections && !self.make_room();
        let token = self.next_token;
        self.next_token += 1;
        let fd = stream.as_raw_fd();
        let watched = stream.set_nonblocking(true).and_then(|()| {
            let event = EpollEvent::new(EventSet::IN, token);
            self.epoll.ctl(ControlOperation::Add, fd, event)
        });
        if let Err(error) = watched {
            log::warn!("the API drops a connection: {error}");
            return;
        }
        let mut connection = Connection::new(stream, self.limits.clone());
        if full {
            let response = Response::fault(503, "too many connections; close one or try again");
            self.count(&response);
            connection.respond_and_close(&response);
        }
        self.connections.insert(token, connection);
        self.advance(token);
    }

    /// Closes the connection that has waited longest for a request, first of all one that was never
    /// answered. False if none may be closed.
    fn make_room(&mut self) -> bool {
        let now = Instant::now();
        let waiting = self.connections.iter().filter_map(|(token, connection)| {
            let rank = connection.waits_since(now)?;
            Some((rank, *token))
        });
        let Some((_, token)) = waiting.min() else {
            return false;
        };
        self.connections.remove(&token);
        true
    }

    fn wake_up(&mut self) {
        // It fails only when there was no wake-up.
        let _ = self.signal.wake.read();
        if self.signal.stop.load(Ordering::Acquire) && self.end_at.is_none() {
            self.end_at = Some(Instant::now() + self.limits.shutdown);
        }
        while let Ok(delivery) = self.deliveries.1.try_recv() {
            self.deliver(delivery);
        }
    }

    fn deliver(&mut self, delivery: Delivery) {
        // The client may have disconnected, or received 503.
        let Some(connection) = self.connections.get_mut(&delivery.connection) else {
            return;
        };
        let Some(view) = connection.take_call(delivery.call) else {
            return;
        };
        let outcome = match delivery.outcome {
            Ok(Reply::Metrics(mut families)) => {
                families.push(response_counters(&self.responses));
                Ok(Reply::Metrics(families))
            }
            outcome => outcome,
        };
        let response = route::respond(&view, outcome);
        connection.respond(&response);
        self.count(&response);
        self.advance(delivery.connection);
    }

    fn on_event(&mut self, token: u64, events: EventSet) {
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if events.contains(EventSet::IN) {
            connection.receive();
        }
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.peer_closed();
        }
        self.advance(token);
    }

    /// Advances a connection until it would block.
    fn advance(&mut self, token: u64) {
        loop {
            let Some(connection) = self.connections.get_mut(&token) else {
                return;
            };
            match connection.step() {
                Step::Wait => break,
                Step::Close => {
                    self.connections.remove(&token);
                    return;
                }
                Step::Refuse(response) => {
                    connection.respond_and_close(&response);
                    self.count(&response);
                }
                Step::Serve(request) => self.serve(token, &request),
            }
        }
        let Some(connection) = self.connections.get_mut(&token) else {
            return;
        };
        if let Some((fd, events)) = connection.changed_interest() {
            self.watch(token, fd, events);
        }
    }

    fn watch(&mut self, token: u64, fd: RawFd, events: EventSet) {
        let event = EpollEvent::new(events, token);
        if let Err(error) = self.epoll.ctl(ControlOperation::Modify, fd, event) {
            log::warn!("the API drops a connection: {error}");
            self.connections.remove(&token);
        }
    }

    fn serve(&mut self, token: u64, request: &Request) {
        let response = match route::route(request) {
            Ok(route) => match self.ask(token, route.action, route.view) {
                Ok(()) => return,
                Err(response) => response,
            },
            Err(response) => response,
        };
        self.count(&response);
        if let Some(connection) = self.connections.get_mut(&token) {
            connection.respond(&response);
        }
    }

    fn ask(&mut self, token: u64, action: Action, view: View) -> Result<(), Response> {
        let Some(connection) = self.connections.get_mut(&token) else {
            return Ok(());
        };
        let call = connection.begin_call(view);
        let deliveries = self.deliveries.0.clone();
        let signal = Arc::clone(&self.signal);
        let deliver = move |outcome| {
            let connection = token;
            // A loop that has ended does not need the outcome.
            let _ = deliveries.send(Delivery {
                connection,
                call,
                outcome,
            });
            let _ = signal.wake.write(1);
        };
        self.client
            .send(action, deliver)
            .map_err(|error| Response::fault(503, &Chain(&error).to_string()))
    }

    fn expire(&mut self) {
        let now = Instant::now();
        let late = |(token, connection): (&u64, &Connection)| {
            (connection.deadline() <= now).then_some(*token)
        };
        let late: Vec<u64> = self.connections.iter().filter_map(late).collect();
        for token in late {
            let Some(connection) = self.connections.get_mut(&token) else {
                continue;
            };
            match connection.expire() {
                Some(response) => {
                    self.count(&response);
                    self.advance(token);
                }
                None => {
                    self.connections.remove(&token);
                }
            }
        }
    }

    /// Watches the listener only while another connection can be accepted or replace a waiting one.
    fn listen_or_rest(&mut self) {
        if self.rest_until.is_some_and(|until| until <= Instant::now()) {
            self.rest_until = None;
        }
        let room = self.limits.connections + REFUSED_AT_A_TIME;
        let now = Instant::now();
        let mut connections = self.connections.values();
        let has_room = self.connections.len() < room
            || connections.any(|connection| connection.waits_since(now).is_some());
        let listen = has_room && self.rest_until.is_none() && self.end_at.is_none();
        if listen == self.listening {
            return;
        }
        let events = if listen {
            EventSet::IN
        } else {
            EventSet::empty()
        };
        let event = EpollEvent::new(events, LISTENER);
        let fd = self.listener.as_raw_fd();
        match self.epoll.ctl(ControlOperation::Modify, fd, event) {
            Ok(()) => self.listening = listen,
            Err(error) => log::warn!("the API cannot watch its socket: {error}"),
        }
    }

    /// Once the server ends: closes the connections that wait for a client, and returns whether
    /// none is left.
    fn has_ended(&mut self) -> bool {
        let Some(end_at) = self.end_at else {
            return false;
        };
        self.connections
            .retain(|_, connection| connection.is_answering());
        self.connections.is_empty() || end_at <= Instant::now()
    }

    fn count(&mut self, response: &Response) {
        *self.responses.entry(response.status).or_insert(0) += 1;
    }
}

fn response_counters(responses: &BTreeMap<u16, u64>) -> MetricFamily {
    let counts = responses.iter();
    MetricFamily::by(
        "code",
        "portcullis_api_responses_total",
        "Responses of the API, by status code.",
        counts.map(|(status, count)| (status.to_string(), *count)),
    )
}
