//! Start registers of a vCPU, as KVM register IDs and values.

/// Start of the first vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Guest physical address of the first instruction.
    pub pc: u64,
    /// Guest physical address of the device tree, for X0.
    pub fdt: u64,
}

/// `KVM_REG_ARM64 | KVM_REG_SIZE_U64 | KVM_REG_ARM_CORE`.
const CORE_U64: u64 = 0x6000_0000_0000_0000 | 0x0030_0000_0000_0000 | 0x0010_0000;

/// ID of a 64-bit core register `offset` bytes into `struct kvm_regs`: KVM
/// counts in 32-bit words (`Documentation/virt/kvm/api.rst`, KVM_SET_ONE_REG).
const fn core_reg(offset: u64) -> u64 {
    CORE_U64 | (offset / 4)
}

/// KVM register ID of general register X`n`, `n` below 31.
pub const fn x(n: u64) -> u64 {
    core_reg(8 * n)
}
/// KVM register ID of the EL1 stack pointer in use.
pub const SP: u64 = core_reg(8 * 31);
/// KVM register ID of the program counter.
pub const PC: u64 = core_reg(8 * 32);
/// KVM register ID of the processor state.
pub const PSTATE: u64 = core_reg(8 * 33);

/// EL1 with its own stack pointer; debug, SError, IRQ and FIQ masked.
const PSTATE_EL1H_MASKED: u64 = 0b0101 | 0xF << 6;

/// Registers of the first vCPU (`Documentation/arch/arm64/booting.rst`): X0
/// holds the device tree, X1 to X3 are zero, which KVM's reset leaves so.
/// The other vCPUs start powered off and get theirs from PSCI CPU_ON.
pub fn regs(entry: Entry) -> [(u64, u64); 3] {
    [
        (PSTATE, PSTATE_EL1H_MASKED),
        (PC, entry.pc),
        (x(0), entry.fdt),
    ]
}

/// The affinity fields of vCPU `index` as KVM assigns them: 16 vCPUs to an
/// Aff0 group (`KVM_ARM_VCPU_INIT` sets MPIDR_EL1 so).
pub const fn mpidr(index: u32) -> u64 {
    let index = index as u64;
    (index & 0xF) | ((index >> 4) & 0xFF) << 8 | ((index >> 12) & 0xFF) << 16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn register_ids_are_those_of_the_kernel_headers() {
        assert_eq!(x(0), 0x6030_0000_0010_0000);
        assert_eq!(PC, 0x6030_0000_0010_0040);
        assert_eq!(PSTATE, 0x6030_0000_0010_0042);
    }

    #[test]
    fn affinity_counts_sixteen_to_a_cluster() {
        assert_eq!(
            [mpidr(0), mpidr(15), mpidr(16), mpidr(33)],
            [0, 15, 0x100, 0x201]
        );
    }
}
