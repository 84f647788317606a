//! A tap device of the host: the back end of a network device.
#![allow(unsafe_code)] // The ioctls below; each says why it is sound.

mod links;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;

use bitflags::bitflags;
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

bitflags! {
    /// Offloads that the tap's receiver accepts (`TUNSETOFFLOAD`). Without any,
    /// packets are complete: checksummed and not larger than the MTU.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub struct Offloads: c_uint {
        /// Packets without a checksum; needed for the others.
        const CSUM = TUN_F_CSUM;
        /// TCP segments over IPv4 that exceed the MTU.
        const TSO4 = TUN_F_TSO4;
        /// TCP segments over IPv6 that exceed the MTU.
        const TSO6 = TUN_F_TSO6;
        /// TCP segments that exceed the MTU, with ECN bits.
        const ECN = TUN_F_TSO_ECN;
        /// UDP datagrams that the receiver fragments.
        const UFO = TUN_F_UFO;
        /// UDP over IPv4 that the receiver segments.
        const USO4 = TUN_F_USO4;
        /// UDP over IPv6 that the receiver segments.
        const USO6 = TUN_F_USO6;
    }
}

/// Error of a tap. The text is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The host has no `/dev/net/tun`.
    #[error("/dev/net/tun is missing: load it with `modprobe tun`")]
    NoTun,
    /// The user may not open `/dev/net/tun`.
    #[error("no permission to open /dev/net/tun: `chmod a+rw /dev/net/tun`")]
    TunDenied,
    /// `/dev/net/tun` cannot be opened for another reason.
    #[error("cannot open /dev/net/tun")]
    Tun(#[source] io::Error),
    /// The name is invalid.
    #[error(
        "{0:?} is no name of a network device: it has 1 to 15 bytes and no '/', ':' or white space"
    )]
    BadName(String),
    /// The name is a template, for which the kernel would choose a name.
    #[error("{0:?} is a template and no name: give the name of one tap device, without '%'")]
    Template(String),
    /// Another kind of network device has the name.
    #[error("{0} is a network device and no tap: name a tap, or one that is to be made")]
    NotATap(String),
    /// The tap does not exist, and the user may not create it.
    #[error(
        "there is no tap {name} and no permission to make it: `ip tuntap add {name} mode tap user $USER{flags}`"
    )]
    Missing {
        /// Its name.
        name: String,
        /// Additional arguments of `ip tuntap`.
        flags: &'static str,
    },
    /// The tap belongs to another user.
    #[error("no permission to use tap {0}: `ip tuntap add` it with `user $USER`")]
    Denied(String),
    /// Another process uses the tap.
    #[error("tap {0} is in use by another process")]
    Busy(String),
    /// The tap has only one queue.
    #[error(
        "tap {name} has one queue, and {wanted} are requested: make it with `ip tuntap add {name} mode tap multi_queue`"
    )]
    OneQueue {
        /// Its name.
        name: String,
        /// Requested number of queue pairs.
        wanted: usize,
    },
    /// Another operation failed.
    #[error("{what} tap {name} failed")]
    Other {
        /// Its name.
        name: String,
        /// The operation that failed.
        what: &'static str,
        /// Error of the system call.
        source: io::Error,
    },
}

/// Link of a tap, for the status of the guest's device (virtio 1.2 §5.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Link {
    /// The interface is up and has a carrier.
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
    /// Whether the kernel distributes packets to it (`IFF_ATTACH_QUEUE`).
    attached: bool,
}

/// A tap with a file for each queue pair. An existing tap outlives this; a new
/// one is removed with it.
///
/// The interface may be deleted at any time. Changes of offloads and queues are
/// then applied at [`reattach`](Self::reattach).
#[derive(Debug)]
pub struct Tap {
    name: String,
    links: Links,
    queues: Vec<Queue>,
    multi_queue: bool,
    supported: Offloads,
    offloads: Offloads,
    /// Header size of the interface before `open`, in bytes; restored on drop.
    header: c_int,
}

impl Tap {
    /// Opens the tap of this name with `pairs` queues. Creates it with `mtu` if
    /// it does not exist. All queues but the first are detached.
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
            supported: Offloads::empty(),
            offloads: Offloads::empty(),
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

    /// Name of the interface when it was opened.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The netlink socket; readable when an interface of the host changed.
    #[must_use]
    pub fn links(&self) -> &Links {
        &self.links
    }

