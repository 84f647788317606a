//! Start state of a vCPU: CPUID, MSRs, registers, local APIC.

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};

use crate::x86_64::layout;

/// Entry mode and address of the first vCPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 32-bit protected mode at `ip`, `ebx` = address of the PVH start info.
    Pvh {
        /// First instruction.
        ip: u64,
        /// Address of `hvm_start_info`.
        start_info: u64,
    },
    /// 64-bit mode at `ip`, `rsi` = address of the boot parameters.
    Linux64 {
        /// First instruction.
        ip: u64,
        /// Address of `boot_params`.
        zero_page: u64,
    },
}

const CODE_64: u64 = descriptor(0xA09B, 0xF_FFFF);
const DATA: u64 = descriptor(0xC093, 0xF_FFFF);
const TSS: u64 = descriptor(0x808B, 0xFFFF);

/// The GDT of the 64-bit entry: code at selector 0x10, data at 0x18, as the
/// boot protocol requires, and a task state segment.
pub(crate) const GDT: [u64; 5] = [0, 0, CODE_64, DATA, TSS];

const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TSS_SELECTOR: u16 = 0x20;

/// A segment descriptor with base 0 (Intel SDM vol. 3 §3.4.5). `flags` holds
/// the access byte (bits 0 to 7) and G, D/B, L, AVL (bits 12 to 15).
const fn descriptor(flags: u64, limit: u64) -> u64 {
    (limit & 0xFFFF) | (flags << 40) | ((limit >> 16) << 48)
}

/// The segment register after loading `descriptor`.
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let byte = |shift: u64, mask: u64| -> u8 {
        let [low, ..] = ((descriptor >> shift) & mask).to_le_bytes();
        low
    };
    let limit = (descriptor & 0xFFFF) | ((descriptor >> 32) & 0xF_0000);
    let granular = byte(55, 1) != 0;
    let scaled = if granular { limit << 12 | 0xFFF } else { limit };
    kvm_segment {
        base: 0,
        limit: u32::try_from(scaled).unwrap_or(u32::MAX),
        selector,
        type_: byte(40, 0xF),
        s: byte(44, 1),
        dpl: byte(45, 3),
        present: byte(47, 1),
        avl: byte(52, 1),
        l: byte(53, 1),
        db: byte(54, 1),
        g: byte(55, 1),
        unusable: 0,
        padding: 0,
    }
}

/// General registers of the first vCPU.
pub fn regs(entry: Entry) -> kvm_regs {
    const RESERVED_ONE: u64 = 2;
    let mut regs = kvm_regs {
        rflags: RESERVED_ONE,
        ..kvm_regs::default()
    };
    match entry {
        Entry::Pvh { ip, start_info } => {
            regs.rip = ip;
            regs.rbx = start_info;
        }
        Entry::Linux64 { ip, zero_page } => {
            regs.rip = ip;
            regs.rsi = zero_page;
        }
    }
    regs
}

/// Special registers of the first vCPU: KVM's values after reset, changed as
/// the entry requires.
pub fn sregs(entry: Entry, reset: &kvm_sregs) -> kvm_sregs {
    const PE: u64 = 1;
    const ET: u64 = 1 << 4;
    const PG: u64 = 1 << 31;
    const PAE: u64 = 1 << 5;
    const LME_LMA: u64 = 1 << 8 | 1 << 10;
    let mut sregs = *reset;
    let code = match entry {
        Entry::Pvh { .. } => {
            sregs.cr0 = PE | ET;
            sregs.cr4 = 0;
            descriptor(0xC09B, 0xF_FFFF)
        }
        Entry::Linux64 { .. } => {
            sregs.cr0 = PE | ET | PG;
            sregs.cr3 = layout::PAGE_TABLES;
            sregs.cr4 = PAE;
            sregs.efer = LME_LMA;
            CODE_64
        }
    };
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = 8 * 5 - 1;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
    sregs.cs = segment(CODE_SELECTOR, code);
    let data = segment(DATA_SELECTOR, DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TSS_SELECTOR, TSS);
    if matches!(entry, Entry::Pvh { .. }) {
        // xen `start_info.h`: a 32-bit TSS with base 0 and limit 0x67.
        sregs.tr.limit = 0x67;
    }
    sregs
}

/// Floating-point state after FNINIT, SSE exceptions masked.
pub fn fpu() -> kvm_fpu {
    kvm_fpu {
        fcw: 0x37F,
        mxcsr: 0x1F80,
        ..kvm_fpu::default()
    }
}

