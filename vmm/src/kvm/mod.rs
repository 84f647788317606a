//! The kernel's side of the machine: VM, vCPUs, guest RAM, interrupt routes.
//!
//! The only module that talks to `/dev/kvm`. [`Vm::new`] makes the VM with its
//! interrupt controller and all vCPUs; [`Vcpus`] runs them. Lock order: the
//! interrupt routes' lock is a leaf, nothing else is taken under it.
#![allow(unsafe_code)] // Takes over the file descriptor of /dev/kvm.

#[cfg(test)]
pub(crate) mod fake;
mod memory;
mod routes;
mod vcpu;
mod vcpus;
mod vm;

#[cfg(target_arch = "aarch64")]
#[path = "aarch64.rs"]
mod native;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod native;

use std::io;
use std::os::fd::FromRawFd;

use kvm_bindings::KVM_CAP_IOEVENTFD_ANY_LENGTH;
use kvm_ioctls::{Cap, Kvm};

pub use memory::{Backing, allocate};
pub use routes::Line;
pub use vcpu::{Exit, Vcpu};
pub use vcpus::{Buses, End, Vcpus};
pub use vm::Vm;

/// Why the machine cannot be made. Each is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no `/dev/kvm`.
    #[error(
        "/dev/kvm does not exist: enable virtualization in the firmware and load \
         the kvm_intel or kvm_amd module (x86), or use a kernel with KVM (Arm)"
    )]
    NoKvm,
    /// `/dev/kvm` may not be opened.
    #[error("no permission to open /dev/kvm: add the user to the kvm group")]
    NoPermission,
    /// `/dev/kvm` failed to open in another way.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// Not the stable KVM API.
    #[error("/dev/kvm has API version {0}, 12 is needed")]
    ApiVersion(i32),
    /// The kernel's KVM is too old or built without something.
    #[error("the host's KVM lacks {0}")]
    MissingCapability(&'static str),
    /// More vCPUs than the host or the layout allows.
    #[error("{asked} vCPUs: this host supports at most {max}")]
    TooManyCpus {
        /// vCPUs asked for.
        asked: u32,
        /// Most vCPUs.
        max: u32,
    },
    /// Guest physical addresses do not reach far enough.
    #[error("the host supports {have}-bit guest physical addresses, {need} bits are needed")]
    AddressBits {
        /// Bits the host supports.
        have: u32,
        /// Bits the memory layout uses.
        need: u32,
    },
    /// Guest memory could not be had.
    #[error("cannot allocate {mib} MiB of guest memory")]
    Memory {
        /// Size asked for.
        mib: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// Not enough 2 MiB pages.
    #[error(
        "cannot allocate {mib} MiB of guest memory in 2 MiB pages; \
         add pages to the host's pool (sysctl vm.nr_hugepages)"
    )]
    HugePages {
        /// Size asked for.
        mib: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// A thread could not be started.
    #[error("cannot start the thread of vCPU {index}")]
    Thread {
        /// Which vCPU.
        index: u32,
        /// The system's answer.
        source: io::Error,
    },
    /// An ioctl failed.
    #[error("{what} failed")]
    Ioctl {
        /// What was tried.
        what: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
}

/// Names the ioctl that failed.
fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Ioctl {
        what,
        source: source.into(),
    }
}

/// Opens `/dev/kvm` and checks that it can do what is needed.
fn open() -> Result<Kvm, Error> {
    let fd = Kvm::open_with_cloexec(true).map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::NoKvm,
        libc::EACCES | libc::EPERM => Error::NoPermission,
        _ => Error::Open(error.into()),
    })?;
    // SAFETY: `fd` was just opened, is owned by nobody else and refers to
    // /dev/kvm.
    let kvm = unsafe { Kvm::from_raw_fd(fd) };
    match kvm.get_api_version() {
        12 => {}
        other => return Err(Error::ApiVersion(other)),
    }
    let common = [
        (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
        (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
        (Cap::Irqfd, "KVM_CAP_IRQFD"),
        (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
        (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    ];
    // kvm-ioctls has no name for it; without it a doorbell matches one width.
    if kvm.check_extension_raw(KVM_CAP_IOEVENTFD_ANY_LENGTH.into()) <= 0 {
        return Err(Error::MissingCapability("KVM_CAP_IOEVENTFD_ANY_LENGTH"));
    }
    for (cap, name) in common.iter().chain(native::CAPABILITIES) {
        if !kvm.check_extension(*cap) {
            return Err(Error::MissingCapability(name));
        }
    }
    Ok(kvm)
}
