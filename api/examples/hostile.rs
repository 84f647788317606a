//! Opens two thousand invalid connections to a running machine.
//!
//!     hostile SOCKET PID [CONNECTIONS]
//!
//! PID is the monitor's. Each connection must be answered or closed. The machine must be in the
//! same state afterwards, and its monitor at most a megabyte larger.

#[path = "../tests/server/bytes.rs"]
mod bytes;

use api::client;
use proptest::strategy::{Strategy, ValueTree};
use proptest::test_runner::TestRunner;
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

const TIMEOUT: Duration = Duration::from_secs(60);

/// Upper bound on the growth of the monitor, in KiB.
const GROWTH: u64 = 1024;

fn main() {
    let mut arguments = std::env::args().skip(1);
    let socket = arguments.next().expect("SOCKET");
    let socket = Path::new(&socket);
    let monitor: u32 = arguments.next().expect("PID").parse().unwrap();
    let connections: u32 = arguments.next().map_or(2000, |text| text.parse().unwrap());

    let state = ask(socket, "/");
    let mut runner = TestRunner::deterministic();
    let strategy = bytes::hostile_bytes();
    let mut answers: BTreeMap<String, u32> = BTreeMap::new();
    let mut before = 0;
    for number in 0..connections {
        let bytes = strategy.new_tree(&mut runner).unwrap().current();
        for status in converse(socket, &bytes) {
            *answers.entry(status).or_default() += 1;
        }
        // The first tenth allocates what is kept afterwards.
        if number == connections / 10 {
            before = resident_kib(monitor);
        }
    }
    let after = resident_kib(monitor);
    for (status, count) in &answers {
        println!("{count:>6} x {status}");
    }
    println!("{connections} connections; resident: {before} KiB, then {after} KiB");
    assert_eq!(ask(socket, "/"), state, "the machine's state has changed");
    assert!(after < before + GROWTH, "the monitor has grown");
}

/// Sends `bytes`, reads to the end, and returns the status lines of the answers.
fn converse(socket: &Path, bytes: &[u8]) -> Vec<String> {
    let mut stream = UnixStream::connect(socket).expect("the socket is served");
    stream.set_read_timeout(Some(TIMEOUT)).unwrap();
    stream.set_write_timeout(Some(TIMEOUT)).unwrap();
    let mut reader = stream.try_clone().unwrap();
    let reader = std::thread::spawn(move || {
        let mut answer = Vec::new();
        match reader.read_to_end(&mut answer) {
            Err(error) if error.kind() != ErrorKind::ConnectionReset => {
                panic!("neither answered nor closed: {error}")
            }
            _ => answer,
        }
    });
    // The server may close before it has read all bytes.
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let answer = reader.join().expect("an answer or a close");
    let text = String::from_utf8_lossy(&answer);
    assert!(answer.is_empty() || text.starts_with("HTTP/1.1 "), "{text}");
    let lines = text.lines().filter(|line| line.starts_with("HTTP/1.1 "));
    lines.map(|line| line[9..].to_owned()).collect()
}

fn ask(socket: &Path, target: &str) -> String {
    let answer = client::request(socket, ("GET", target), None, TIMEOUT).expect("an answer");
    assert_eq!(answer.status, 200);
    String::from_utf8(answer.body).unwrap()
}

fn resident_kib(pid: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:"));
    let number = line.unwrap().split_whitespace().nth(1);
    number.unwrap().parse().unwrap()
}
