//! The VM: memory slots, interrupt controller, vCPUs, doorbells.
#![allow(unsafe_code)] // Hands guest RAM to the kernel.

use std::io;
use std::sync::{Arc, OnceLock};

use arch::layout;
use devices::interrupt::Doorbells;
use iommu::lock::RankedMutex;
use iommu::{Gpa, GuestRam};
use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, NoDatamatch, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use super::error::{Error, failed};
use super::native;
use super::open::open;
use super::routes::{self, Routes};
use super::vcpu::Vcpu;

/// Bytes of a page of [`Vm::read_only`].
pub(super) const PAGE: usize = 4096;
/// KVM's number of the memory slot of the first such page. RAM has the numbers
/// from 0 on, one for each region.
const READ_ONLY_SLOT: u32 = 32;

/// A virtual machine. It ends when the last reference and all [`Vcpu`]s are
/// dropped.
#[derive(Debug)]
pub(crate) struct Vm {
    fd: VmFd,
    routes: RankedMutex<Routes, 12>,
    _controller: native::Controller,
    /// The kernel uses these mappings' addresses as long as `fd` lives.
    _ram: GuestRam,
    /// Memory that the guest can only read; kept for the same reason.
    read_only: OnceLock<MmapRegion>,
}

impl Vm {
    /// Creates a VM with `ram`, its interrupt controller and `cpus` vCPUs,
    /// which still need [`Vcpu::set_up`].
    ///
    /// # Errors
    /// KVM is missing, not permitted, too old, or refuses the machine.
    pub(crate) fn new(ram: &GuestRam, cpus: u32) -> Result<(Arc<Self>, Vec<Vcpu>), Error> {
        let kvm = open()?;
        check_cpus(&kvm, cpus)?;
        let fd = native::create_vm(&kvm)?;
        add_memory(&fd, ram)?;
        let host = Arc::new(native::Host::of(&kvm, &fd)?);
        let (controller, vcpus) = native::create_controller(&fd, || {
            (0..cpus)
                .map(|index| Vcpu::new(&fd, &host, index, cpus))
                .collect()
        })?;
        let vm = Self {
            fd,
            routes: RankedMutex::default(),
            _controller: controller,
            _ram: ram.clone(),
            read_only: OnceLock::new(),
        };
        routes::install(&vm.fd, &Routes::default()).map_err(failed("KVM_SET_GSI_ROUTING"))?;
        Ok((Arc::new(vm), vcpus))
    }

    /// Descriptor of the VM, for its ioctls.
    pub(super) fn fd(&self) -> &VmFd {
        &self.fd
    }

    /// Allocates `pages` pages that the guest can only read, once. `false` where
    /// the guest's reads would not be coherent.
    ///
    /// # Errors
    /// The host has no such memory.
    pub(super) fn allocate_read_only(&self, pages: usize) -> Result<bool, Error> {
        if !native::COHERENT_READS || !self.fd.check_extension(Cap::ReadonlyMem) {
            return Ok(false);
        }
        let memory = MmapRegion::new(pages * PAGE);
        let memory = memory
            .map_err(io::Error::other)
            .map_err(failed("mapping the configuration space"))?;
        Ok(self.read_only.set(memory).is_ok())
    }

    /// The memory of [`Self::allocate_read_only`].
    pub(super) fn read_only(&self) -> Option<&MmapRegion> {
        self.read_only.get()
    }

    /// Shows a page of that memory at a guest-physical address, or removes it.
    ///
    /// # Errors
    /// There is no such page, or KVM refuses the slot.
    pub(super) fn set_read_only(&self, page: usize, at: Option<Gpa>) -> Result<(), Error> {
        let set = || {
            let memory = self
                .read_only()
                .filter(|memory| page < memory.size() / PAGE);
            let memory = memory.ok_or(io::ErrorKind::InvalidInput)?;
            let number = u32::try_from(page).map_err(io::Error::other)?;
            let slot = kvm_userspace_memory_region {
                slot: READ_ONLY_SLOT + number,
                flags: KVM_MEM_READONLY,
                guest_phys_addr: at.unwrap_or(Gpa(0)).0,
                memory_size: if at.is_some() { PAGE as u64 } else { 0 },
                userspace_addr: memory.as_ptr() as u64 + (page * PAGE) as u64,
            };
            // SAFETY: the page is inside the mapping, which `self` keeps for as
            // long as it keeps the VM. The guest cannot write to it.
            unsafe { self.fd.set_user_memory_region(slot) }.map_err(io::Error::from)
        };
        set().map_err(failed("KVM_SET_USER_MEMORY_REGION"))
    }

    pub(super) fn route_table(&self) -> &RankedMutex<Routes, 12> {
        &self.routes
    }
}

/// Doorbells are memory-mapped: the kernel signals the eventfd.
impl Doorbells for Vm {
    fn attach(&self, address: Gpa, kick: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address.0);
        Ok(self.fd.register_ioevent(kick, &address, NoDatamatch)?)
    }

    fn detach(&self, address: Gpa, kick: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address.0);
        Ok(self.fd.unregister_ioevent(kick, &address, NoDatamatch)?)
    }
}

fn check_cpus(kvm: &Kvm, asked: u32) -> Result<(), Error> {
    let max = u32::try_from(kvm.get_max_vcpus())
        .unwrap_or(u32::MAX)
        .min(layout::MAX_CPUS);
    if (1..=max).contains(&asked) {
        Ok(())
    } else {
        Err(Error::TooManyCpus { asked, max })
    }
}

/// Adds the RAM to the VM, and excludes it from core dumps.
fn add_memory(fd: &VmFd, ram: &GuestRam) -> Result<(), Error> {
    for (slot, region) in (0..).zip(ram.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the region is a mapping of `memory_size` bytes at
        // `userspace_addr`, regions of one memory do not overlap, and `Vm`
        // keeps the mapping for as long as it keeps the VM.
        unsafe { fd.set_user_memory_region(slot) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
        let length = usize::try_from(region.len()).unwrap_or(usize::MAX);
        // SAFETY: the range is the region's mapping; its contents do not change.
        // Its only error is an invalid range.
        let _ = unsafe { libc::madvise(region.as_ptr().cast(), length, libc::MADV_DONTDUMP) };
    }
    Ok(())
}
