//! The monitor continues when a reader of its output (log, metrics, standard error) stops or a file
//! is full. Starts no machine.

use std::fs::OpenOptions;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

const PROGRAM: &str = env!("CARGO_BIN_EXE_portcullis");

/// A monitor that serves an API, and its directory.
struct Monitor {
    child: Child,
    directory: PathBuf,
}

impl Monitor {
    /// Starts `portcullis serve` with `options`, by a shell that runs `limits` first.
    fn start(name: &str, limits: &str, options: &[&str], stderr: Stdio) -> Self {
        let name = format!("portcullis-outputs-{}-{name}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).unwrap();
        let child = Command::new("bash")
            .args(["-c", &format!("{limits}; exec \"$@\""), "bash", PROGRAM])
            .args(["serve", "--api-socket", "socket"])
            .args(options)
            .current_dir(&directory)
            .stdin(Stdio::null())
            .stderr(stderr)
            .spawn()
            .unwrap();
        let mut monitor = Self { child, directory };
        while !monitor.file("socket").exists() {
            assert_eq!(monitor.child.try_wait().unwrap(), None);
            thread::yield_now();
        }
        monitor
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }

    fn ctl(&self, words: &[&str]) -> Output {
        Command::new(PROGRAM)
            .args(["ctl", "--api-socket", "socket"])
            .args(words)
            .current_dir(&self.directory)
            .output()
            .unwrap()
    }

    /// Sends a request that is refused, so that the log gets a line.
    fn refused(&self) {
        let answer = self.ctl(&["PUT", "/vsock", r#"{"guest_cid": 0}"#]);
        assert_eq!(answer.status.code(), Some(1), "{answer:?}");
    }

    fn stop(mut self) {
        let stopped = self.ctl(&["stop"]);
        assert!(stopped.status.success(), "{stopped:?}");
        assert_eq!(self.child.wait().unwrap().code(), Some(0));
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

fn length(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().len()
}

#[test]
fn log_and_metrics_end_at_the_file_size_limit_and_the_monitor_does_not() {
    let options = ["--log-file", "log", "--log-level", "debug"];
    let monitor = Monitor::start("limit", "ulimit -f 1", &options, Stdio::null());
    while length(&monitor.file("log")) < 1024 {
        monitor.refused();
    }
    monitor.refused();
    let metrics = r#"{"metrics_path": "metrics"}"#;
    assert!(monitor.ctl(&["PUT", "/metrics", metrics]).status.success());
    let flush = ["PUT", "/actions", r#"{"action_type": "FlushMetrics"}"#];
    let mut flushed = monitor.ctl(&flush);
    while flushed.status.success() {
        flushed = monitor.ctl(&flush);
    }
    let text = String::from_utf8(flushed.stderr).unwrap();
    assert!(text.contains("File too large"), "{text}");
    assert_eq!(length(&monitor.file("metrics")), 1024);
    monitor.stop();
}

#[test]
fn a_supervisor_that_stops_reading_blocks_nothing() {
    let (reader, writer) = std::io::pipe().unwrap();
    // Filled by the test, so that no line fits.
    let path = format!("/proc/self/fd/{}", writer.as_raw_fd());
    let mut own = OpenOptions::new();
    own.write(true).custom_flags(libc::O_NONBLOCK);
    let mut own = own.open(path).unwrap();
    let mut filled = 0;
    while let Ok(count) = own.write(&[b'x'; 4096]) {
        filled += count;
    }
    let monitor = Monitor::start("full", "true", &[], writer.into());
    for _ in 0..3 {
        monitor.refused();
    }
    // Once the reader continues, a line reports the number of lost lines.
    let mut reader = BufReader::new(reader);
    std::io::copy(&mut (&mut reader).take(filled as u64), &mut std::io::sink()).unwrap();
    monitor.refused();
    let mut line = String::new();
    reader.read_line(&mut line).unwrap();
    assert!(line.contains("3 lines of the log were lost"), "{line}");
    monitor.stop();
}

#[test]
fn a_flood_of_one_line_is_cut_and_counted() {
    let options = ["--log-file", "log"];
    let monitor = Monitor::start("flood", "true", &options, Stdio::null());
    let mut asked: usize = 0;
    let socket = monitor.file("socket");
    // Over the socket itself: more requests than a burst of lines within a second.
    let mut connection = UnixStream::connect(&socket).unwrap();
    let body = r#"{"guest_cid": 0}"#;
    let length = body.len();
    let request = format!("PUT /vsock HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}");
    let mut answers = BufReader::new(connection.try_clone().unwrap());
    for _ in 0..300 {
        connection.write_all(request.as_bytes()).unwrap();
        asked += 1;
        let mut line = String::new();
        while !line.ends_with("}") {
            let mut byte = [0];
            answers.read_exact(&mut byte).unwrap();
            line.push(char::from(byte[0]));
        }
        assert!(line.contains("fault_message"), "{line}");
    }
    drop((connection, answers));
    let log = monitor.file("log");
    let log = std::fs::File::open(log).unwrap();
    monitor.stop();
    let log = std::io::read_to_string(log).unwrap();
    let written = log
        .lines()
        .filter(|line| line.contains("guest_cid"))
        .count();
    let left_out = log.lines().filter_map(|line| {
        let (number, _) = line.split_once(" lines ")?;
        number.split(' ').next_back()?.parse::<usize>().ok()
    });
    let left_out: usize = left_out.sum();
    assert!(left_out > 0, "{log}");
    assert_eq!(written + left_out, asked, "{log}");
}
