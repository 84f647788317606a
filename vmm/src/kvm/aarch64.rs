//! The aarch64 parts of a VM: the GICv3 with its ITS, and PSCI.

use std::path::Path;

use arch::aarch64::cache;
use arch::boot::Entry;
use arch::{cpu, layout};
use kvm_bindings::{
    KVM_ARM_VCPU_POWER_OFF, KVM_ARM_VCPU_PSCI_0_2, KVM_DEV_ARM_VGIC_CTRL_INIT,
    KVM_DEV_ARM_VGIC_GRP_ADDR, KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_GRP_NR_IRQS,
    KVM_MSI_VALID_DEVID, KVM_VGIC_ITS_ADDR_TYPE, KVM_VGIC_V3_ADDR_TYPE_DIST,
    KVM_VGIC_V3_ADDR_TYPE_REDIST, kvm_create_device, kvm_device_attr,
    kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3,
    kvm_vcpu_init,
};
use kvm_ioctls::{Cap, DeviceFd, Kvm, VcpuFd, VmFd};

use super::error::{Error, failed};
use crate::host_caches;

pub(super) const CAPABILITIES: &[(Cap, &str)] = &[
    (Cap::OneReg, "KVM_CAP_ONE_REG"),
    (Cap::ArmPsci02, "KVM_CAP_ARM_PSCI_0_2"),
    (Cap::DeviceCtrl, "KVM_CAP_DEVICE_CTRL"),
];

/// Wired GSIs are SPIs.
pub(super) const IRQCHIP: u32 = 0;
/// Messages go through the ITS, which needs the DeviceID.
pub(super) const MSI_FLAGS: u32 = KVM_MSI_VALID_DEVID;

/// A guest maps configuration space as device memory, and its reads do not see
/// what the host has only in its cache (Arm ARM B2.8).
pub(super) const COHERENT_READS: bool = false;

/// The VM's devices. Closing the descriptors does not end them.
#[derive(Debug)]
pub(super) struct Controller {
    _gic: DeviceFd,
    _its: DeviceFd,
}

/// Features of the host's KVM.
#[derive(Debug)]
pub(super) struct Host {
    target: kvm_vcpu_init,
}

impl Host {
    pub(super) fn of(_kvm: &Kvm, vm: &VmFd) -> Result<Self, Error> {
        let mut target = kvm_vcpu_init::default();
        vm.get_preferred_target(&mut target)
            .map_err(failed("KVM_ARM_PREFERRED_TARGET"))?;
        target.features[0] |= 1 << KVM_ARM_VCPU_PSCI_0_2;
        Ok(Self { target })
    }
}

/// Does nothing: the Arm architecture's counter runs on in a pause, and KVM has
/// no flag that reports a pause to the guest.
pub(super) fn report_pause(_: &VcpuFd) {}

pub(super) fn create_vm(kvm: &Kvm) -> Result<VmFd, Error> {
    const DEFAULT_BITS: u32 = 40;
    let need = 64 - layout::PCI_MMIO64.last().leading_zeros();
    let have = u32::try_from(kvm.get_host_ipa_limit()).unwrap_or(0);
    // Zero: the kernel supports 40 bits only.
    let have = if have == 0 { DEFAULT_BITS } else { have };
    if have < need {
        return Err(Error::AddressBits { have, need });
    }
    if have < DEFAULT_BITS {
        kvm.create_vm_with_ipa_size(have)
    } else {
        kvm.create_vm()
    }
    .map_err(failed("KVM_CREATE_VM"))
}

