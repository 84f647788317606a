//! The HTTP API of a machine, over a Unix socket.
//!
//! One thread serves every connection from one poll loop. It parses requests ([`http`]), converts
//! each into an action of the machine ([`route`]), sends that to the controller and continues: it
//! never waits for the machine. Every size and time is bounded ([`Limits`]), so that no client can
//! make it grow or block.
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))] // They panic.
#![cfg_attr(not(test), warn(unreachable_pub, clippy::missing_errors_doc))]

pub mod client;
pub mod http;
mod prometheus;
pub mod route;
mod server;
mod socket;
#[cfg(test)]
mod testing;

#[doc(hidden)]
pub use server::connection;
pub use server::{Limits, Server, ServerError};
pub use socket::{BindError, Socket};
