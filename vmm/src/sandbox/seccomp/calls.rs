//! System calls that each kind of thread makes once it is confined.
//!
//! The lists are in one place: a vCPU thread calls every device, and any thread
//! may drop the last reference to one, so that a list belongs to no module.

use devices::thread::ThreadKind;
use libc::c_long;

/// Number of an ioctl (Linux `asm-generic/ioctl.h`).
const fn ioctl(direction: u32, kind: u32, number: u32, size: u32) -> u32 {
    direction << 30 | size << 16 | kind << 8 | number
}

const fn none(kind: u32, number: u32) -> u32 {
    ioctl(0, kind, number, 0)
}

const fn write(kind: u32, number: u32, size: u32) -> u32 {
    ioctl(1, kind, number, size)
}

const fn read(kind: u32, number: u32, size: u32) -> u32 {
    ioctl(2, kind, number, size)
}

const KVM: u32 = 0xae;
const VHOST: u32 = 0xaf;
const TUN: u32 = b'T' as u32;

const KVM_RUN: u32 = none(KVM, 0x80);

/// Pause and crash report of a vCPU: `KVM_KVMCLOCK_CTRL`, `KVM_GET_REGS`,
/// `KVM_GET_SREGS`.
#[cfg(target_arch = "x86_64")]
const REGISTERS: &[u32] = &[none(KVM, 0xad), read(KVM, 0x81, 144), read(KVM, 0x83, 312)];
/// Crash report of a vCPU: `KVM_GET_ONE_REG`.
#[cfg(target_arch = "aarch64")]
const REGISTERS: &[u32] = &[write(KVM, 0xab, 16)];

/// A function whose configuration space the guest no longer reads as memory:
/// `KVM_SET_USER_MEMORY_REGION`.
const MEMORY: &[u32] = &[write(KVM, 0x46, 32)];

/// Interrupts: `KVM_SET_GSI_ROUTING`, `KVM_IRQFD`.
const INTERRUPTS: &[u32] = &[write(KVM, 0x6a, 8), write(KVM, 0x76, 32)];

/// Doorbells: `KVM_IOEVENTFD`.
const DOORBELLS: &[u32] = &[write(KVM, 0x79, 64)];

/// Start and stop of a vhost ring: `VHOST_SET_VRING_NUM`, `_ADDR`, `_BASE`,
/// `_KICK`, `_CALL`, `_ERR`, `VHOST_GET_VRING_BASE`, `VHOST_NET_SET_BACKEND`,
/// `VHOST_VSOCK_SET_RUNNING`.
const RINGS: &[u32] = &[
    write(VHOST, 0x10, 8),
    write(VHOST, 0x11, 40),
    write(VHOST, 0x12, 8),
    write(VHOST, 0x20, 8),
    write(VHOST, 0x21, 8),
    write(VHOST, 0x22, 8),
    ioctl(3, VHOST, 0x12, 8),
    write(VHOST, 0x30, 8),
    write(VHOST, 0x61, 4),
];

/// Negotiation with vhost: `VHOST_GET_FEATURES`, `VHOST_SET_FEATURES`,
/// `VHOST_GET_BACKEND_FEATURES`, `VHOST_SET_BACKEND_FEATURES`,
/// `VHOST_SET_MEM_TABLE`.
const FEATURES: &[u32] = &[
    read(VHOST, 0x00, 8),
    write(VHOST, 0x00, 8),
    read(VHOST, 0x26, 8),
    write(VHOST, 0x25, 8),
    write(VHOST, 0x03, 8),
];

/// A tap's offloads, queues, name and header size: `TUNSETOFFLOAD`,
/// `TUNSETQUEUE`, `TUNGETIFF`, `TUNSETVNETHDRSZ`.
const TAP: &[u32] = &[
    write(TUN, 208, 4),
    write(TUN, 217, 4),
    read(TUN, 210, 4),
    write(TUN, 216, 4),
];

/// The link of a tap, and its use after it was created again: `SIOCGIFFLAGS`,
/// `SIOCGIFINDEX`, `TUNSETIFF`, `TUNGETVNETHDRSZ`.
const LINKS: &[u32] = &[0x8913, 0x8933, write(TUN, 202, 4), read(TUN, 215, 4)];

const FIONBIO: u32 = 0x5421;

/// Examines a terminal: `TCGETS`, `TCGETS2`, `TIOCGPGRP`, `TIOCGWINSZ`. Any thread may restore
/// it, in a signal handler or in a panic.
pub(super) const TERMINAL: &[u32] = &[0x5401, read(TUN, 0x2a, 44), 0x540f, 0x5413];
/// Sets the mode of the terminal on standard input: `TCSETS`, `TCSETS2`.
pub(super) const SET_TERMINAL: &[u32] = &[0x5402, write(TUN, 0x2b, 44)];

