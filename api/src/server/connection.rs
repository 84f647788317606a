//! One connection: bytes in, at most one request being answered, bytes out.

use super::limits::Limits;
use crate::http::{self, Parsed, Request, Response};
use crate::route::View;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::EventSet;

/// Upper bound on the bytes read at one event, so that a busy client does not starve the others.
const READ_CHUNK: usize = 16 << 10;

/// Next step of a connection.
pub enum Step {
    /// Wait for an event, an outcome or the deadline.
    Wait,
    /// Close the connection.
    Close,
    /// Answer and close: the client's bytes cannot be parsed.
    Refuse(Response),
    /// Answer this request, now or by [`Connection::begin_call`].
    Serve(Request),
}

#[derive(Debug)]
enum Phase {
    /// Waiting for a request, or for the rest of one.
    Reading,
    /// A whole request was handed out and is not answered yet.
    Serving,
    /// The controller has the action.
    Calling { call: u64, view: View },
    /// A response is being sent.
    Writing,
    /// The last response was sent; further input is dropped.
    Draining,
}

/// A client's connection. The poll loop reports events to it, and performs [`Connection::step`]
/// until that is [`Step::Wait`].
pub struct Connection {
    stream: UnixStream,
    limits: Limits,
    phase: Phase,
    deadline: Instant,
    /// When the client last sent a byte, or connected.
    last_received: Instant,
    /// A request of the client was answered.
    served: bool,
    input: Vec<u8>,
    output: Vec<u8>,
    /// Bytes of `output` that were sent.
    sent: usize,
    /// The client has closed its sending direction.
    ended: bool,
    /// The client has disconnected.
    gone: bool,
    /// `100 Continue` was sent for the incomplete request.
    continued: bool,
    /// Whether the connection stays open after the current request.
    keep_alive: bool,
    head_only: bool,
    calls: u64,
    interest: EventSet,
}

impl Connection {
    /// Creates a connection whose descriptor is watched for [`EventSet::IN`] already.
    #[must_use]
    pub fn new(stream: UnixStream, limits: Limits) -> Self {
        let now = Instant::now();
        let deadline = now + limits.idle;
        Self {
            stream,
            limits,
            phase: Phase::Reading,
            deadline,
            last_received: now,
            served: false,
            input: Vec::new(),
            output: Vec::new(),
            sent: 0,
            ended: false,
            gone: false,
            continued: false,
            keep_alive: true,
            head_only: false,
            calls: 0,
            interest: EventSet::IN,
        }
    }

    /// Time at which [`Connection::expire`] is due.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// For a connection that may be closed in favour of another client: whether a request was
    /// served, and since when the client has sent nothing. `None` for one that is being answered,
    /// or that was served and sent something within [`Limits::keep`].
    #[must_use]
    pub fn waits_since(&self, now: Instant) -> Option<(bool, Instant)> {
        let quiet = now.saturating_duration_since(self.last_received) >= self.limits.keep;
        let waits = matches!(self.phase, Phase::Reading) && (quiet || !self.served);
        waits.then_some((self.served, self.last_received))
    }

    fn enter(&mut self, phase: Phase, timeout: Duration) {
        self.phase = phase;
        self.deadline = Instant::now() + timeout;
    }

    /// Reads the available bytes, once. While a request is being answered nothing is read, so that
    /// `input` never holds more than one request and a chunk.
    pub fn receive(&mut self) {
        if !matches!(self.phase, Phase::Reading | Phase::Draining) {
            return;
        }
        let mut chunk = [0; READ_CHUNK];
        match self.stream.read(&mut chunk) {
            Ok(0) => self.ended = true,
            Ok(_) if matches!(self.phase, Phase::Draining) => {}
            Ok(count) => {
                self.last_received = Instant::now();
                if self.input.is_empty() {
                    self.deadline = self.last_received + self.limits.request;
                }
                self.input.extend(chunk.iter().take(count));
            }
            Err(error) if is_temporary(&error) => {}
            Err(_) => self.gone = true,
        }
    }

    /// The client has closed both directions.
    pub fn peer_closed(&mut self) {
        // Earlier bytes may be unread, and can be a request.
        if !matches!(self.phase, Phase::Reading) || self.ended {
            self.gone = true;
        }
    }

