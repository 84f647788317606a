//! Why KVM cannot make the machine.

use std::io;

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
pub(super) fn failed<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> Error {
    move |source| Error::Ioctl {
        what,
        source: source.into(),
    }
}