    /// The present link. An interface in another network namespace cannot be
    /// examined and counts as up.
    #[must_use]
    pub fn link(&self) -> Link {
        let Ok(name) = self.current_name() else {
            return Link::Gone;
        };
        match self.links.flags(&name) {
            Ok(flags) if flags.up && flags.running => Link::Up,
            // The kernel sets an interface down while deleting it; the file
            // reports the deletion when it is complete.
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

    /// Connects to a new tap of the name after a deletion, with the offloads
    /// and queues that were set last. Returns whether such a tap exists.
    ///
    /// A tap that is down, and busy or denied, counts as absent: the process
    /// that creates it still has it open, or has not set its owner yet.
    ///
    /// # Errors
    /// [`TapError`]; the tap stays disconnected.
    pub fn reattach(&mut self) -> Result<bool, TapError> {
        let exists = self.links.exists(&self.name);
        if !exists.map_err(self.failed("looking for the link"))? {
            return Ok(false);
        }
        match self.attach_all(true) {
            Err(TapError::Busy(_) | TapError::Denied(_)) if !self.is_up() => return Ok(false),
            attached => attached?,
        }
        self.configure()?;
        Ok(true)
    }

    fn is_up(&self) -> bool {
        self.links.flags(&self.name).is_ok_and(|flags| flags.up)
    }

    /// Attaches every file to the interface, the first one last: until it is
    /// attached [`is_gone`](Self::is_gone) is true.
    fn attach_all(&mut self, exists: bool) -> Result<(), TapError> {
        let pairs = self.queues.len();
        // The flag for several queues must match that of an existing interface.
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
                // An earlier attempt attached this file.
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                done => done.map_err(|error| refusal(&self.name, exists, pairs, error))?,
            }
        }
        Ok(())
    }

    /// Offloads that the kernel supports for this tap.
    #[must_use]
    pub fn supported(&self) -> Offloads {
        self.supported
    }

    /// The file of a queue pair.
    #[must_use]
    pub fn queue(&self, pair: usize) -> Option<BorrowedFd<'_>> {
        self.queues.get(pair).map(|queue| queue.file.as_fd())
    }

    /// Sets the offloads that the guest accepts.
    ///
    /// # Errors
    /// Error of the ioctl.
    pub fn set_offloads(&mut self, offloads: Offloads) -> io::Result<()> {
        self.offloads = offloads;
        self.unless_gone(self.apply_offloads(offloads))
    }

    fn apply_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let queue = self.queues.first().ok_or(io::ErrorKind::NotFound)?;
        let (fd, offloads) = (queue.file.as_raw_fd(), c_ulong::from(offloads.bits()));
        // SAFETY: the argument of this ioctl is a number and no pointer.
        check(unsafe { libc::ioctl(fd, TUNSETOFFLOAD, offloads) })
    }

    /// Attaches a queue pair for the distribution of packets, or detaches it.
    /// The queue of a tap with only one is always attached.
    ///
    /// # Errors
    /// Error of the ioctl.
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

    /// Ignores an error if the interface was deleted: `reattach` applies the
    /// change.
    fn unless_gone(&self, result: io::Result<()>) -> io::Result<()> {
        result.or_else(|error| if self.is_gone() { Ok(()) } else { Err(error) })
    }

    /// The present name of the interface.
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

    /// Finds the offloads that the kernel supports, by setting them.
    fn find_supported(&mut self) {
        let tcp = Offloads::CSUM | Offloads::TSO4 | Offloads::TSO6 | Offloads::ECN;
        let uso = tcp | Offloads::USO4 | Offloads::USO6;
        // Support for UDP depends on the kernel's version.
        let known = [uso | Offloads::UFO, uso, tcp | Offloads::UFO, tcp];
        let known = known.into_iter().find(|o| self.apply_offloads(*o).is_ok());
        self.supported = known.unwrap_or_default();
    }

    /// Sets header size and offloads of a newly attached interface.
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
        let _ = self.apply_offloads(Offloads::empty());
        if let Some(queue) = self.queues.first() {
            let header = &raw const self.header;
            // SAFETY: the kernel reads the int that the pointer is to.
            let _ = unsafe { libc::ioctl(queue.file.as_raw_fd(), TUNSETVNETHDRSZ, header) };
        }
    }
}

/// Checks that a name is valid for an interface (`dev_valid_name`) and is no
/// template.
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
    fn invalid_names_are_refused_before_anything_is_opened() {
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