    /// Advances the connection, and returns the next step.
    pub fn step(&mut self) -> Step {
        if self.gone || !self.flush() {
            return Step::Close;
        }
        match self.phase {
            Phase::Reading => self.next_request(),
            Phase::Serving | Phase::Calling { .. } => Step::Wait,
            Phase::Writing if !self.output.is_empty() => Step::Wait,
            Phase::Writing => self.after_response(),
            Phase::Draining if self.ended => Step::Close,
            Phase::Draining => Step::Wait,
        }
    }

    fn next_request(&mut self) -> Step {
        match http::parse(&self.input) {
            Ok(Parsed::Whole { request, used }) => {
                self.input.drain(..used);
                self.continued = false;
                self.keep_alive = request.keep_alive;
                self.head_only = request.method == "HEAD";
                self.enter(Phase::Serving, self.limits.answer);
                Step::Serve(request)
            }
            Ok(Parsed::Partial { .. }) if self.ended => Step::Close,
            Ok(Parsed::Partial { wants_continue }) => {
                if wants_continue && !self.continued {
                    self.continued = true;
                    self.output.extend_from_slice(http::CONTINUE);
                    if !self.flush() {
                        return Step::Close;
                    }
                }
                Step::Wait
            }
            Err(refusal) => {
                self.head_only = false;
                Step::Refuse(refusal.into())
            }
        }
    }

    fn after_response(&mut self) -> Step {
        if !self.keep_alive {
            // Only unread input, which turns the close into a reset, can lose bytes that the client
            // has to read.
            let _ = self.stream.shutdown(std::net::Shutdown::Write);
            self.input = Vec::new();
            self.enter(Phase::Draining, self.limits.drain);
            return if self.ended { Step::Close } else { Step::Wait };
        }
        if self.input.is_empty() {
            self.input = Vec::new();
            self.enter(Phase::Reading, self.limits.idle);
        } else {
            self.enter(Phase::Reading, self.limits.request);
        }
        self.next_request()
    }

    /// Records that the controller has the action of the current request; the number names the
    /// call.
    pub fn begin_call(&mut self, view: View) -> u64 {
        self.calls += 1;
        let call = self.calls;
        self.enter(Phase::Calling { call, view }, self.limits.answer);
        call
    }

    /// Ends the call of that number, if it is the current one.
    pub fn take_call(&mut self, number: u64) -> Option<View> {
        match &self.phase {
            Phase::Calling { call, view } if *call == number => {
                let view = view.clone();
                self.phase = Phase::Serving;
                Some(view)
            }
            _ => None,
        }
    }

    /// Answers the current request.
    pub fn respond(&mut self, response: &Response) {
        let bytes = response.to_bytes(self.keep_alive, self.head_only);
        self.output.extend_from_slice(&bytes);
        self.served = true;
        self.enter(Phase::Writing, self.limits.response);
    }

    /// Answers the input, and serves no further request.
    pub fn respond_and_close(&mut self, response: &Response) {
        self.keep_alive = false;
        self.respond(response);
    }

    /// Handles the deadline: returns the response to send before the close, if any.
    pub fn expire(&mut self) -> Option<Response> {
        let response = match self.phase {
            Phase::Reading if !self.input.is_empty() => {
                self.head_only = false;
                Response::fault(408, "the request did not arrive in time")
            }
            Phase::Serving | Phase::Calling { .. } => {
                Response::fault(503, "the machine did not answer in time")
            }
            Phase::Reading | Phase::Writing | Phase::Draining => return None,
        };
        self.respond_and_close(&response);
        Some(response)
    }

    /// Whether a request is being answered or a response being sent.
    pub fn is_answering(&self) -> bool {
        matches!(
            self.phase,
            Phase::Serving | Phase::Calling { .. } | Phase::Writing
        )
    }

    /// Returns the events to watch for, if they have changed since the last call.
    pub fn changed_interest(&mut self) -> Option<(RawFd, EventSet)> {
        let mut interest = EventSet::empty();
        if matches!(self.phase, Phase::Reading | Phase::Draining) && !self.ended {
            interest |= EventSet::IN;
        }
        if !self.output.is_empty() {
            interest |= EventSet::OUT;
        }
        if interest == self.interest {
            return None;
        }
        self.interest = interest;
        Some((self.stream.as_raw_fd(), interest))
    }

    /// Sends until the socket is full; false if the client has disconnected.
    fn flush(&mut self) -> bool {
        while let Some(rest) = self.output.get(self.sent..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return false,
                Ok(count) => self.sent += count,
                Err(error) if is_temporary(&error) => return true,
                Err(_) => return false,
            }
        }
        self.output = Vec::new();
        self.sent = 0;
        true
    }
}

fn is_temporary(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted)
}
