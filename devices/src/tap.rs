//! A tap device of the host: the other end of a network device's cable.
#![allow(unsafe_code)] // The ioctls below; each says why it is sound.

mod links;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use libc::{
    IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR,
    TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6,
    TUNGETIFF, TUNGETVNETHDRSZ, TUNSETIFF, TUNSETOFFLOAD, TUNSETQUEUE, TUNSETVNETHDRSZ, c_int,
    c_uint, c_ulong,
};

pub use self::links::Links;
use self::links::{check, request, short};

/// Bytes of `struct virtio_net_hdr` in a modern device (virtio 1.2 §5.1.6).
const HEADER_SIZE: c_int = 12;

/// What a tap's receiver can be given unfinished: bits of `TUNSETOFFLOAD`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Offloads(c_uint);

impl Offloads {
    /// Everything is finished before it is given.
    pub const NONE: Self = Self(0);
    /// Packets without a checksum; needed for the others.
    pub const CSUM: Self = Self(TUN_F_CSUM);
    /// TCP over IPv4 in large pieces.
    pub const TSO4: Self = Self(TUN_F_TSO4);
    /// TCP over IPv6 in large pieces.
    pub const TSO6: Self = Self(TUN_F_TSO6);
    /// Large pieces with congestion bits.
    pub const ECN: Self = Self(TUN_F_TSO_ECN);
    /// UDP in fragments.
    pub const UFO: Self = Self(TUN_F_UFO);
    /// UDP over IPv4 in large pieces.
    pub const USO4: Self = Self(TUN_F_USO4);
    /// UDP over IPv6 in large pieces.
    pub const USO6: Self = Self(TUN_F_USO6);

    /// Both.
    #[must_use]
    pub const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    /// Whether all of `other` is in it.
    #[must_use]
    pub const fn contains(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// Why a tap cannot be used. One line for the user.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The host has no tap devices.
    #[error("/dev/net/tun is missing: load it with `modprobe tun`")]
    NoTun,
    /// The user may not open them.
    #[error("no permission to open /dev/net/tun: `chmod a+rw /dev/net/tun`")]
    TunDenied,
    /// It cannot be opened for another reason.
    #[error("cannot open /dev/net/tun")]
    Tun(#[source] io::Error),
    /// The name cannot be one.
    #[error(
        "{0:?} is no name of a network device: it has 1 to 15 bytes and no '/', ':' or white space"
    )]
    BadName(String),
    /// The kernel would choose a name.
    #[error("{0:?} is a template and no name: give the name of one tap device, without '%'")]
    Template(String),
    /// Another kind of network device has the name.
    #[error("{0} is a network device and no tap: name a tap, or one that is to be made")]
    NotATap(String),
    /// There is none, and the user may not make one.
    #[error(
        "there is no tap {name} and no permission to make it: `ip tuntap add {name} mode tap user $USER{flags}`"
    )]
    Missing {
        /// Its name.
        name: String,
        /// What `ip tuntap` needs more.
        flags: &'static str,
    },
    /// It belongs to another user.
    #[error("no permission to use tap {0}: `ip tuntap add` it with `user $USER`")]
    Denied(String),
    /// Another process has it.
    #[error("tap {0} is in use by another process")]
    Busy(String),
    /// It has one queue only.
    #[error(
        "tap {name} has one queue and {wanted} are wanted: make it with `ip tuntap add {name} mode tap multi_queue`"
    )]
    OneQueue {
        /// Its name.
        name: String,
        /// How many queue pairs are wanted.
        wanted: usize,
    },
    /// Anything else.
    #[error("{what} tap {name} failed")]
    Other {
        /// Its name.
        name: String,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// What the guest's end of the cable is to show (virtio 1.2 §5.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// Packets pass.
    Up,
    /// The interface is up and has no carrier.
    NoCarrier,
    /// The interface is down.
    Down,
    /// The interface was deleted.
    Gone,
}

/// The file of a queue pair.
#[derive(Debug)]
struct Queue {
    file: File,
    /// Whether it takes part in the distribution of packets.
    attached: bool,
}