/// The GIC is initialized after all vCPUs exist, and before any irqfd.
pub(super) fn create_controller<V>(
    vm: &VmFd,
    vcpus: impl FnOnce() -> Result<V, Error>,
) -> Result<(Controller, V), Error> {
    let vcpus = vcpus()?;
    let gic = create_device(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_V3)
        .map_err(|_| Error::MissingCapability("an emulated GICv3"))?;
    let addr = KVM_DEV_ARM_VGIC_GRP_ADDR;
    set(&gic, addr, KVM_VGIC_V3_ADDR_TYPE_DIST, &layout::GICD.base)?;
    set(&gic, addr, KVM_VGIC_V3_ADDR_TYPE_REDIST, &layout::GICR.base)?;
    set(&gic, KVM_DEV_ARM_VGIC_GRP_NR_IRQS, 0, &layout::GIC_INTIDS)?;
    init(&gic)?;
    let its = create_device(vm, kvm_device_type_KVM_DEV_TYPE_ARM_VGIC_ITS)
        .map_err(|_| Error::MissingCapability("an emulated GICv3 ITS"))?;
    set(&its, addr, KVM_VGIC_ITS_ADDR_TYPE, &layout::ITS.base)?;
    init(&its)?;
    Ok((
        Controller {
            _gic: gic,
            _its: its,
        },
        vcpus,
    ))
}

fn create_device(vm: &VmFd, type_: u32) -> Result<DeviceFd, kvm_ioctls::Error> {
    let mut device = kvm_create_device {
        type_,
        fd: 0,
        flags: 0,
    };
    vm.create_device(&mut device)
}

fn set<T>(device: &DeviceFd, group: u32, attr: u32, value: &T) -> Result<(), Error> {
    let attribute = kvm_device_attr {
        flags: 0,
        group,
        attr: u64::from(attr),
        addr: std::ptr::from_ref(value) as u64,
    };
    device
        .set_device_attr(&attribute)
        .map_err(failed("KVM_SET_DEVICE_ATTR of the GIC"))
}

fn init(device: &DeviceFd) -> Result<(), Error> {
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_DEV_ARM_VGIC_GRP_CTRL,
        attr: u64::from(KVM_DEV_ARM_VGIC_CTRL_INIT),
        addr: 0,
    };
    device
        .set_device_attr(&attribute)
        .map_err(failed("initializing the GIC"))
}

/// Resets a vCPU. All but the first start powered off, until PSCI CPU_ON.
pub(super) fn init_vcpu(vcpu: &VcpuFd, host: &Host, index: u32) -> Result<(), Error> {
    let mut target = host.target;
    if index > 0 {
        target.features[0] |= 1 << KVM_ARM_VCPU_POWER_OFF;
    }
    vcpu.vcpu_init(&target).map_err(failed("KVM_ARM_VCPU_INIT"))
}

/// Sets the start state of a vCPU.
pub(super) fn set_up(
    vcpu: &VcpuFd,
    _host: &Host,
    index: u32,
    _cpus: u32,
    entry: Entry,
) -> Result<(), Error> {
    if index == 0 {
        for (id, value) in cpu::regs(entry) {
            vcpu.set_one_reg(id, &value.to_le_bytes())
                .map_err(failed("KVM_SET_ONE_REG"))?;
        }
    }
    Ok(())
}

/// The caches for the device tree: levels of the vCPU, sizes of the host.
pub(super) fn caches(vcpu: &VcpuFd) -> Vec<arch::Cache> {
    let mut clidr = [0; 8];
    if let Err(error) = vcpu.get_one_reg(cache::CLIDR_EL1, &mut clidr) {
        log::debug!("CLIDR_EL1 cannot be read: {error}");
    }
    let host = host_caches::read(Path::new(host_caches::SYSFS));
    cache::merge(u64::from_le_bytes(clidr), &host)
}

/// The registers as a block of text for a crash report.
pub(super) fn registers(vcpu: &VcpuFd) -> String {
    let read = |id: u64| {
        let mut bytes = [0; 8];
        match vcpu.get_one_reg(id, &mut bytes) {
            Ok(_) => format!("{:016x}", u64::from_le_bytes(bytes)),
            Err(error) => format!("<{error}>"),
        }
    };
    let mut text = format!(
        "pc  {} pstate {} sp {}\n",
        read(cpu::PC),
        read(cpu::PSTATE),
        read(cpu::SP)
    );
    for n in 0..31 {
        let end = if n % 4 == 3 || n == 30 { '\n' } else { ' ' };
        text += &format!("x{n:<2} {}{end}", read(cpu::x(n)));
    }
    text
}
