//! The network interfaces in the network namespace of this process. They are
//! read through a socket, because `/sys` may show another namespace.
#![allow(unsafe_code)] // The system calls below; each says why it is sound.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd};

use libc::{IFF_RUNNING, IFF_UP, c_int, ifreq};

/// Bytes of the receive buffer, more than an `RTM_NEWLINK` message. A longer
/// message is truncated, which is harmless: contents are not parsed.
const MESSAGE: usize = 8 << 10;
/// Upper bound on messages per call of [`Links::take_changes`].
const MAX_MESSAGES: usize = 64;
/// `SIOCETHTOOL`'s request for a [`DriverInfo`].
const ETHTOOL_GDRVINFO: u32 = 3;

/// `struct ethtool_drvinfo` (`include/uapi/linux/ethtool.h`).
#[repr(C)]
struct DriverInfo {
    cmd: u32,
    driver: [u8; 32],
    version: [u8; 32],
    firmware: [u8; 32],
    bus: [u8; 32],
    rom: [u8; 32],
    reserved: [u8; 12],
    counts: [u32; 5],
}

/// Flags of an interface that decide its link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkFlags {
    /// `IFF_UP`: the administrator set it up.
    pub up: bool,
    /// `IFF_RUNNING`: it is up and has a carrier.
    pub running: bool,
}

/// A netlink socket in the group of interface changes. Readable when any
/// interface changed.
#[derive(Debug)]
pub struct Links(File);

impl Links {
    /// Opens the socket and joins the group of interface changes.
    ///
    /// # Errors
    /// Error of socket(2) or bind(2).
    pub fn open() -> io::Result<Self> {
        let kind = libc::SOCK_RAW | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
        // SAFETY: a plain system call; the result is checked below.
        let socket = unsafe { libc::socket(libc::AF_NETLINK, kind, libc::NETLINK_ROUTE) };
        check(socket)?;
        // SAFETY: it has just been opened and nothing else has it.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        // SAFETY: all zeros is a value of the structure.
        let mut address: libc::sockaddr_nl = unsafe { std::mem::zeroed() };
        address.nl_family = libc::sa_family_t::try_from(libc::AF_NETLINK).unwrap_or_default();
        address.nl_groups = libc::RTMGRP_LINK.unsigned_abs();
        let size = libc::socklen_t::try_from(size_of_val(&address)).unwrap_or_default();
        let at = (&raw const address).cast();
        // SAFETY: the kernel reads `size` bytes of the structure.
        check(unsafe { libc::bind(socket.as_raw_fd(), at, size) })?;
        Ok(Self(File::from(socket)))
    }

    /// Reads the pending notifications, up to a bound: the socket stays
    /// readable when there are more. Returns whether there was one, or some
    /// were lost.
    pub fn take_changes(&self) -> bool {
        let mut message = [0; MESSAGE];
        let mut any = false;
        for _ in 0..MAX_MESSAGES {
            match (&self.0).read(&mut message) {
                Ok(_) => any = true,
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        any
    }

    /// Whether an interface of this name exists.
    ///
    /// # Errors
    /// Error of the ioctl.
    pub fn exists(&self, name: &str) -> io::Result<bool> {
        let mut request = request(name)?;
        match self.ask(libc::SIOCGIFINDEX, &mut request) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whether the interface is a tap, with one queue or several.
    ///
    /// # Errors
    /// Error of the ioctl.
    pub fn is_tap(&self, name: &str) -> io::Result<bool> {
        let mut info = DriverInfo {
            cmd: ETHTOOL_GDRVINFO,
            driver: [0; 32],
            version: [0; 32],
            firmware: [0; 32],
            bus: [0; 32],
            rom: [0; 32],
            reserved: [0; 12],
            counts: [0; 5],
        };
        let mut request = request(name)?;
        request.ifr_ifru.ifru_data = (&raw mut info).cast();
        match self.ask(libc::SIOCETHTOOL, &mut request) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => return Ok(false),
            Err(error) => return Err(error),
        }
        Ok(info.driver.starts_with(b"tun\0") && info.bus.starts_with(b"tap\0"))
    }

    /// The flags of an interface.
    ///
    /// # Errors
    /// Error of the ioctl; `ENODEV` when no interface has this name.
    pub fn flags(&self, name: &str) -> io::Result<LinkFlags> {
        let mut request = request(name)?;
        self.ask(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: the kernel has just written this member of the union.
        let flags = c_int::from(unsafe { request.ifr_ifru.ifru_flags });
        Ok(LinkFlags {
            up: flags & IFF_UP != 0,
            running: flags & IFF_RUNNING != 0,
        })
    }

    /// Sets the MTU of an interface, if given in bytes, and sets it up.
    ///
    /// # Errors
    /// Error of an ioctl.
    pub fn bring_up(&self, name: &str, mtu: Option<u16>) -> io::Result<()> {
        let mut link = request(name)?;
        if let Some(mtu) = mtu {
            link.ifr_ifru.ifru_mtu = c_int::from(mtu);
            self.ask(libc::SIOCSIFMTU, &mut link)?;
        }
        self.ask(libc::SIOCGIFFLAGS, &mut link)?;
        // SAFETY: the kernel has just written this member of the union.
        let flags = unsafe { link.ifr_ifru.ifru_flags };
        link.ifr_ifru.ifru_flags = flags | short(IFF_UP);
        self.ask(libc::SIOCSIFFLAGS, &mut link)
    }

    fn ask(&self, what: libc::Ioctl, request: &mut ifreq) -> io::Result<()> {
        // SAFETY: the kernel reads and writes the structure that the pointer is
        // to, and what `SIOCETHTOOL` has it point to: the caller's whole
        // `DriverInfo`.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), what, &raw mut *request) })
    }
}

impl AsRawFd for Links {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

/// An interface request with only a name.
pub(super) fn request(name: &str) -> io::Result<ifreq> {
    // SAFETY: all zeros is a value of the structure and of its union.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (to, &from) in request.ifr_name.iter_mut().zip(name.as_bytes()) {
        *to = libc::c_char::from_ne_bytes([from]);
    }
    Ok(request)
}

/// Truncates flags to the 16 bits of a request.
pub(super) fn short(flags: c_int) -> libc::c_short {
    let [low, high, ..] = flags.to_le_bytes();
    libc::c_short::from_le_bytes([low, high])
}

pub(super) fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_no_tap_and_an_absent_interface_is_recognized() {
        let links = Links::open().unwrap();
        assert!(links.exists("lo").unwrap());
        assert!(!links.is_tap("lo").unwrap());
        assert!(!links.exists("nowhere0").unwrap());
        let error = links.flags("nowhere0").unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
        assert!(!links.take_changes());
    }

    #[test]
    fn flags_keep_their_bits_in_16() {
        let flags = short(libc::IFF_VNET_HDR | libc::IFF_TAP);
        assert_eq!(flags.cast_unsigned(), 0x4002);
    }
}
