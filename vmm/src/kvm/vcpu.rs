//! One vCPU: its start state, running it until something happens.
#![allow(unsafe_code)] // Reads the exit union of the shared kvm_run page.

use std::sync::Arc;

use arch::boot::Entry;
use kvm_bindings::{
    KVM_EXIT_INTERNAL_ERROR, KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET,
    KVM_SYSTEM_EVENT_SHUTDOWN, kvm_run,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use super::native;
use super::{Error, failed};

/// Why a vCPU stopped running the guest.
#[derive(Debug)]
pub enum Exit<'a> {
    /// Fill `data`, in units of `size` bytes, with what `port` reads as.
    PioRead {
        /// I/O port, the same for every unit.
        port: u16,
        /// Width of one access: 1, 2 or 4 bytes.
        size: usize,
        /// One or more accesses.
        data: &'a mut [u8],
    },
    /// Write `data`, in units of `size` bytes, to `port`.
    PioWrite {
        /// I/O port, the same for every unit.
        port: u16,
        /// Width of one access: 1, 2 or 4 bytes.
        size: usize,
        /// One or more accesses.
        data: &'a [u8],
    },
    /// Fill `data` with what `address` reads as.
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
    /// The guest cannot go on; why.
    Crash(String),
    /// Kicked, or there was nothing to do.
    Interrupted,
}

/// A vCPU, to be run by one thread.
#[derive(Debug)]
pub struct Vcpu {
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

    /// Which vCPU, from 0.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Brings the vCPU into the state it starts in. Call it once, before the
    /// first run, for every vCPU.
    ///
    /// # Errors
    /// The kernel refuses a register, which means that it is too old.
    pub fn set_up(&self, entry: Entry) -> Result<(), Error> {
        native::set_up(&self.fd, &self.host, self.index, self.cpus, entry)
    }

    /// The caches that the guest is told of; empty where the processor tells it.
    pub fn caches(&self) -> Vec<arch::Cache> {
        native::caches(&self.fd)
    }

    /// The page shared with the kernel. It stays where it is until the vCPU is
    /// dropped.
    pub(super) fn run_page(&mut self) -> *mut kvm_run {
        self.fd.get_kvm_run()
    }

    /// Makes the next [`Self::run`] wait for the guest again, after a kick.
    pub(super) fn clear_kick(&mut self) {
        self.fd.set_kvm_immediate_exit(0);
    }

    /// Tells the guest that it did not run for a while, so that its watchdogs
    /// start afresh. Called after a pause, ahead of the next [`Self::run`].
    pub(super) fn report_pause(&self) {
        native::report_pause(&self.fd);
    }

    /// The registers as a block of text for a crash report.
    pub fn registers(&self) -> String {
        native::registers(&self.fd)
    }

    /// Runs the guest until it needs something.
    pub fn run(&mut self) -> Exit<'_> {
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
                other => Exit::Crash(format!("KVM system event {other}")),
            },
            Ok(VcpuExit::Shutdown) => Exit::Crash("triple fault".into()),
            Ok(VcpuExit::InternalError) => Exit::Crash(internal_error(page)),
            Ok(VcpuExit::FailEntry(reason, cpu)) => Exit::Crash(format!(
                "hardware refused the entry: {reason:#x} on host CPU {cpu}"
            )),
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => Exit::Interrupted,
            Ok(other) => Exit::Crash(format!("KVM exit {other:?}")),
            Err(error) => match error.errno() {
                // EAGAIN: a vCPU that waits for its start-up IPI was woken.
                libc::EINTR | libc::EAGAIN => Exit::Interrupted,
                libc::ENOSYS => Exit::Crash(
                    "an access outside RAM by an instruction that KVM cannot decode".into(),
                ),
                _ => Exit::Crash(format!("KVM_RUN: {error}")),
            },
        }
    }
}

/// The width of one access of the PIO exit that is in `page`.
fn pio_size(page: *const kvm_run, len: usize) -> usize {
    // SAFETY: the page is mapped while the vCPU lives, the caller holds the
    // vCPU, and KVM_RUN returned KVM_EXIT_IO, which fills this variant. The
    // kernel does not write it outside KVM_RUN.
    let size = unsafe { (*page).__bindgen_anon_1.io.size };
    usize::from(size).clamp(1, len.max(1))
}

fn internal_error(page: *const kvm_run) -> String {
    // SAFETY: as in `pio_size`; the reason is checked before its variant is
    // read.
    let internal = unsafe {
        if (*page).exit_reason != KVM_EXIT_INTERNAL_ERROR {
            return "KVM internal error".into();
        }
        (*page).__bindgen_anon_1.internal
    };
    let what = match internal.suberror {
        1 => "instruction emulation failed",
        2 => "exception while delivering an event",
        3 => "unexpected event while delivering another",
        4 => "unexpected exit reason",
        _ => "unknown",
    };
    let count = usize::try_from(internal.ndata)
        .unwrap_or(0)
        .min(internal.data.len());
    let data = &internal.data[..count];
    format!(
        "KVM internal error, suberror {} ({what}), data {data:x?}",
        internal.suberror
    )
}