/// A tap with a file for each queue pair. It existed before and stays, or it
/// is made and goes with this.
///
/// It may be deleted at any time. Offloads and queues that are set then are
/// set when there is a tap of its name again.
#[derive(Debug)]
pub struct Tap {
    name: String,
    links: Links,
    queues: Vec<Queue>,
    multi_queue: bool,
    supported: Offloads,
    offloads: Offloads,
    /// The size of the header before us.
    header: c_int,
}

impl Tap {
    /// Opens the tap of this name with `pairs` queues, or makes it, with `mtu`
    /// if there is one. All queues but the first are detached.
    ///
    /// # Errors
    /// [`TapError`]
    pub fn open(name: &str, pairs: usize, mtu: Option<u16>) -> Result<Self, TapError> {
        check_name(name)?;
        let other = |what| other(name, what);
        let links = Links::open().map_err(other("watching for changes"))?;
        let exists = links.exists(name).map_err(other("looking for the link"))?;
        if exists && !links.is_tap(name).map_err(other("looking at the driver"))? {
            return Err(TapError::NotATap(name.to_owned()));
        }
        let mut tap = Self {
            name: name.to_owned(),
            links,
            queues: Vec::new(),
            multi_queue: pairs > 1,
            supported: Offloads::NONE,
            offloads: Offloads::NONE,
            header: HEADER_SIZE,
        };
        for pair in 0..pairs.max(1) {
            tap.queues.push(Queue {
                file: open_tun()?,
                attached: pair == 0,
            });
        }
        tap.attach_all(exists)?;
        tap.find_supported();
        tap.configure()?;
        if !exists {
            let up = tap.links.bring_up(name, mtu);
            up.map_err(tap.failed("setting up the link"))?;
        }
        Ok(tap)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Readable when an interface of the host has changed.
    #[must_use]
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// What the link is now. An interface that was moved to another network
    /// namespace cannot be seen and counts as up.
    #[must_use]
    pub fn link(&self) -> Link {
        let Ok(name) = self.current_name() else {
            return Link::Gone;
        };
        match self.links.flags(&name) {
            Ok(flags) if flags.up && flags.running => Link::Up,
            // The kernel takes an interface down in the course of deleting it,
            // and answers for the file when it is through.
            _ if self.is_gone() => Link::Gone,
            Ok(flags) if flags.up => Link::NoCarrier,
            Ok(_) => Link::Down,
            Err(_) => Link::Up,
        }
    }

    /// Whether the interface was deleted.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.current_name().is_err()
    }

    /// Connects to the new tap of the name, with offloads and queues as they
    /// were set last. Returns whether there is one. The interface was deleted.
    ///
    /// The process that makes the tap has it for a moment: one that is in use
    /// and down is not there yet.
    ///
    /// # Errors
    /// [`TapError`]; it stays disconnected.
    pub fn reattach(&mut self) -> Result<bool, TapError> {
        let exists = self.links.exists(&self.name);
        if !exists.map_err(self.failed("looking for the link"))? {
            return Ok(false);
        }
        match self.attach_all(true) {
            Err(TapError::Busy(_)) if !self.is_up() => return Ok(false),
            attached => attached?,
        }
        self.configure()?;
        Ok(true)
    }

    fn is_up(&self) -> bool {
        self.links.flags(&self.name).is_ok_and(|flags| flags.up)
    }

    /// Attaches every file to the interface, the first one last: while it is
    /// not attached the tap is gone.
    fn attach_all(&mut self, exists: bool) -> Result<(), TapError> {
        let pairs = self.queues.len();
        // An interface that exists has one queue or several, and takes files
        // that say the same.
        let kinds: &[bool] = match (exists, pairs > 1) {
            (false, several) => &[several],
            (true, false) => &[false, true],
            (true, true) => &[true, false],
        };
        for queue in self.queues.iter().rev() {
            let mut done = Ok(());
            for &several in kinds {
                done = attach(&queue.file, &self.name, several);
                self.multi_queue = several;
                let mismatch = |error: &io::Error| error.raw_os_error() == Some(libc::EINVAL);
                if !done.as_ref().is_err_and(mismatch) {
                    break;
                }
            }
            if exists && pairs > 1 && !self.multi_queue {
                return Err(TapError::OneQueue {
                    name: self.name.clone(),
                    wanted: pairs,
                });
            }
            match done {
                // An attempt before got as far as this file.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                done => done.map_err(|error| refusal(&self.name, exists, pairs, error))?,
            }
        }
        Ok(())
    }