/// The ioctls of a kind, in addition to those of a terminal. The most frequent
/// one is first.
pub(super) fn ioctls(kind: ThreadKind) -> Vec<u32> {
    let devices = [INTERRUPTS, DOORBELLS, RINGS, FEATURES, TAP];
    match kind {
        ThreadKind::Vcpu => [&[KVM_RUN], REGISTERS, MEMORY, &devices.concat()].concat(),
        ThreadKind::VhostWorker => [RINGS, TAP, LINKS].concat(),
        ThreadKind::Msi => INTERRUPTS.to_vec(),
        ThreadKind::Api => vec![FIONBIO],
        ThreadKind::Queries => devices.concat(),
        // The input of the console keeps its interrupt.
        ThreadKind::EventLoop => [INTERRUPTS, DOORBELLS].concat(),
        ThreadKind::Disk | ThreadKind::Console => Vec::new(),
    }
}

#[cfg(target_arch = "x86_64")]
const EPOLL: [c_long; 2] = [libc::SYS_epoll_wait, libc::SYS_epoll_pwait];
#[cfg(target_arch = "aarch64")]
const EPOLL: [c_long; 1] = [libc::SYS_epoll_pwait];

/// The process group, for the terminal; musl calls `getpgid` on both.
#[cfg(target_arch = "x86_64")]
const PROCESS_GROUP: &[c_long] = &[libc::SYS_getpgid, libc::SYS_getpgrp];
#[cfg(target_arch = "aarch64")]
const PROCESS_GROUP: &[c_long] = &[libc::SYS_getpgid];

/// Every thread: memory, locks, events and the log, signals, and its own end.
const COMMON: &[c_long] = &[
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_futex,
    libc::SYS_close,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_sigaltstack,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_clock_gettime,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_fcntl,
    // Answered with EACCES, except on the event loop: glibc's malloc opens
    // files of /proc and /sys, and does without them.
    libc::SYS_openat,
];

/// Calls with any arguments.
pub(super) fn calls(kind: ThreadKind) -> Vec<c_long> {
    let more: &[c_long] = match kind {
        ThreadKind::EventLoop => &[
            libc::SYS_epoll_ctl,
            libc::SYS_timerfd_settime,
            libc::SYS_timerfd_gettime,
            // Files of log and metrics, and the removal of the API's socket.
            libc::SYS_statx,
            libc::SYS_fstatfs,
            libc::SYS_unlinkat,
            #[cfg(target_arch = "x86_64")]
            libc::SYS_unlink,
            libc::SYS_clock_nanosleep,
            libc::SYS_nanosleep,
        ],
        ThreadKind::Api => &[
            libc::SYS_epoll_ctl,
            libc::SYS_accept4,
            libc::SYS_recvfrom,
            libc::SYS_sendto,
            libc::SYS_shutdown,
        ],
        ThreadKind::Vcpu | ThreadKind::VhostWorker | ThreadKind::Msi | ThreadKind::Queries => {
            &[libc::SYS_epoll_ctl]
        }
        ThreadKind::Disk => &[
            libc::SYS_lseek,
            libc::SYS_fdatasync,
            libc::SYS_fallocate,
            libc::SYS_pwrite64,
        ],
        ThreadKind::Console => &[libc::SYS_clock_nanosleep, libc::SYS_nanosleep],
    };
    [COMMON, &EPOLL, PROCESS_GROUP, more].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ioctls_have_the_kernels_numbers() {
        let number = |request: libc::Ioctl| u32::try_from(request & 0xffff_ffff).unwrap();
        let tap = [
            libc::TUNSETOFFLOAD,
            libc::TUNSETQUEUE,
            libc::TUNGETIFF,
            libc::TUNSETVNETHDRSZ,
        ];
        assert_eq!(TAP, tap.map(number));
        let links = [
            libc::SIOCGIFFLAGS,
            libc::SIOCGIFINDEX,
            libc::TUNSETIFF,
            libc::TUNGETVNETHDRSZ,
        ];
        assert_eq!(LINKS, links.map(number));
        let terminal = [
            libc::TCGETS,
            libc::TCGETS2,
            libc::TIOCGPGRP,
            libc::TIOCGWINSZ,
        ];
        assert_eq!(TERMINAL, terminal.map(number));
        assert_eq!(SET_TERMINAL, [libc::TCSETS, libc::TCSETS2].map(number));
        assert_eq!(FIONBIO, number(libc::FIONBIO));
        assert_eq!(KVM_RUN, 0xae80);
    }
}
