//! System call filters, one for each kind of thread (seccomp(2)).
#![allow(unsafe_code)] // Installs a filter.

mod calls;
mod listener;
mod names;
mod violation;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::sync::OnceLock;

use devices::thread::ThreadKind;
use libc::c_ulong;
use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule,
};

pub use self::violation::EXIT_STATUS;
use crate::config::Sandbox;

/// Code of a BPF instruction that returns its operand (`BPF_RET | BPF_K`).
const RETURN: u16 = 0x06;

/// Filters by the index of the kind.
static FILTERS: [OnceLock<BpfProgram>; ThreadKind::ALL.len()] =
    [const { OnceLock::new() }; ThreadKind::ALL.len()];

/// Prepares the process for filters: the report of violations.
///
/// # Errors
/// No signal handler, thread or file descriptor is available.
pub(super) fn prepare(mode: Sandbox) -> io::Result<()> {
    match mode {
        Sandbox::On => violation::handle(),
        Sandbox::Log => listener::start(),
        Sandbox::Off => Ok(()),
    }
}

/// Confines the calling thread to the system calls of its kind, after
/// [`prepare`]. [`Sandbox::Log`] makes other calls too, and logs them.
///
/// # Errors
/// The kernel has no seccomp filters or refuses them.
pub(super) fn enter(kind: ThreadKind, mode: Sandbox) -> io::Result<()> {
    if mode == Sandbox::Off {
        return Ok(());
    }
    if kind != ThreadKind::EventLoop {
        static NO_FILES: OnceLock<BpfProgram> = OnceLock::new();
        install(once(&NO_FILES, no_files)?, 0)?;
    }
    let index = kind as usize;
    let program = once(&FILTERS[index], || filter(kind))?;
    if mode == Sandbox::On {
        violation::name_thread();
        install(program, 0)?;
        return Ok(());
    }
    let mut program = program.clone();
    // The crate has no name for this action.
    for instruction in &mut program {
        if (instruction.code, instruction.k) == (RETURN, libc::SECCOMP_RET_TRAP) {
            instruction.k = libc::SECCOMP_RET_USER_NOTIF;
        }
    }
    let listener = install(&program, libc::SECCOMP_FILTER_FLAG_NEW_LISTENER)?;
    let listener = i32::try_from(listener).map_err(io::Error::other)?;
    // SAFETY: the kernel has just opened the descriptor, and nothing else has it.
    listener::add(unsafe { OwnedFd::from_raw_fd(listener) }, kind)
}

/// Returns the value of `cell`, which the first thread of a kind computes.
fn once(
    cell: &OnceLock<BpfProgram>,
    compile: impl FnOnce() -> Result<BpfProgram, BackendError>,
) -> io::Result<&BpfProgram> {
    if let Some(program) = cell.get() {
        return Ok(program);
    }
    let program = compile().map_err(io::Error::other)?;
    Ok(cell.get_or_init(|| program))
}

/// The filter of a kind. A call that is not permitted is a violation.
fn filter(kind: ThreadKind) -> Result<BpfProgram, BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    for number in calls::calls(kind) {
        rules.insert(number, Vec::new());
    }
    let mut ioctls = Vec::new();
    for number in calls::ioctls(kind).iter().chain(calls::TERMINAL) {
        ioctls.push(rule(&[(1, SeccompCmpOp::Eq, u64::from(*number))])?);
    }
    for number in calls::SET_TERMINAL {
        let number = (1, SeccompCmpOp::Eq, u64::from(*number));
        ioctls.push(rule(&[(0, SeccompCmpOp::Eq, 0), number])?);
    }
    rules.insert(libc::SYS_ioctl, ioctls);
    let code = u64::from(libc::PROT_EXEC.cast_unsigned());
    for number in [libc::SYS_mmap, libc::SYS_mprotect] {
        let no_code = rule(&[(2, SeccompCmpOp::MaskedEq(code), 0)])?;
        rules.insert(number, vec![no_code]);
    }
    let to_itself = rule(&[(0, SeccompCmpOp::Eq, u64::from(std::process::id()))])?;
    rules.insert(libc::SYS_tgkill, vec![to_itself]);
    // musl's pthread_kill and raise. It names a thread without its process.
    #[cfg(target_env = "musl")]
    if matches!(kind, ThreadKind::EventLoop | ThreadKind::Queries) {
        rules.insert(libc::SYS_tkill, Vec::new());
    }
    compile(rules, SeccompAction::Trap, SeccompAction::Allow)
}

/// A filter that answers the opening of files with an error. It is separate
/// because a filter has one action for all its rules.
fn no_files() -> Result<BpfProgram, BackendError> {
    let rules = BTreeMap::from([(libc::SYS_openat, Vec::new())]);
    let refuse = SeccompAction::Errno(libc::EACCES.cast_unsigned());
    compile(rules, SeccompAction::Allow, refuse)
}

/// A rule that all of `conditions` must fulfil: index, comparison and value of
/// a 32-bit argument.
fn rule(conditions: &[(u8, SeccompCmpOp, u64)]) -> Result<SeccompRule, BackendError> {
    let conditions = conditions.iter().map(|(index, comparison, value)| {
        SeccompCondition::new(*index, SeccompCmpArgLen::Dword, comparison.clone(), *value)
    });
    SeccompRule::new(conditions.collect::<Result<_, _>>()?)
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    others: SeccompAction,
    matches: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let architecture = std::env::consts::ARCH.try_into()?;
    SeccompFilter::new(rules, others, matches, architecture)?.try_into()
}

/// Installs a filter for the calling thread, which has no_new_privs. Returns
/// the descriptor of its listener, if `flags` ask for one.
fn install(program: &BpfProgram, flags: c_ulong) -> io::Result<libc::c_long> {
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog {
        len: length,
        // seccompiler's instruction has the layout of libc's.
        filter: program.as_ptr().cast_mut().cast(),
    };
    let operation = libc::SECCOMP_SET_MODE_FILTER;
    let program = &raw const program;
    // SAFETY: the kernel reads the program, which outlives the call, and
    // changes nothing in this process's memory.
    match unsafe { libc::syscall(libc::SYS_seccomp, operation, flags, program) } {
        -1 => Err(io::Error::last_os_error()),
        result => Ok(result),
    }
}

#[cfg(test)]
mod tests;
