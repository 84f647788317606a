//! `portcullis run` creates its API socket before the machine. No KVM is needed.

use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::{env, fs};

fn run(kernel: &str, socket: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_portcullis"))
        .args(["run", "--kernel", kernel, "--api-socket", socket])
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

/// Creates a file that is not a kernel: the machine is built, and fails.
fn no_kernel(name: &str) -> PathBuf {
    let path = env::temp_dir().join(format!("portcullis-{name}-{}", std::process::id()));
    fs::write(&path, "no kernel").unwrap();
    path
}

#[test]
fn no_guest_runs_whose_socket_cannot_be_made() {
    let kernel = no_kernel("unbound");
    let output = run(kernel.to_str().unwrap(), "/nonexistent/api.sock");
    fs::remove_file(&kernel).unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("/nonexistent/api.sock"), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
}

#[test]
fn the_socket_of_a_machine_that_cannot_be_built_is_removed() {
    let kernel = no_kernel("bound");
    let socket = kernel.with_extension("sock");
    let output = run(kernel.to_str().unwrap(), socket.to_str().unwrap());
    fs::remove_file(&kernel).unwrap();
    assert!(!output.status.success(), "{output:?}");
    assert!(!socket.exists());
}
