//! A host that refuses a system call, as a kernel without it does.
#![allow(unsafe_code, reason = "the host is a system call filter")]

use std::ffi::c_long;
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use libc::sock_filter;

/// Makes the call `number` of `command` and of what it starts fail with `error`.
pub fn refuse(command: &mut Command, number: c_long, error: i32) {
    let instruction = |code, to_false, value| sock_filter {
        code,
        jt: 0,
        jf: to_false,
        k: value,
    };
    let value = |number| u32::try_from(number).expect("a small number");
    let error = value(error.into());
    // bpf(2): loads the number, compares it, and returns an action.
    let mut program = [
        instruction(0x20, 0, 0),
        instruction(0x15, 1, value(number)),
        instruction(0x06, 0, libc::SECCOMP_RET_ERRNO | error),
        instruction(0x06, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let install = move || {
        let program = libc::sock_fprog {
            len: 4,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: prctl(2) takes four arguments more, and reads the program only.
        let installed = unsafe {
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(
                    libc::PR_SET_SECCOMP,
                    libc::SECCOMP_MODE_FILTER,
                    &raw const program,
                    0,
                    0,
                ) == 0
        };
        match installed {
            true => Ok(()),
            false => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: two system calls, which are safe after fork(2).
    unsafe { command.pre_exec(install) };
}
