//! Bounds on the resources of clients.

use std::time::Duration;

/// Bounds on the resources of clients.
#[derive(Clone, Debug)]
pub struct Limits {
    /// Upper bound on connections. For one more, the connection that has waited longest for a
    /// request is closed; if none waits, the new one is answered 503.
    pub connections: usize,
    /// Timeout of a connection without a request.
    pub idle: Duration,
    /// Time without input for which a served client keeps its connection while another client needs
    /// one.
    pub keep: Duration,
    /// Timeout of a request's arrival, from its first byte.
    pub request: Duration,
    /// Timeout of the machine's answer; then the client receives 503.
    pub answer: Duration,
    /// Timeout of the client's reading of a response.
    pub response: Duration,
    /// Time for which input is read and dropped after an error, so that the client can read the
    /// response before the connection closes.
    pub drain: Duration,
    /// Time for responses in progress when the server ends.
    pub shutdown: Duration,
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
            shutdown: Duration::from_millis(500),
        }
    }
}
