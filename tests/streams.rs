//! Standard output and error that are closed, full, or not read change no exit status, and signals
//! that the program was started to ignore stay ignored. No KVM is needed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

const PROGRAM: &str = env!("CARGO_BIN_EXE_portcullis");
const LIMIT: Duration = Duration::from_secs(60);

/// Redirections of a shell command, and a pipe without a reader.
const STREAMS: [&str; 7] = [
    "",
    ">&-",
    "2>&-",
    ">&- 2>&- <&-",
    "> /dev/full",
    "2> /dev/full",
    "> /dev/full 2>&1",
];

/// A directory that is removed when dropped.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let path = env::temp_dir().join(format!("portcullis-{name}-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).into_os_string().into_string().unwrap()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Runs the program with these streams; returns its exit status and its output.
fn run(arguments: &str, streams: &str) -> (Option<i32>, String) {
    let script = format!("{PROGRAM} {arguments} {streams}");
    let output = Command::new("sh")
        .args(["-c", &script])
        .stdin(Stdio::null())
        .output();
    let output = output.unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8(text).unwrap())
}

#[track_caller]
fn has_one_status(arguments: &str, status: i32) {
    for streams in STREAMS {
        let (code, text) = run(arguments, streams);
        assert_eq!(code, Some(status), "{arguments} {streams}: {text}");
        assert!(!text.contains("panicked"), "{arguments} {streams}: {text}");
    }
    // The reader is gone at the first byte, or soon after it.
    let piped =
        format!("{{ sleep 0.1; {PROGRAM} {arguments}; echo status $? >&3; }} 3>&2 2>&1 | :");
    let output = Command::new("sh").args(["-c", &piped]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(text, format!("status {status}\n"), "{arguments}");
}

#[test]
fn streams_that_cannot_be_written_change_no_exit_status() {
    let directory = Directory::new("streams");
    let kernel = directory.path("kernel");
    fs::write(&kernel, "no kernel").unwrap();
    let bad = directory.path("bad.json");
    fs::write(&bad, "{").unwrap();
    has_one_status("--help", 0);
    has_one_status("--version", 0);
    has_one_status("run", 2);
    has_one_status("run --no-such-option", 2);
    has_one_status(&format!("check --config {bad}"), 2);
    has_one_status(&format!("run --kernel {kernel} --log-file /dev/full"), {
        let (code, _) = run(&format!("run --kernel {kernel}"), "");
        code.unwrap()
    });
    has_one_status("ctl --api-socket /nonexistent/socket info", 3);
}

/// A monitor that waits for its API, killed when dropped.
struct Monitor {
    child: Child,
    socket: String,
}

impl Monitor {
    /// Starts the monitor by a shell, after `prefix`.
    fn start(directory: &Directory, prefix: &str, streams: &str) -> Self {
        let socket = directory.path("api.sock");
        let script = format!(
            "{prefix} exec {PROGRAM} serve --api-socket {socket} --log-level trace {streams}"
        );
        let child = Command::new("sh").args(["-c", &script]).spawn().unwrap();
        let mut served = Self { child, socket };
        let deadline = Instant::now() + LIMIT;
        while !Path::new(&served.socket).exists() {
            assert!(Instant::now() < deadline, "there is no socket");
            assert_eq!(served.child.try_wait().unwrap(), None, "it ended");
            thread::sleep(Duration::from_millis(5));
        }
        served
    }

    fn ctl(&self, words: &str) -> String {
        format!("ctl --api-socket {} {words}", self.socket)
    }

    fn signal(&self, name: &str) {
        let number = self.child.id().to_string();
        let kill = Command::new("kill").args(["-s", name, &number]).status();
        assert!(kill.unwrap().success());
    }

    #[track_caller]
    fn ends_with(&mut self, status: i32) {
        let deadline = Instant::now() + LIMIT;
        loop {
            if let Some(ended) = self.child.try_wait().unwrap() {
                assert_eq!(ended.code(), Some(status), "{ended}");
                return;
            }
            assert!(Instant::now() < deadline, "it does not end");
            thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_monitor_and_its_clients_run_without_streams() {
    let directory = Directory::new("served-streams");
    for streams in STREAMS {
        let mut served = Monitor::start(&directory, "", streams);
        for words in ["info", "metrics", "iommu", "GET /vm/config"] {
            has_one_status(&served.ctl(words), 0);
        }
        // A watch ends when its output cannot be written.
        let (code, text) = run(&served.ctl("iommu --watch"), "> /dev/full");
        assert_eq!(code, Some(0), "{text}");
        has_one_status(&served.ctl("start"), 1);
        assert_eq!(run(&served.ctl("stop"), streams).0, Some(0));
        served.ends_with(0);
    }
}

#[test]
fn a_signal_that_was_ignored_at_the_start_stays_ignored() {
    let directory = Directory::new("ignored");
    let mut served = Monitor::start(&directory, "trap '' HUP INT QUIT;", "");
    for name in ["HUP", "INT", "QUIT"] {
        served.signal(name);
        let (code, text) = run(&served.ctl("info"), "");
        assert_eq!(code, Some(0), "after SIG{name}: {text}");
    }
    served.signal("TERM");
    served.ends_with(0);
}