/// MSRs of every vCPU at its start.
pub fn msrs() -> Vec<kvm_msr_entry> {
    const IA32_MISC_ENABLE: u32 = 0x1A0;
    const FAST_STRING: u64 = 1;
    const MTRR_DEF_TYPE: u32 = 0x2FF;
    const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;
    let msr = |index, data| kvm_msr_entry {
        index,
        data,
        ..kvm_msr_entry::default()
    };
    vec![
        msr(IA32_MISC_ENABLE, FAST_STRING),
        msr(MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
    ]
}

/// Programs LINT0 as ExtINT and LINT1 as NMI, as firmware does and the MADT
/// describes.
pub fn set_lint(lapic: &mut kvm_lapic_state) {
    const LVT_LINT0: usize = 0x350;
    const LVT_LINT1: usize = 0x360;
    const MODE_NMI: u32 = 4;
    const MODE_EXTINT: u32 = 7;
    for (register, mode) in [(LVT_LINT0, MODE_EXTINT), (LVT_LINT1, MODE_NMI)] {
        for (target, byte) in lapic.regs[register..]
            .iter_mut()
            .zip((mode << 8).to_le_bytes())
        {
            *target = i8::from_le_bytes([byte]);
        }
    }
}

/// CPUID of vCPU `index` of `cpus`, from KVM's supported CPUID.
///
/// One package, one thread per core, APIC ID = index. `tsc_deadline` says
/// whether the in-kernel local APIC has the TSC deadline timer, with which the
/// guest does not calibrate the APIC timer.
pub fn cpuid(
    supported: &[kvm_cpuid_entry2],
    index: u32,
    cpus: u32,
    tsc_deadline: bool,
) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = supported
        .iter()
        .copied()
        // Rebuilt below: the host's topology is not the guest's.
        .filter(|entry| !matches!(entry.function, 0xB | 0x1F))
        .collect();
    let top = Topology::new(index, cpus);
    for entry in &mut entries {
        top.adjust(entry, tsc_deadline);
    }
    let max_leaf = supported
        .iter()
        .find(|entry| entry.function == 0)
        .map_or(0, |leaf| leaf.eax);
    for leaf in [0xB, 0x1F].into_iter().filter(|&leaf| leaf <= max_leaf) {
        entries.extend(top.extended_leaf(leaf));
    }
    entries
}

/// Position of a vCPU in the package.
struct Topology {
    apic_id: u32,
    cpus: u32,
    /// Bits of the APIC ID that number the cores of the package.
    core_bits: u32,
}

impl Topology {
    fn new(index: u32, cpus: u32) -> Self {
        let core_bits = cpus.max(1).next_power_of_two().trailing_zeros();
        Self {
            apic_id: index,
            cpus,
            core_bits,
        }
    }

    fn adjust(&self, entry: &mut kvm_cpuid_entry2, tsc_deadline: bool) {
        match entry.function {
            0x1 => self.adjust_features(entry, tsc_deadline),
            // Deterministic cache parameters, Intel and AMD.
            0x4 | 0x8000_001D if entry.eax & 0x1F != 0 => {
                let level = (entry.eax >> 5) & 7;
                let sharing = if level >= 3 { self.cpus - 1 } else { 0 };
                entry.eax = entry.eax & 0x3FFF | sharing.min(0xFFF) << 14;
                if entry.function == 0x4 {
                    entry.eax |= (self.cpus - 1).min(0x3F) << 26;
                }
            }
            // No virtual performance counters: no exits to save and load them.
            0xA => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            0x8000_0008 => {
                let last = (self.cpus - 1).min(0xFF);
                entry.ecx = entry.ecx & !0xF0FF | last | self.core_bits << 12;
            }
            0x8000_001E => {
                entry.eax = self.apic_id;
                entry.ebx = self.apic_id & 0xFF;
                entry.ecx = 0;
            }
            _ => {}
        }
    }

    fn adjust_features(&self, entry: &mut kvm_cpuid_entry2, tsc_deadline: bool) {
        const TSC_DEADLINE: u32 = 1 << 24;
        const HYPERVISOR: u32 = 1 << 31;
        const HTT: u32 = 1 << 28;
        const CLFLUSH_SIZE: u32 = 0xFF00;
        entry.ebx =
            entry.ebx & CLFLUSH_SIZE | (self.apic_id & 0xFF) << 24 | self.cpus.min(0xFF) << 16;
        entry.ecx = entry.ecx & !TSC_DEADLINE | HYPERVISOR;
        if tsc_deadline {
            entry.ecx |= TSC_DEADLINE;
        }
        entry.edx = if self.cpus > 1 {
            entry.edx | HTT
        } else {
            entry.edx & !HTT
        };
    }

