//! Namespaces and the process of a jailed command.
#![allow(unsafe_code)] // unshare(2), and what a process does before it becomes the command.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use rustix::process::{
    Pid, PidfdFlags, getpid, kill_process, pidfd_open, set_parent_process_death_signal,
};
use rustix::thread::{
    LinkNameSpaceType, UnshareFlags, move_into_link_name_space, set_no_new_privs,
    set_thread_groups, set_thread_res_gid, set_thread_res_uid, unshare_unsafe,
};
use vmm::signals::{Signal, Signals};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::cgroup::Cgroup;
use super::root::Owner;

/// Variables of the environment that the command inherits.
const ENVIRONMENT: [&str; 2] = ["TERM", "RUST_BACKTRACE"];

/// Enters the network namespace at `path`.
pub fn enter_network(path: &Path) -> Result<()> {
    let what = || format!("--netns: cannot enter {}", path.display());
    let file = File::open(path).with_context(what)?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).with_context(what)
}

/// Enters new mount, IPC and UTS namespaces. Processes that are started later are in a new PID
/// namespace. Returns the mount namespace that was left.
pub fn enter_namespaces() -> Result<File> {
    let left = File::open("/proc/self/ns/mnt").context("cannot find the mount namespace")?;
    let flags =
        UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS | UnshareFlags::NEWPID;
    // SAFETY: CLONE_FILES, which would make the descriptors of threads differ, is not among them.
    unsafe { unshare_unsafe(flags) }.context("cannot enter new namespaces")?;
    Ok(left)
}

/// Starts the command as `owner`, and waits for its end. Returns its exit status.
///
/// # Errors
/// It cannot be started, or a signal ended it.
pub fn run(
    start: &[PathBuf],
    words: &[OsString],
    owner: Owner,
    cgroup: Option<&Cgroup>,
) -> Result<ExitCode> {
    let signals = Signals::install().context("cannot install the signal handlers")?;
    let (program, before) = start.split_first().context("there is no program")?;
    let mut command = Command::new(program);
    command.args(before).args(words).env_clear();
    let kept = ENVIRONMENT.iter();
    command.envs(kept.filter_map(|&name| Some((name, std::env::var_os(name)?))));
    let processes = cgroup.map(|group| group.processes().as_raw_fd());
    let prepare = move || {
        if let Some(processes) = processes {
            // SAFETY: the group outlives the start of the command, and execve(2) closes this copy.
            let processes = unsafe { std::os::fd::BorrowedFd::borrow_raw(processes) };
            rustix::io::write(processes, b"0")?;
        }
        set_thread_groups(&[])?;
        set_thread_res_gid(owner.gid, owner.gid, owner.gid)?;
        set_thread_res_uid(owner.uid, owner.uid, owner.uid)?;
        set_no_new_privs(true)?;
        // The command ends with this process. A change of the user resets it.
        set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        Ok(())
    };
    // SAFETY: it makes system calls only, without memory of the heap or a lock.
    unsafe { command.pre_exec(prepare) };
    let child = command
        .spawn()
        .context("cannot start the command in the root")?;
    wait(child, &signals)
}

/// Waits for the end of the command, and passes signals on to it.
fn wait(mut child: Child, signals: &Signals) -> Result<ExitCode> {
    let pid = Pid::from_child(&child);
    let end = pidfd_open(pid, PidfdFlags::empty()).context("cannot wait for the command")?;
    let epoll = Epoll::new()?;
    for fd in [end.as_raw_fd(), signals.as_raw_fd()] {
        epoll.ctl(ControlOperation::Add, fd, EpollEvent::new(EventSet::IN, 0))?;
    }
    loop {
        if let Some(status) = child.try_wait()? {
            return match (status.code(), status.signal()) {
                (Some(code), _) => Ok(ExitCode::from(u8::try_from(code).unwrap_or(1))),
                (None, signal) => bail!("signal {} ended the command", signal.unwrap_or(0)),
            };
        }
        for signal in signals.take() {
            match signal {
                Signal::Terminate => kill_process(pid, rustix::process::Signal::TERM)?,
                Signal::Suspend => kill_process(getpid(), rustix::process::Signal::STOP)?,
                Signal::Continue => kill_process(pid, rustix::process::Signal::CONT)?,
            }
        }
        match epoll.wait(-1, &mut [EpollEvent::default()]) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                return Err(error).context("cannot wait for the command");
            }
            _ => {}
        }
    }
}
