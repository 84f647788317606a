//! Messages to the service manager (sd_notify(3)): a datagram to the socket that `NOTIFY_SOCKET`
//! names.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use crate::streams::print_error;

/// Time after which a message to a service manager that reads none is dropped.
const TIMEOUT: Duration = Duration::from_secs(1);

/// The service manager that started the process, if one did.
pub struct ServiceManager(Option<File>);

impl ServiceManager {
    /// Connects to the socket of the environment. A confined process can write to a connected
    /// socket, and connect to none.
    pub fn connect() -> Self {
        let Some(address) = std::env::var_os("NOTIFY_SOCKET").filter(|it| !it.is_empty()) else {
            return Self(None);
        };
        let socket = connect(&address);
        if let Err(error) = &socket {
            let address = address.to_string_lossy();
            print_error(format_args!(
                "cannot notify the service manager at {address}: {error}; unset NOTIFY_SOCKET \
                 where there is none"
            ));
        }
        Self(socket.ok())
    }

    /// Reports that the service is ready: its guest runs, or its API is served.
    pub fn ready(&mut self) {
        self.send(b"READY=1");
    }

    /// Reports that the service ends.
    pub fn stopping(&mut self) {
        self.send(b"STOPPING=1");
    }

    fn send(&mut self, message: &[u8]) {
        if let Some(socket) = &mut self.0
            && let Err(error) = socket.write_all(message)
        {
            print_error(format_args!("cannot notify the service manager: {error}"));
        }
    }
}

fn connect(address: &OsStr) -> io::Result<File> {
    let address = match address.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(address)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.connect_addr(&address)?;
    socket.set_write_timeout(Some(TIMEOUT))?;
    // A file writes by write(2), which every thread kind may call.
    Ok(File::from(OwnedFd::from(socket)))
}
