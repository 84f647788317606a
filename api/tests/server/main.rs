//! The server over its real socket, with a simulated machine.

mod bytes;
mod hostile;
mod life;
mod support;