    /// What the host can leave unfinished for the guest.
    #[must_use]
    pub fn supported(&self) -> Offloads {
        self.supported
    }

    /// The file of a queue pair.
    #[must_use]
    pub fn queue(&self, pair: usize) -> Option<BorrowedFd<'_>> {
        self.queues.get(pair).map(|queue| queue.file.as_fd())
    }

    /// Says what the guest takes unfinished.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.offloads = offloads;
        self.unless_gone(self.apply_offloads(offloads))
    }

    fn apply_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let queue = self.queues.first().ok_or(io::ErrorKind::NotFound)?;
        let (fd, offloads) = (queue.file.as_raw_fd(), c_ulong::from(offloads.0));
        // SAFETY: the argument of this ioctl is a number and no pointer.
        check(unsafe { libc::ioctl(fd, TUNSETOFFLOAD, offloads) })
    }

    /// Takes a queue pair into the distribution of packets, or out of it. A
    /// tap of one queue has it in always.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn set_attached(&mut self, pair: usize, attached: bool) -> io::Result<()> {
        let queue = self.queues.get_mut(pair).ok_or(io::ErrorKind::NotFound)?;
        queue.attached = attached;
        self.unless_gone(self.apply_attached(pair, attached))
    }

    fn apply_attached(&self, pair: usize, attached: bool) -> io::Result<()> {
        let queue = self.queues.get(pair).ok_or(io::ErrorKind::NotFound)?;
        if !self.multi_queue {
            return Ok(());
        }
        let mut request = request(&self.name)?;
        let flag = if attached {
            IFF_ATTACH_QUEUE
        } else {
            IFF_DETACH_QUEUE
        };
        request.ifr_ifru.ifru_flags = short(flag);
        // SAFETY: the kernel reads the structure that the pointer is to.
        check(unsafe { libc::ioctl(queue.file.as_raw_fd(), TUNSETQUEUE, &raw const request) })
    }

    /// What fails because the interface was deleted is done when there is one
    /// again.
    fn unless_gone(&self, result: io::Result<()>) -> io::Result<()> {
        result.or_else(|error| if self.is_gone() { Ok(()) } else { Err(error) })
    }

    /// The name that the interface has now.
    fn current_name(&self) -> io::Result<String> {
        let queue = self.queues.first().ok_or(io::ErrorKind::NotFound)?;
        let mut request = request("")?;
        let fd = queue.file.as_raw_fd();
        // SAFETY: the kernel writes the structure that the pointer is to.
        check(unsafe { libc::ioctl(fd, TUNGETIFF, &raw mut request) })?;
        let name = request.ifr_name.iter().take_while(|&&byte| byte != 0);
        let name = name
            .map(|byte| u8::from_ne_bytes(byte.to_ne_bytes()))
            .collect();
        String::from_utf8(name).map_err(io::Error::other)
    }

    /// Tries what the kernel knows to leave unfinished.
    fn find_supported(&mut self) {
        let tcp = Offloads::CSUM
            .with(Offloads::TSO4)
            .with(Offloads::TSO6)
            .with(Offloads::ECN);
        let uso = tcp.with(Offloads::USO4).with(Offloads::USO6);
        // Kernels differ in what they know of UDP.
        let known = [uso.with(Offloads::UFO), uso, tcp.with(Offloads::UFO), tcp];
        let known = known.into_iter().find(|o| self.apply_offloads(*o).is_ok());
        self.supported = known.unwrap_or_default();
    }

    /// Sets up an interface that the files have just been attached to.
    fn configure(&mut self) -> Result<(), TapError> {
        let first = self.queues.first().map(|queue| queue.file.as_raw_fd());
        let fd = first.ok_or(TapError::NoTun)?;
        let mut header: c_int = 0;
        // SAFETY: the kernel writes the int that the pointer is to.
        let got = check(unsafe { libc::ioctl(fd, TUNGETVNETHDRSZ, &raw mut header) });
        got.map_err(self.failed("reading the header size"))?;
        self.header = header;
        let header = HEADER_SIZE;
        // SAFETY: the kernel reads the int that the pointer is to.
        let set = check(unsafe { libc::ioctl(fd, TUNSETVNETHDRSZ, &raw const header) });
        set.map_err(self.failed("setting the header size"))?;
        self.apply_offloads(self.offloads)
            .map_err(self.failed("setting the offloads"))?;
        for (pair, queue) in self.queues.iter().enumerate() {
            if !queue.attached {
                self.apply_attached(pair, false)
                    .map_err(self.failed("detaching a queue"))?;
            }
        }
        Ok(())
    }

    fn failed(&self, what: &'static str) -> impl Fn(io::Error) -> TapError + use<> {
        other(&self.name, what)
    }
}

