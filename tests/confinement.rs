//! The monitor on a host that refuses a step of its confinement. Starts no machine.

#[path = "support/refusal.rs"]
mod refusal;

use std::process::{Command, Stdio};

use refusal::refuse;

const PROGRAM: &str = env!("CARGO_BIN_EXE_portcullis");

/// `portcullis serve` without the call `number`: its exit status and standard error.
fn serve_without(number: libc::c_long, error: i32) -> (Option<i32>, String) {
    let socket = format!("portcullis-{}-{number}.sock", std::process::id());
    let socket = std::env::temp_dir().join(socket);
    let mut command = Command::new(PROGRAM);
    command.arg("serve").arg("--api-socket").arg(&socket);
    refuse(command.stdin(Stdio::null()), number, error);
    let output = command.output().unwrap();
    assert!(!socket.exists(), "{}", socket.display());
    let text = String::from_utf8_lossy(&output.stderr)
        .trim_end()
        .to_owned();
    (output.status.code(), text)
}

#[test]
fn step_that_the_host_refuses_ends_the_process_with_its_name_and_the_option() {
    for (number, error, step) in [
        (
            libc::SYS_close_range,
            libc::ENOSYS,
            "closing inherited descriptors",
        ),
        (
            libc::SYS_landlock_create_ruleset,
            libc::ENOSYS,
            "denying access by landlock",
        ),
        (
            libc::SYS_landlock_create_ruleset,
            libc::EOPNOTSUPP,
            "denying access by landlock",
        ),
        (
            libc::SYS_landlock_restrict_self,
            libc::E2BIG,
            "denying access by landlock",
        ),
        (libc::SYS_capset, libc::EPERM, "dropping the capabilities"),
        (
            libc::SYS_seccomp,
            libc::ENOSYS,
            "filtering system calls by seccomp",
        ),
        (
            libc::SYS_seccomp,
            libc::EINVAL,
            "filtering system calls by seccomp",
        ),
    ] {
        let (status, text) = serve_without(number, error);
        assert_eq!(status, Some(1), "{step}: {text}");
        assert_eq!(text.lines().count(), 1, "{step}: {text}");
        let line = format!(
            "cannot confine the process: {step} is not possible; `--sandbox off` runs the machine \
             without confinement: "
        );
        assert!(text.contains(&line), "{text}");
    }
}
