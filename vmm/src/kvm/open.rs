//! Opens the host's KVM.

use kvm_bindings::KVM_CAP_IOEVENTFD_ANY_LENGTH;
use kvm_ioctls::{Cap, Kvm};

use super::error::Error;
use super::native;

/// Opens `/dev/kvm` and checks its API version and capabilities.
pub(super) fn open() -> Result<Kvm, Error> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::NoKvm,
        libc::EACCES | libc::EPERM => Error::NoPermission,
        _ => Error::Open(error.into()),
    })?;
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
    // kvm-ioctls has no name for it. Without it a doorbell matches one access
    // width only.
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
