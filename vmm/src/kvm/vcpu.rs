//! One vCPU: its start state and its exits.
#![allow(unsafe_code)] // Reads the exit union of the shared kvm_run page.

use std::sync::Arc;

use arch::boot::Entry;
use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use super::error::{Error, failed};
use super::native;

/// Exit of a vCPU (`KVM_RUN`).
#[derive(Debug)]
pub(crate) enum Exit<'a> {
    /// Fill `data`, in units of `size` bytes, with the value of `port`.
    PioRead {
        /// I/O port, the same for every unit.
        port: u16,
        /// Width of one access: 1, 2 or 4 bytes.
        size: usize,
        /// One or more accesses, `size` bytes each.
        data: &'a mut [u8],
    },
    /// Write `data`, in units of `size` bytes, to `port`.
    PioWrite {
        /// I/O port, the same for every unit.
        port: u16,
        /// Width of one access: 1, 2 or 4 bytes.
        size: usize,
        /// One or more accesses, `size` bytes each.
        data: &'a [u8],
    },
    /// Fill `data` with the value at `address`.
    MmioRead {
        /// Guest physical address.
        address: u64,
        /// 1 to 8 bytes.
        data: &'a mut [u8],
    },
    /// Write `data` to `address`.
    MmioWrite {
        /// Guest physical address.
        address: u64,
        /// 1 to 8 bytes.
        data: &'a [u8],
    },
    /// The guest asked the firmware to power off.
    PowerOff,
    /// The guest asked the firmware to reset.
    Reset,
    /// The guest cannot continue, for this reason.
    Crash(String),
    /// The vCPU was kicked, or the exit needs no action.
    Interrupted,
}

/// A vCPU. One thread runs it.
#[derive(Debug)]
pub(crate) struct Vcpu {
    fd: VcpuFd,
    host: Arc<native::Host>,
    index: u32,
    cpus: u32,
}

impl Vcpu {
    pub(super) fn new(
        vm: &VmFd,
        host: &Arc<native::Host>,
        index: u32,
        cpus: u32,
    ) -> Result<Self, Error> {
        let fd = vm
            .create_vcpu(u64::from(index))
            .map_err(failed("KVM_CREATE_VCPU"))?;
        native::init_vcpu(&fd, host, index)?;
        Ok(Self {
            fd,
            host: Arc::clone(host),
            index,
            cpus,
        })
    }

    /// Number of the vCPU, from 0.
    pub(crate) fn index(&self) -> u32 {
        self.index
    }

    /// Sets the start state of the vCPU. Call it once, before the first run,
    /// for every vCPU.
    ///
    /// # Errors
    /// The kernel refuses a register because it is too old.
    pub(crate) fn set_up(&self, entry: Entry) -> Result<(), Error> {
        native::set_up(&self.fd, &self.host, self.index, self.cpus, entry)
    }

    /// The caches for the guest's device tree; empty where CPUID describes them.
    pub(crate) fn caches(&self) -> Vec<arch::Cache> {
        native::caches(&self.fd)
    }

    /// The page shared with the kernel. Its address does not change until the
    /// vCPU is dropped.
    pub(super) fn run_page(&mut self) -> *mut kvm_run {
        self.fd.get_kvm_run()
    }

