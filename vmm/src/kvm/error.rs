//! Errors of KVM and of guest memory.

use std::io;

/// Error of creating a VM. Each is one line for the user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no `/dev/kvm`.
    #[error(
        "/dev/kvm does not exist: enable virtualization in the firmware and load \
         the kvm_intel or kvm_amd module (x86), or use a kernel with KVM (Arm)"
    )]
    NoKvm,
    /// This user may not open `/dev/kvm`.
    #[error("no permission to open /dev/kvm: add the user to the kvm group")]
    NoPermission,
    /// `/dev/kvm` fails to open for another reason.
    #[error("cannot open /dev/kvm")]
    Open(#[source] io::Error),
    /// The host's KVM does not have the stable API.
    #[error("/dev/kvm has API version {0}, 12 is needed")]
    ApiVersion(i32),
    /// The kernel's KVM lacks a capability: it is too old or built without it.
    #[error("the host's KVM lacks {0}")]
    MissingCapability(&'static str),
    /// More vCPUs than the host or the layout allows.
    #[error("{asked} vCPUs: this host supports at most {max}")]
    TooManyCpus {
        /// Requested number of vCPUs.
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
    /// Guest memory is not available.
    #[error("cannot allocate {mib} MiB of guest memory")]
    Memory {
        /// Size in MiB.
        mib: u64,
        /// Error of the host.
        source: io::Error,
    },
    /// The host has not enough free pages of 2 MiB.
    #[error(
        "cannot allocate {mib} MiB of guest memory in 2 MiB pages; \
         add pages to the host's pool (sysctl vm.nr_hugepages)"
    )]
    HugePages {
        /// Size in MiB.
        mib: u64,
        /// Error of the host.
        source: io::Error,
    },
    /// A vCPU thread cannot be started.
    #[error("cannot start the thread of vCPU {index}")]
    Thread {
        /// Number of the vCPU, from 0.
        index: u32,
        /// Error of the host.
        source: io::Error,
    },
    /// An ioctl failed.
    #[error("{what} failed")]
    Ioctl {
        /// Name of the ioctl.
        what: &'static str,
        /// Error of the host.
        source: io::Error,
    },
}

/// Adds the name of the ioctl that failed.
pub(super) fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Ioctl {
        what,
        source: source.into(),
    }
}
