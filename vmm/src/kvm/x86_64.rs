//! The x86_64 parts of a VM.

use arch::boot::Entry;
use arch::{cpu, layout};
use kvm_bindings::{
    CpuId, KVM_IRQCHIP_IOAPIC, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_segment,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};

use super::error::{Error, failed};

pub(super) const CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SetIdentityMapAddr, "KVM_CAP_SET_IDENTITY_MAP_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

/// Wired GSIs are pins of the I/O APIC.
pub(super) const IRQCHIP: u32 = KVM_IRQCHIP_IOAPIC;
/// Messages need no DeviceID.
pub(super) const MSI_FLAGS: u32 = 0;

/// A guest's uncached reads see what the host writes to its cache.
pub(super) const COHERENT_READS: bool = true;

/// The interrupt controller is part of the VM.
pub(super) type Controller = ();

/// Features of the host's processor and KVM.
#[derive(Debug)]
pub(super) struct Host {
    supported: Vec<kvm_cpuid_entry2>,
    tsc_deadline: bool,
}

impl Host {
    pub(super) fn of(kvm: &Kvm, _vm: &VmFd) -> Result<Self, Error> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(failed("KVM_GET_SUPPORTED_CPUID"))?;
        Ok(Self {
            supported: supported.as_slice().to_vec(),
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
        })
    }
}

/// Sets kvmclock's "guest was stopped" flag (KVM_KVMCLOCK_CTRL), which Linux's
/// soft-lockup and RCU-stall detectors read. EINVAL: the guest does not use
/// kvmclock.
pub(super) fn report_pause(fd: &VcpuFd) {
    if let Err(error) = fd.kvmclock_ctrl()
        && error.errno() != libc::EINVAL
    {
        log::warn!("KVM_KVMCLOCK_CTRL: {error}");
    }
}

pub(super) fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    let vm = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
    vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
        .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
    let tss = usize::try_from(layout::KVM_TSS).unwrap_or(0);
    vm.set_tss_address(tss)
        .map_err(failed("KVM_SET_TSS_ADDR"))?;
    Ok(vm)
}

/// The in-kernel PIC, I/O APIC and local APICs must exist before vCPUs do. No
/// PIT: a hardware-reduced Linux uses the local APIC's timer.
pub(super) fn create_controller<V>(
    vm: &VmFd,
    vcpus: impl FnOnce() -> Result<V, Error>,
) -> Result<(Controller, V), Error> {
    vm.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
    Ok(((), vcpus()?))
}

/// Does nothing: the vCPU's registers can be set at once.
pub(super) fn init_vcpu(_vcpu: &VcpuFd, _host: &Host, _index: u32) -> Result<(), Error> {
    Ok(())
}

/// Sets the start state of a vCPU. All but the first wait for a start-up IPI,
/// so that their registers do not matter.
pub(super) fn set_up(
    vcpu: &VcpuFd,
    host: &Host,
    index: u32,
    cpus: u32,
    entry: Entry,
) -> Result<(), Error> {
    let cpuid = cpu::cpuid(&host.supported, index, cpus, host.tsc_deadline);
    let cpuid = CpuId::from_entries(&cpuid)
        .map_err(|error| failed("KVM_SET_CPUID2")(std::io::Error::other(error)))?;
    vcpu.set_cpuid2(&cpuid).map_err(failed("KVM_SET_CPUID2"))?;
    let msrs = cpu::msrs();
    let table = Msrs::from_entries(&msrs)
        .map_err(|error| failed("KVM_SET_MSRS")(std::io::Error::other(error)))?;
    let set = vcpu.set_msrs(&table).map_err(failed("KVM_SET_MSRS"))?;
    if let Some(refused) = msrs.get(set) {
        // The kernel stops at the first MSR that it refuses.
        let text = format!("MSR {:#x} is refused", refused.index);
        return Err(failed("KVM_SET_MSRS")(std::io::Error::other(text)));
    }
    vcpu.set_fpu(&cpu::fpu()).map_err(failed("KVM_SET_FPU"))?;
    let mut lapic = vcpu.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
    cpu::set_lint(&mut lapic);
    vcpu.set_lapic(&lapic).map_err(failed("KVM_SET_LAPIC"))?;
    if index == 0 {
        let reset = vcpu.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        vcpu.set_sregs(&cpu::sregs(entry, &reset))
            .map_err(failed("KVM_SET_SREGS"))?;
        vcpu.set_regs(&cpu::regs(entry))
            .map_err(failed("KVM_SET_REGS"))?;
    }
    Ok(())
}

/// Returns none: CPUID describes the caches.
pub(super) fn caches(_vcpu: &VcpuFd) -> Vec<arch::Cache> {
    Vec::new()
}

/// The registers as a block of text for a crash report.
pub(super) fn registers(vcpu: &VcpuFd) -> String {
    let (regs, sregs) = match (vcpu.get_regs(), vcpu.get_sregs()) {
        (Ok(regs), Ok(sregs)) => (regs, sregs),
        (Err(error), _) | (_, Err(error)) => return format!("registers unavailable: {error}"),
    };
    let segment = |name: &str, s: &kvm_segment| {
        format!(
            "{name} {:04x} base {:016x} limit {:08x} type {:x} s {} dpl {} p {} l {} db {} g {}\n",
            s.selector, s.base, s.limit, s.type_, s.s, s.dpl, s.present, s.l, s.db, s.g
        )
    };
    let mut text = String::new();
    let general = [
        [
            ("rax", regs.rax),
            ("rbx", regs.rbx),
            ("rcx", regs.rcx),
            ("rdx", regs.rdx),
        ],
        [
            ("rsi", regs.rsi),
            ("rdi", regs.rdi),
            ("rsp", regs.rsp),
            ("rbp", regs.rbp),
        ],
        [
            ("r8 ", regs.r8),
            ("r9 ", regs.r9),
            ("r10", regs.r10),
            ("r11", regs.r11),
        ],
        [
            ("r12", regs.r12),
            ("r13", regs.r13),
            ("r14", regs.r14),
            ("r15", regs.r15),
        ],
        [
            ("rip", regs.rip),
            ("flg", regs.rflags),
            ("efr", sregs.efer),
            ("apb", sregs.apic_base),
        ],
        [
            ("cr0", sregs.cr0),
            ("cr2", sregs.cr2),
            ("cr3", sregs.cr3),
            ("cr4", sregs.cr4),
        ],
        [
            ("gdt", sregs.gdt.base),
            ("gdl", u64::from(sregs.gdt.limit)),
            ("idt", sregs.idt.base),
            ("idl", u64::from(sregs.idt.limit)),
        ],
    ];
    for row in general {
        for (name, value) in row {
            text += &format!("{name} {value:016x} ");
        }
        text += "\n";
    }
    for (name, register) in [
        ("cs", &sregs.cs),
        ("ss", &sregs.ss),
        ("ds", &sregs.ds),
        ("es", &sregs.es),
        ("fs", &sregs.fs),
        ("gs", &sregs.gs),
        ("tr", &sregs.tr),
    ] {
        text += &segment(name, register);
    }
    text
}