    /// Clears a kick, so that the next [`Self::run`] enters the guest.
    pub(super) fn clear_kick(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Reports to the guest that it did not run, so that its watchdogs start
    /// afresh. Called after a pause, before the next [`Self::run`].
    pub(super) fn report_pause(&self) {
        native::report_pause(&self.fd);
    }

    /// The registers as text for a crash report. If the last run ended with an
    /// internal error, KVM's details of it come first.
    pub(crate) fn registers(&mut self) -> String {
        let error = internal_error(self.run_page());
        error.map_or_else(String::new, details) + &native::registers(&self.fd)
    }

    /// Runs the guest until an exit.
    pub(crate) fn run(&mut self) -> Exit<'_> {
        let page = self.run_page();
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                let size = pio_size(page, data.len());
                Exit::PioRead { port, size, data }
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                let size = pio_size(page, data.len());
                Exit::PioWrite { port, size, data }
            }
            Ok(VcpuExit::MmioRead(address, data)) => Exit::MmioRead { address, data },
            Ok(VcpuExit::MmioWrite(address, data)) => Exit::MmioWrite { address, data },
            Ok(VcpuExit::SystemEvent(event, _)) => match event {
                KVM_SYSTEM_EVENT_SHUTDOWN => Exit::PowerOff,
                KVM_SYSTEM_EVENT_RESET => Exit::Reset,
                KVM_SYSTEM_EVENT_CRASH => Exit::Crash("the guest reported a crash".into()),
                other => Exit::Crash(format!("KVM reports an unknown system event, {other}")),
            },
            Ok(VcpuExit::Shutdown) => Exit::Crash("the guest had a triple fault".into()),
            Ok(VcpuExit::InternalError) => {
                let suberror = internal_error(page).map_or(0, |(suberror, _)| suberror);
                Exit::Crash(sentence(suberror).into())
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => Exit::Crash(format!(
                "the host's processor refused to run the guest: {reason:#x} on host CPU {cpu}"
            )),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Exit::Interrupted,
            Ok(other) => Exit::Crash(format!(
                "KVM left the guest for an unknown reason, {other:?}"
            )),
            Err(error) => match error.errno() {
                // EAGAIN: a vCPU that waits for its start-up IPI was woken.
                libc::EINTR | libc::EAGAIN => Exit::Interrupted,
                libc::ENOSYS => Exit::Crash(
                    "the guest accessed an address outside RAM by an instruction that KVM cannot \
                     decode"
                        .into(),
                ),
                _ => Exit::Crash(format!("KVM cannot run the guest: {error}")),
            },
        }
    }
}

/// Width in bytes of one access of the PIO exit in `page`.
fn pio_size(page: *const kvm_run, len: usize) -> usize {
    // SAFETY: the page is mapped while the vCPU lives, the caller holds the
    // vCPU, and KVM_RUN returned KVM_EXIT_IO, which fills this variant. The
    // kernel does not write it outside KVM_RUN.
    let size = unsafe { (*page).__bindgen_anon_1.io.size };
    usize::from(size).clamp(1, len.max(1))
}

/// `suberror` and data of the internal error in `page`, if there is one.
fn internal_error(page: *const kvm_run) -> Option<(u32, Vec<u64>)> {
    // SAFETY: as in `pio_size`; the reason is checked before its variant is
    // read.
    let internal = unsafe {
        if (*page).exit_reason != KVM_EXIT_INTERNAL_ERROR {
            return None;
        }
        (*page).__bindgen_anon_1.internal
    };
    let data = internal.data.iter().copied();
    let count = usize::try_from(internal.ndata).unwrap_or(usize::MAX);
    Some((internal.suberror, data.take(count).collect()))
}

/// Describes an internal error in a sentence (Linux `include/uapi/linux/kvm.h`,
/// `KVM_INTERNAL_ERROR_*`).
fn sentence(suberror: u32) -> &'static str {
    match suberror {
        1 => "KVM cannot emulate an instruction of the guest",
        2 => "the guest caused an exception while KVM delivered another one to it",
        3 => "the guest left the processor unexpectedly while KVM delivered an event to it",
        4 => "the guest left the processor for a reason that KVM does not know",
        _ => "KVM reports an internal error",
    }
}

/// Formats KVM's details of an internal error, as a line for a crash report.
fn details((suberror, data): (u32, Vec<u64>)) -> String {
    format!("KVM_EXIT_INTERNAL_ERROR suberror {suberror} data {data:x?}\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(reason: u32, suberror: u32, ndata: u32) -> kvm_run {
        let mut page = kvm_run {
            exit_reason: reason,
            ..kvm_run::default()
        };
        page.__bindgen_anon_1.internal.suberror = suberror;
        page.__bindgen_anon_1.internal.ndata = ndata;
        page.__bindgen_anon_1.internal.data = [0xAB; 16];
        page
    }

    #[test]
    fn internal_error_is_a_sentence_and_its_numbers_are_with_the_registers() {
        for suberror in 0..6 {
            let text = sentence(suberror);
            assert!(
                !text.contains(|c: char| c.is_ascii_digit() || c == '['),
                "{text}"
            );
        }
        let error = internal_error(&page(KVM_EXIT_INTERNAL_ERROR, 1, 2)).unwrap();
        let line = "KVM_EXIT_INTERNAL_ERROR suberror 1 data [ab, ab]\n";
        assert_eq!(details(error), line);
    }

    #[test]
    fn internal_error_with_more_data_than_the_field_holds_is_cut() {
        let (_, data) = internal_error(&page(KVM_EXIT_INTERNAL_ERROR, 4, u32::MAX)).unwrap();
        assert_eq!(data, [0xAB; 16]);
        assert_eq!(internal_error(&page(0, 1, 2)), None);
    }
}