fn other(name: &str, what: &'static str) -> impl Fn(io::Error) -> TapError + use<> {
    let name = name.to_owned();
    move |source| TapError::Other {
        name: name.clone(),
        what,
        source,
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = self.apply_offloads(Offloads::NONE);
        if let Some(queue) = self.queues.first() {
            let header = &raw const self.header;
            // SAFETY: the kernel reads the int that the pointer is to.
            let _ = unsafe { libc::ioctl(queue.file.as_raw_fd(), TUNSETVNETHDRSZ, header) };
        }
    }
}

/// Whether a name can be that of one interface (`dev_valid_name`), and means no
/// other.
fn check_name(name: &str) -> Result<(), TapError> {
    let separator = |byte: char| matches!(byte, '/' | ':' | '\0') || byte.is_ascii_whitespace();
    if name.is_empty()
        || name.len() >= libc::IFNAMSIZ
        || name.contains(separator)
        || matches!(name, "." | "..")
    {
        return Err(TapError::BadName(name.to_owned()));
    }
    if name.contains('%') {
        return Err(TapError::Template(name.to_owned()));
    }
    Ok(())
}

fn open_tun() -> Result<File, TapError> {
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK)
        .open("/dev/net/tun");
    opened.map_err(|source| match source.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => TapError::NoTun,
        Some(libc::EACCES | libc::EPERM) => TapError::TunDenied,
        _ => TapError::Tun(source),
    })
}

fn attach(queue: &File, name: &str, multi_queue: bool) -> io::Result<()> {
    let mut request = request(name)?;
    let several = if multi_queue { IFF_MULTI_QUEUE } else { 0 };
    request.ifr_ifru.ifru_flags = short(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | several);
    // SAFETY: the kernel reads the structure that the pointer is to, and writes
    // the name back to it.
    check(unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETIFF, &raw mut request) })
}

fn refusal(name: &str, exists: bool, pairs: usize, source: io::Error) -> TapError {
    let name = name.to_owned();
    match source.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) if exists => TapError::Denied(name),
        Some(libc::EPERM | libc::EACCES) => TapError::Missing {
            name,
            flags: if pairs > 1 { " multi_queue" } else { "" },
        },
        Some(libc::EBUSY | libc::E2BIG) => TapError::Busy(name),
        _ => TapError::Other {
            name,
            what: "attaching a queue",
            source,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_are_refused_before_anything_is_opened() {
        for name in ["", "a/b", "..", "sixteen-bytes-xx", "a:b", "a b"] {
            assert!(matches!(
                Tap::open(name, 1, None),
                Err(TapError::BadName(_))
            ));
        }
    }

    #[test]
    fn template_of_a_name_is_refused() {
        for name in ["tap%d", "%d"] {
            let error = Tap::open(name, 1, None).unwrap_err();
            assert!(matches!(error, TapError::Template(_)), "{error}");
            assert!(error.to_string().contains("template"));
        }
    }

    #[test]
    fn network_device_of_another_kind_is_named() {
        let error = Tap::open("lo", 1, None).unwrap_err();
        assert!(error.to_string().starts_with("lo is a network device"));
    }

    #[test]
    fn refusals_say_what_to_do() {
        let error = |number| io::Error::from_raw_os_error(number);
        let text = |exists, number| refusal("tap7", exists, 4, error(number)).to_string();
        let missing = text(false, libc::EPERM);
        assert!(missing.contains("ip tuntap add tap7 mode tap user $USER multi_queue"));
        assert!(text(true, libc::EPERM).contains("no permission to use tap tap7"));
        assert!(text(true, libc::EBUSY).contains("tap7 is in use"));
        for text in [missing, text(true, libc::EPERM), text(true, libc::EIO)] {
            assert!(!text.contains('\n'));
        }
    }
}
