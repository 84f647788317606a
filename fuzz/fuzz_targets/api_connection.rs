//! A client's connection to the API: bytes in arbitrary pieces, reads, closes, deadlines, and the
//! machine's answers at any time. Each request is answered at most once, the client reads a series
//! of whole responses, and no loop is endless.
#![no_main]

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Instant;

use api::Limits;
use api::connection::{Connection, Step};
use api::route::{View, respond, route};
use libfuzzer_sys::arbitrary::{self, Arbitrary};
use libfuzzer_sys::fuzz_target;
use vmm::action::{ActionError, Reply};

/// Bytes of the shortest request. It bounds the steps after one event: each step answers a request
/// or ends the loop.
const SHORTEST_REQUEST: usize = 16;

#[derive(Arbitrary, Debug)]
enum Event<'a> {
    /// The client sends these bytes.
    Send(&'a [u8]),
    /// The client sends the valid request of this index.
    Request(u8),
    /// The client reads up to this number of bytes.
    Read(u16),
    /// The client shuts down its sending side.
    CloseWrite,
    /// The client closes the connection.
    Close,
    /// The deadline passes.
    Expire,
    /// The machine answers a call: its number, counted back from the newest, and success.
    Answer(u8, bool),
    /// The server closes the connection in favour of another client.
    Displace,
}

const REQUESTS: [&[u8]; 6] = [
    b"GET / HTTP/1.1\r\n\r\n",
    b"HEAD /version HTTP/1.1\r\n\r\n",
    b"GET /nothing HTTP/1.1\r\nConnection: close\r\n\r\n",
    b"PATCH /vm HTTP/1.1\r\nContent-Length: 19\r\n\r\n{\"state\": \"Paused\"}",
    b"PUT /entropy HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
    b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
];

struct Driven {
    /// The server's side; `None` after it was closed.
    connection: Option<Connection>,
    client: Option<UnixStream>,
    sent: usize,
    calls: u64,
    /// Number of responses that the server created.
    responses: u32,
    received: Vec<u8>,
}

impl Driven {
    fn new() -> Self {
        let (client, server) = UnixStream::pair().expect("a pair of sockets");
        for end in [&client, &server] {
            end.set_nonblocking(true).expect("a flag can be set");
        }
        Self {
            connection: Some(Connection::new(server, Limits::default())),
            client: Some(client),
            sent: 0,
            calls: 0,
            responses: 0,
            received: Vec::new(),
        }
    }

    fn send(&mut self, bytes: &[u8]) {
        if let Some(client) = &mut self.client {
            // The server may have closed the connection, or the socket is full.
            self.sent += client.write(bytes).unwrap_or(0);
        }
    }

    fn read(&mut self, len: usize) {
        let Some(client) = &mut self.client else {
            return;
        };
        let mut bytes = vec![0; len];
        match client.read(&mut bytes) {
            Ok(count) => self.received.extend_from_slice(&bytes[..count]),
            Err(error) => assert!(
                matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::ConnectionReset
                ),
                "{error}"
            ),
        }
    }

    /// Advances the connection as the poll loop does on an event.
    fn advance(&mut self) {
        let most = 4 * (self.sent / SHORTEST_REQUEST + 4);
        for steps in 0.. {
            assert!(steps < most, "a connection loops");
            let Some(connection) = &mut self.connection else {
                return;
            };
            match connection.step() {
                Step::Wait => {
                    connection.changed_interest();
                    return;
                }
                Step::Close => self.connection = None,
                Step::Refuse(response) => {
                    connection.respond_and_close(&response);
                    self.responses += 1;
                }
                Step::Serve(request) => match route(&request) {
                    Ok(route) => self.calls = connection.begin_call(route.view),
                    Err(response) => {
                        connection.respond(&response);
                        self.responses += 1;
                    }
                },
            }
        }
    }

    fn answer(&mut self, back: u8, done: bool) {
        let Some(connection) = &mut self.connection else {
            return;
        };
        let number = self.calls.wrapping_sub(back.into());
        let Some(view) = connection.take_call(number) else {
            return;
        };
        assert_eq!(number, self.calls, "an old call was answered");
        assert!(connection.take_call(number).is_none(), "answered twice");
        let outcome = match (done, &view) {
            (true, View::Whole) => Ok(Reply::Version("1".to_owned())),
            (true, _) => Ok(Reply::Done),
            (false, _) => Err(ActionError::Unanswered),
        };
        connection.respond(&respond(&view, outcome));
        self.responses += 1;
        self.advance();
    }

    fn on(&mut self, event: &Event) {
        match event {
            Event::Send(bytes) => self.send(bytes),
            Event::Request(number) => self.send(REQUESTS[usize::from(*number) % REQUESTS.len()]),
            Event::Read(len) => self.read((*len).into()),
            Event::CloseWrite => {
                if let Some(client) = &self.client {
                    // The connection may be closed already.
                    let _ = client.shutdown(Shutdown::Write);
                }
            }
            Event::Close => {
                self.client = None;
                if let Some(connection) = &mut self.connection {
                    connection.peer_closed();
                }
            }
            Event::Expire => {
                let Some(connection) = &mut self.connection else {
                    return;
                };
                match connection.expire() {
                    Some(_) => self.responses += 1,
                    None => self.connection = None,
                }
            }
            Event::Answer(back, done) => return self.answer(*back, *done),
            Event::Displace => {
                let waits = |connection: &mut Connection| {
                    let answering = connection.is_answering();
                    let waits = connection.waits_since(Instant::now()).is_some();
                    assert!(!(answering && waits), "an open request would be dropped");
                    waits
                };
                self.connection.take_if(waits);
                return;
            }
        }
        if let Some(connection) = &mut self.connection {
            connection.receive();
        }
        self.advance();
    }

    /// Checks that the client read whole responses, no more than the server created, of which only
    /// the last may be truncated.
    fn check(&mut self) {
        self.read(1 << 20);
        let mut rest = self.received.as_slice();
        let mut whole = 0;
        while let Some(end) = rest.windows(4).position(|window| window == b"\r\n\r\n") {
            assert!(rest.starts_with(b"HTTP/1.1 "), "{rest:?}");
            let head = std::str::from_utf8(&rest[..end]).expect("a head is text");
            whole += u32::from(!head.starts_with("HTTP/1.1 100"));
            // The response to a HEAD has no body, which only the next head shows.
            let length = head
                .lines()
                .find_map(|line| line.strip_prefix("Content-Length: "))
                .map_or(0, |length| length.parse().expect("a length"));
            let body = &rest[end + 4..];
            rest = match body.starts_with(b"HTTP/1.1 ") {
                true => body,
                false => body.get(length..).unwrap_or_default(),
            };
        }
        assert!(whole <= self.responses, "{whole} of {}", self.responses);
    }
}

fuzz_target!(|events: Vec<Event>| {
    let mut driven = Driven::new();
    for event in &events {
        driven.on(event);
    }
    driven.check();
});
