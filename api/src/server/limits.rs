//! Bounds on what clients cost the server.

use std::time::Duration;

/// How much a client may ask of the server.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Connections served at a time. For one more, the connection that has waited longest for a
    /// request is closed; if none waits, the new one is answered 503.
    pub connections: usize,
    /// How long a connection may stay without a request.
    pub idle: Duration,
    /// How long a client that was answered before keeps its connection without sending a byte
    /// while another client needs the place.
    pub keep: Duration,
    /// How long a request may take to arrive, from its first byte.
    pub request: Duration,
    /// How long the machine may take to answer before the client gets 503.
    pub answer: Duration,
    /// How long a client may take to read a response.
    pub response: Duration,
    /// How long what still arrives is read and dropped after an error, so that the client gets
    /// to read the response before the connection closes.
    pub drain: Duration,
    /// How long responses may take to leave once the server is told to end.
    pub farewell: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 32,
            idle: Duration::from_secs(120),
            keep: Duration::from_secs(5),
            request: Duration::from_secs(10),
            answer: Duration::from_secs(60),
            response: Duration::from_secs(10),
            drain: Duration::from_secs(1),
            farewell: Duration::from_millis(500),
        }
    }
}
