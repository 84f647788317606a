//! A tap device of the host: the other end of a network device's cable.
#![allow(unsafe_code)] // The ioctls below; each says why it is sound.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd as _, AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use libc::{
    IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_UP, IFF_VNET_HDR,
    TUN_F_CSUM, TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_UFO, TUN_F_USO4, TUN_F_USO6,
    TUNGETVNETHDRSZ, TUNSETIFF, TUNSETOFFLOAD, TUNSETQUEUE, TUNSETVNETHDRSZ, c_int, c_uint,
    c_ulong, ifreq,
};

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
    #[error("{0:?} is no name of a network device: it has 1 to 15 bytes")]
    BadName(String),
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

/// A tap with a file for each queue pair. It existed before and stays, or it
/// is made and goes with this.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<File>,
    multi_queue: bool,
    supported: Offloads,
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
        let old = Existing::find(name)?;
        let multi_queue = match old {
            Existing::Tap { multi_queue } => multi_queue,
            Existing::None => pairs > 1,
        };
        if pairs > 1 && !multi_queue {
            return Err(TapError::OneQueue {
                name: name.to_owned(),
                wanted: pairs,
            });
        }
        let mut queues = Vec::new();
        for _ in 0..pairs.max(1) {
            let queue = open_tun()?;
            attach(&queue, name, multi_queue).map_err(|error| refusal(name, &old, pairs, error))?;
            queues.push(queue);
        }
        let mut tap = Self {
            name: name.to_owned(),
            queues,
            multi_queue,
            supported: Offloads::NONE,
            header: HEADER_SIZE,
        };
        tap.set_up()?;
        if old == Existing::None {
            tap.bring_up(mtu)
                .map_err(tap.failed("setting up the link of"))?;
        }
        Ok(tap)
    }

    /// What the host can leave unfinished for the guest.
    #[must_use]
    pub fn supported(&self) -> Offloads {
        self.supported
    }

    /// The file of a queue pair.
    #[must_use]
    pub fn queue(&self, pair: usize) -> Option<BorrowedFd<'_>> {
        self.queues.get(pair).map(|queue| queue.as_fd())
    }

    /// Says what the guest takes unfinished.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let queue = self.queues.first().ok_or(io::ErrorKind::NotFound)?;
        // SAFETY: the argument of this ioctl is a number and no pointer.
        let result =
            unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETOFFLOAD, c_ulong::from(offloads.0)) };
        check(result)
    }

    /// Takes a queue pair into the distribution of packets, or out of it. A
    /// tap of one queue has it in always.
    ///
    /// # Errors
    /// Of the ioctl.
    pub fn set_attached(&self, pair: usize, attached: bool) -> io::Result<()> {
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
        check(unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETQUEUE, &raw const request) })
    }

    fn set_up(&mut self) -> Result<(), TapError> {
        let first = self.queues.first().map(AsRawFd::as_raw_fd);
        let fd = first.ok_or(TapError::NoTun)?;
        let mut header: c_int = 0;
        // SAFETY: the kernel writes the int that the pointer is to.
        let got = check(unsafe { libc::ioctl(fd, TUNGETVNETHDRSZ, &raw mut header) });
        got.map_err(self.failed("reading the header size of"))?;
        self.header = header;
        let header = HEADER_SIZE;
        // SAFETY: the kernel reads the int that the pointer is to.
        let set = check(unsafe { libc::ioctl(fd, TUNSETVNETHDRSZ, &raw const header) });
        set.map_err(self.failed("setting the header size of"))?;
        let tcp = Offloads::CSUM
            .with(Offloads::TSO4)
            .with(Offloads::TSO6)
            .with(Offloads::ECN);
        let uso = tcp.with(Offloads::USO4).with(Offloads::USO6);
        // Kernels differ in what they know of UDP.
        let known = [uso.with(Offloads::UFO), uso, tcp.with(Offloads::UFO), tcp];
        let known = known.into_iter().find(|o| self.set_offloads(*o).is_ok());
        self.supported = known.unwrap_or_default();
        self.set_offloads(Offloads::NONE)
            .map_err(self.failed("setting the offloads of"))?;
        for pair in 1..self.queues.len() {
            self.set_attached(pair, false)
                .map_err(self.failed("detaching a queue of"))?;
        }
        Ok(())
    }

    /// Sets the link of a tap that we made up.
    fn bring_up(&self, mtu: Option<u16>) -> io::Result<()> {
        // SAFETY: a plain system call; the result is checked below.
        let socket =
            unsafe { libc::socket(libc::AF_INET, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
        check(socket)?;
        // SAFETY: it has just been opened and belongs to nobody else.
        let socket = unsafe { OwnedFd::from_raw_fd(socket) };
        let mut link = request(&self.name)?;
        if let Some(mtu) = mtu {
            link.ifr_ifru.ifru_mtu = c_int::from(mtu);
            // SAFETY: the kernel reads the structure that the pointer is to.
            let set = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFMTU, &raw const link) };
            check(set)?;
        }
        // SAFETY: the kernel reads the name and writes the flags of it.
        let got = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCGIFFLAGS, &raw mut link) };
        check(got)?;
        // SAFETY: the kernel has just written this member of the union.
        let flags = unsafe { link.ifr_ifru.ifru_flags };
        link.ifr_ifru.ifru_flags = flags | short(IFF_UP);
        // SAFETY: the kernel reads the structure that the pointer is to.
        check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const link) })
    }

    fn failed(&self, what: &'static str) -> impl Fn(io::Error) -> TapError + use<> {
        let name = self.name.clone();
        move |source| TapError::Other {
            name: name.clone(),
            what,
            source,
        }
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = self.set_offloads(Offloads::NONE);
        if let Some(queue) = self.queues.first() {
            let header = &raw const self.header;
            // SAFETY: the kernel reads the int that the pointer is to.
            let _ = unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETVNETHDRSZ, header) };
        }
    }
}

