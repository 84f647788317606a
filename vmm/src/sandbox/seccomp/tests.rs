//! Each filter in a process of its own, which a violation may end.

use std::process::{Command, Output};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};

use rustix::thread::set_no_new_privs;

use super::*;

/// Tells the child its kind of thread, the mode and what to do.
const TASK: &str = "PORTCULLIS_TEST_CONFINED";

#[derive(Clone, Copy, Debug)]
enum Call {
    Permitted,
    Execve,
    Socket,
    OpenFile,
    MapCode,
    KillAnother,
    OtherIoctl,
}

const CALLS: [Call; 7] = [
    Call::Permitted,
    Call::Execve,
    Call::Socket,
    Call::OpenFile,
    Call::MapCode,
    Call::KillAnother,
    Call::OtherIoctl,
];

fn run_child(kind: ThreadKind, mode: Sandbox, call: Call) -> Output {
    let mut child = Command::new(std::env::current_exe().unwrap());
    child.args(["--exact", "sandbox::seccomp::tests::child", "--nocapture"]);
    let index = ThreadKind::ALL.iter().position(|known| *known == kind);
    child.env(TASK, format!("{} {mode} {}", index.unwrap(), call as usize));
    child.output().unwrap()
}

/// Runs in the child process only.
#[test]
fn child() {
    let Ok(task) = std::env::var(TASK) else {
        return;
    };
    let parts: Vec<&str> = task.split(' ').collect();
    let kind = ThreadKind::ALL[parts[0].parse::<usize>().unwrap()];
    let mode = parts[1].parse().unwrap();
    let call = CALLS[parts[2].parse::<usize>().unwrap()];
    crate::logger::start();
    set_no_new_privs(true).unwrap();
    prepare(mode).unwrap();
    let thread = std::thread::Builder::new().name("confined".into());
    let (passed, done) = channel();
    let thread = thread.spawn(move || {
        enter(kind, mode).unwrap();
        make(call);
        passed.send(()).unwrap();
    });
    done.recv().unwrap();
    thread.unwrap().join().unwrap();
    // The other thread of `--sandbox log` writes its line after the call.
    std::thread::sleep(std::time::Duration::from_millis(50));
    std::process::exit(7);
}

fn make(call: Call) {
    match call {
        Call::Permitted => {
            permitted();
        }
        Call::Execve => {
            let none = [std::ptr::null()];
            // SAFETY: both lists end with a null; the program does not exist.
            unsafe { libc::execve(c"/nonexistent".as_ptr(), none.as_ptr(), none.as_ptr()) };
        }
        Call::Socket => drop(std::net::UdpSocket::bind("127.0.0.1:0")),
        Call::OpenFile => {
            let error = std::fs::File::open("/etc/passwd").unwrap_err();
            assert_eq!(error.raw_os_error(), Some(libc::EACCES));
        }
        Call::MapCode => {
            let (protection, flags) = (
                libc::PROT_READ | libc::PROT_EXEC,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            );
            // SAFETY: a new mapping, which is not accessed.
            unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) };
        }
        Call::KillAnother => {
            // SAFETY: signal 0 is not delivered.
            unsafe { libc::syscall(libc::SYS_tgkill, 1, 1, 0) };
        }
        Call::OtherIoctl => {
            let mut bytes: libc::c_int = 0;
            // SAFETY: FIONREAD writes the int that the pointer is to.
            unsafe { libc::ioctl(0, libc::FIONREAD, &raw mut bytes) };
        }
    }
}

/// Allocates, locks, logs and reads the clock.
fn permitted() {
    let kept: Vec<Vec<u8>> = (0..200).map(|size| vec![1; size * 1000]).collect();
    let mut grown = Vec::new();
    for size in 0..1 << 20 {
        grown.push(size);
    }
    drop((kept, grown));
    let map: std::collections::HashMap<u32, u32> = (0..100).zip(0..100).collect();
    let shared = Arc::new(Mutex::new(map));
    assert_eq!(shared.lock().unwrap().len(), 100);
    log::warn!("a line of a confined thread");
    assert!(std::time::Instant::now().elapsed().as_secs() < 60);
}

#[track_caller]
fn assert_ended(output: &Output, call: &str) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(EXIT_STATUS), "{text}");
    let line = format!("portcullis: thread confined made the forbidden system call {call} (");
    assert_eq!(text.matches(&line).count(), 1, "{text}");
}

#[test]
fn forbidden_calls_of_every_kind_end_the_process_with_a_line() {
    for kind in ThreadKind::ALL {
        assert_ended(&run_child(kind, Sandbox::On, Call::Execve), "execve");
        assert_ended(&run_child(kind, Sandbox::On, Call::OtherIoctl), "ioctl");
    }
    let vcpu = |call| run_child(ThreadKind::Vcpu, Sandbox::On, call);
    assert_ended(&vcpu(Call::Socket), "socket");
    assert_ended(&vcpu(Call::MapCode), "mmap");
    assert_ended(&vcpu(Call::KillAnother), "tgkill");
}

#[test]
fn permitted_calls_pass_in_every_kind_and_mode() {
    for kind in ThreadKind::ALL {
        for mode in [Sandbox::On, Sandbox::Log] {
            let output = run_child(kind, mode, Call::Permitted);
            let text = String::from_utf8_lossy(&output.stderr);
            assert_eq!(output.status.code(), Some(7), "{kind:?} {mode}: {text}");
            assert!(text.contains("a line of a confined thread"), "{text}");
            assert!(!text.contains("forbidden"), "{kind:?} {mode}: {text}");
        }
    }
}

#[test]
fn files_are_refused_outside_the_event_loop_and_end_nothing() {
    for kind in ThreadKind::ALL {
        if kind != ThreadKind::EventLoop {
            let output = run_child(kind, Sandbox::On, Call::OpenFile);
            assert_eq!(output.status.code(), Some(7), "{kind:?} {output:?}");
        }
    }
}

#[test]
fn log_mode_makes_the_call_and_logs_it_once() {
    for kind in ThreadKind::ALL {
        let output = run_child(kind, Sandbox::Log, Call::Socket);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(7), "{kind:?}: {text}");
        let line = "thread confined makes the forbidden system call socket (";
        assert_eq!(text.matches(line).count(), 1, "{kind:?}: {text}");
    }
}

#[test]
fn filters_are_small_enough_for_the_kernel() {
    for kind in ThreadKind::ALL {
        let length = filter(kind).unwrap().len();
        assert!((100..400).contains(&length), "{kind:?}: {length}");
    }
}
