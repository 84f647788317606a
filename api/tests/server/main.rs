//! The server over its real socket, with a machine that exists in name only.

mod bytes;
mod hostile;
mod life;
mod support;