    /// Extended topology (Intel SDM vol. 2A, CPUID leaves 0BH and 1FH):
    /// threads, cores, end.
    fn extended_leaf(&self, function: u32) -> [kvm_cpuid_entry2; 3] {
        const SIGNIFICANT_INDEX: u32 = 1;
        const THREADS: u32 = 1;
        const CORES: u32 = 2;
        let levels = [
            (0, 1, THREADS),
            (self.core_bits, self.cpus, CORES),
            (0, 0, 0),
        ];
        let mut index = 0;
        levels.map(|(eax, ebx, kind)| {
            let entry = kvm_cpuid_entry2 {
                function,
                index,
                flags: SIGNIFICANT_INDEX,
                eax,
                ebx,
                ecx: index | kind << 8,
                edx: self.apic_id,
                ..kvm_cpuid_entry2::default()
            };
            index += 1;
            entry
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            index,
            ..kvm_cpuid_entry2::default()
        }
    }

    fn find(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries
            .iter()
            .find(|e| e.function == function && e.index == index)
            .unwrap()
    }

    #[test]
    fn topology_leaves_say_one_package_with_one_thread_a_core() {
        let supported = [
            kvm_cpuid_entry2 {
                eax: 0x1F,
                ..leaf(0, 0)
            },
            kvm_cpuid_entry2 {
                ebx: 0xAA08_FFFF,
                ..leaf(1, 0)
            },
            kvm_cpuid_entry2 {
                edx: 99,
                ..leaf(0xB, 7)
            },
            kvm_cpuid_entry2 {
                eax: 0xFC00_0163,
                ..leaf(4, 3)
            },
        ];
        let cpuid = cpuid(&supported, 2, 3, true);
        let features = find(&cpuid, 1, 0);
        assert_eq!(features.ebx, 0x0203_FF00);
        assert_eq!(features.ecx, 1 << 31 | 1 << 24);
        assert_eq!(features.edx, 1 << 28);
        for function in [0xB, 0x1F] {
            let threads = find(&cpuid, function, 0);
            assert_eq!(
                (threads.eax, threads.ebx, threads.ecx, threads.edx),
                (0, 1, 0x100, 2)
            );
            let cores = find(&cpuid, function, 1);
            assert_eq!(
                (cores.eax, cores.ebx, cores.ecx, cores.edx),
                (2, 3, 0x201, 2)
            );
            assert_eq!(find(&cpuid, function, 2).ecx, 2);
        }
        assert_eq!(cpuid.iter().filter(|e| e.function == 0xB).count(), 3);
        // Shared by all three cores: L3 with 3 sharing, 3 cores in the package.
        assert_eq!(find(&cpuid, 4, 3).eax, 2 << 26 | 2 << 14 | 0x163);
    }

    #[test]
    fn leaves_the_processor_lacks_are_not_added() {
        let supported = [kvm_cpuid_entry2 {
            eax: 0xA,
            ..leaf(0, 0)
        }];
        assert_eq!(cpuid(&supported, 0, 1, false).len(), 1);
    }

    #[test]
    fn pvh_starts_in_flat_32_bit_protected_mode() {
        let entry = Entry::Pvh {
            ip: 0x100_0000,
            start_info: 0x6000,
        };
        let sregs = sregs(entry, &kvm_sregs::default());
        assert_eq!((sregs.cr0 & 0x8000_0001, sregs.efer), (1, 0));
        assert_eq!(
            (sregs.cs.limit, sregs.cs.db, sregs.cs.l),
            (0xFFFF_FFFF, 1, 0)
        );
        assert_eq!((sregs.tr.limit, sregs.tr.type_, sregs.tr.s), (0x67, 0xB, 0));
        assert_eq!((regs(entry).rip, regs(entry).rbx), (0x100_0000, 0x6000));
    }

    #[test]
    fn the_64_bit_entry_starts_paged_in_long_mode() {
        let entry = Entry::Linux64 {
            ip: 0x100_0200,
            zero_page: 0x7000,
        };
        let sregs = sregs(entry, &kvm_sregs::default());
        assert_eq!(sregs.cr0 & 0x8000_0001, 0x8000_0001);
        assert_eq!((sregs.efer, sregs.cr3), (0x500, layout::PAGE_TABLES));
        assert_eq!((sregs.cs.selector, sregs.cs.l, sregs.cs.db), (0x10, 1, 0));
        assert_eq!(
            (sregs.ds.selector, sregs.ds.g, sregs.ds.limit),
            (0x18, 1, 0xFFFF_FFFF)
        );
        assert_eq!((regs(entry).rip, regs(entry).rsi), (0x100_0200, 0x7000));
        assert_eq!(GDT[2], 0x00AF_9B00_0000_FFFF);
        assert_eq!(GDT[3], 0x00CF_9300_0000_FFFF);
    }

    #[test]
    fn lint_pins_are_extint_and_nmi() {
        let mut lapic = kvm_lapic_state::default();
        set_lint(&mut lapic);
        assert_eq!(lapic.regs[0x350..0x354], [0, 7, 0, 0]);
        assert_eq!(lapic.regs[0x360..0x364], [0, 4, 0, 0]);
    }
}
