//! Runs the examples of `docs/api.md`: `$ command` lines in `console` blocks, and their output.
//! Blocks marked `running` need a started machine, so they run against a simulated one; the others
//! also run against the real monitor, without starting a machine.
//!
//! Needs `sh` and `curl`.

#[path = "../api/tests/server/support.rs"]
#[allow(dead_code, reason = "the server's own tests use all of it")]
mod support;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};
use support::Machine;

const PROGRAM: &str = env!("CARGO_BIN_EXE_portcullis");

struct Example {
    line: usize,
    running: bool,
    command: String,
    output: String,
}

fn examples() -> Vec<Example> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/api.md");
    let text = std::fs::read_to_string(path).unwrap();
    let mut examples: Vec<Example> = Vec::new();
    let mut block = None;
    let mut continued = false;
    for (number, line) in text.lines().enumerate() {
        let running = match (line, block) {
            ("```console", None) => {
                block = Some(false);
                continue;
            }
            ("```console running", None) => {
                block = Some(true);
                continue;
            }
            ("```", Some(_)) => {
                block = None;
                continue;
            }
            (_, None) => continue,
            (_, Some(running)) => running,
        };
        if let Some(command) = line.strip_prefix("$ ") {
            examples.push(Example {
                line: number + 1,
                running,
                command: command.to_owned(),
                output: String::new(),
            });
            continued = line.ends_with('\\');
            continue;
        }
        let example = examples.last_mut().expect("a block begins with $");
        if continued {
            example.command.push('\n');
            example.command.push_str(line);
            continued = line.ends_with('\\');
        } else {
            example.output.push_str(line);
            example.output.push('\n');
        }
    }
    examples
}

/// Runs one example, and compares its output with the page.
fn check(example: &Example, socket: &Path, directory: &Path) {
    let programs = Path::new(PROGRAM).parent().unwrap();
    let path = std::env::var("PATH").unwrap_or_default();
    let output = Command::new("sh")
        .args(["-c", &format!("exec 2>&1\n{}", example.command)])
        .env("SOCKET", socket)
        .env("PATH", format!("{}:{path}", programs.display()))
        // curl shows its progress when its output is not a terminal.
        .env("CURL_HOME", directory)
        .current_dir(directory)
        .output()
        .expect("sh");
    let printed = String::from_utf8(output.stdout).unwrap();
    assert!(
        matches(&example.output, &printed),
        "docs/api.md:{}: {}\nsays\n{}\nand it printed\n{printed}",
        example.line,
        example.command,
        example.output
    );
}

/// Whether `printed` matches `expected`, where a line `…` matches any lines.
fn matches(expected: &str, printed: &str) -> bool {
    let mut rest = printed;
    for (index, part) in expected.split("…\n").enumerate() {
        match rest.find(part) {
            Some(at) if index > 0 || at == 0 => rest = &rest[at + part.len()..],
            _ => return false,
        }
    }
    rest.is_empty() || expected.ends_with("…\n")
}

/// Creates a directory for the files of the examples, with a quiet configuration of curl.
fn directory(name: &str) -> PathBuf {
    let name = format!("portcullis-docs-{}-{name}", std::process::id());
    let directory = std::env::temp_dir().join(name);
    std::fs::create_dir(&directory).unwrap();
    std::fs::write(directory.join(".curlrc"), "silent\nshow-error\n").unwrap();
    // Files in the examples must exist, and an image has at least one sector.
    for name in ["vmlinuz", "initrd.img", "root.img"] {
        std::fs::write(directory.join(name), [0; 512]).unwrap();
    }
    directory
}

#[test]
fn every_example_prints_the_output_on_the_page() {
    let directory = directory("model");
    let machine = Machine::new(api::Limits::default());
    let examples = examples();
    assert!(examples.len() > 25, "only {} examples", examples.len());
    for example in &examples {
        check(example, &machine.path(), &directory);
    }
    std::fs::remove_dir_all(directory).unwrap();
}

struct Monitor(Child);

impl Drop for Monitor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn examples_that_start_nothing_do_so_with_the_real_monitor() {
    let directory = directory("real");
    let socket = directory.join("api.sock");
    let child = Command::new(PROGRAM)
        .args(["serve", "--log-level", "off", "--api-socket"])
        .arg(&socket)
        .current_dir(&directory)
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let mut monitor = Monitor(child);
    let give_up = Instant::now() + Duration::from_secs(60);
    while !socket.exists() {
        assert!(Instant::now() < give_up, "the monitor serves nothing");
        thread::sleep(Duration::from_millis(10));
    }
    for example in examples().iter().filter(|example| !example.running) {
        check(example, &socket, &directory);
    }
    assert!(directory.join("machine.log").exists() && directory.join("metrics.json").exists());
    let stop = ["ctl", "--api-socket", socket.to_str().unwrap(), "stop"];
    assert!(Command::new(PROGRAM).args(stop).status().unwrap().success());
    assert!(monitor.0.wait().unwrap().success());
    assert!(!socket.exists());
    std::fs::remove_dir_all(directory).unwrap();
}