/// What has the name already.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Existing {
    None,
    Tap { multi_queue: bool },
}

impl Existing {
    fn find(name: &str) -> Result<Self, TapError> {
        let bad = name.is_empty()
            || name.len() >= libc::IFNAMSIZ
            || name.contains(['/', '\0'])
            || matches!(name, "." | "..");
        if bad {
            return Err(TapError::BadName(name.to_owned()));
        }
        let link = Path::new("/sys/class/net").join(name);
        if !link.exists() {
            return Ok(Self::None);
        }
        let flags = std::fs::read_to_string(link.join("tun_flags")).ok();
        let flags = flags
            .and_then(|text| c_int::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok());
        match flags {
            Some(flags) if flags & IFF_TAP != 0 => Ok(Self::Tap {
                multi_queue: flags & IFF_MULTI_QUEUE != 0,
            }),
            _ => Err(TapError::NotATap(name.to_owned())),
        }
    }
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

fn refusal(name: &str, old: &Existing, pairs: usize, source: io::Error) -> TapError {
    let name = name.to_owned();
    match (source.raw_os_error(), old) {
        (Some(libc::EPERM | libc::EACCES), Existing::None) => TapError::Missing {
            name,
            flags: if pairs > 1 { " multi_queue" } else { "" },
        },
        (Some(libc::EPERM | libc::EACCES), Existing::Tap { .. }) => TapError::Denied(name),
        (Some(libc::EBUSY | libc::E2BIG), _) => TapError::Busy(name),
        _ => TapError::Other {
            name,
            what: "attaching a queue of",
            source,
        },
    }
}

/// An interface request with a name and nothing else.
fn request(name: &str) -> io::Result<ifreq> {
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

/// Flags of a request are 16 bits, whatever type the constants have.
fn short(flags: c_int) -> libc::c_short {
    let [low, high, ..] = flags.to_le_bytes();
    libc::c_short::from_le_bytes([low, high])
}

fn check(result: c_int) -> io::Result<()> {
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_none_are_refused_before_anything_is_opened() {
        for name in ["", "a/b", "..", "sixteen-bytes-xx"] {
            assert!(matches!(
                Tap::open(name, 1, None),
                Err(TapError::BadName(_))
            ));
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
        let old = Existing::Tap { multi_queue: true };
        let text = |old: &Existing, number| refusal("tap7", old, 4, error(number)).to_string();
        let missing = text(&Existing::None, libc::EPERM);
        assert!(missing.contains("ip tuntap add tap7 mode tap user $USER multi_queue"));
        assert!(text(&old, libc::EPERM).contains("no permission to use tap tap7"));
        assert!(text(&old, libc::EBUSY).contains("tap7 is in use"));
        for text in [missing, text(&old, libc::EPERM), text(&old, libc::EIO)] {
            assert!(!text.contains('\n'));
        }
    }

    #[test]
    fn flags_keep_their_bits_in_16() {
        assert_eq!(short(IFF_VNET_HDR | IFF_TAP).cast_unsigned(), 0x4002);
    }
}
