//! Command lines of the real program that start no machine.

use std::fs;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;

const PROGRAM: &str = env!("CARGO_BIN_EXE_portcullis");

/// A directory of one test, in which the program runs.
struct Directory(PathBuf);

impl Directory {
    fn new(name: &str) -> Self {
        let name = format!("portcullis-{name}-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        command.args(words).current_dir(&self.0);
        command.stdin(Stdio::null());
        command.env_remove("PORTCULLIS_API_SOCKET");
        command
    }

    #[track_caller]
    fn file(&self, name: &str, text: &str) {
        fs::write(self.0.join(name), text).unwrap();
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// `portcullis serve`, killed when dropped.
struct Server(Child);

impl Server {
    fn start(directory: &Directory) -> Self {
        let mut command = directory.command(&["serve", "--api-socket", "socket"]);
        let mut server = Self(command.spawn().unwrap());
        while !directory.0.join("socket").exists() {
            assert_eq!(server.0.try_wait().unwrap(), None);
            thread::yield_now();
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[track_caller]
fn refuses(output: &Output, status: i32, words: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{text}");
    assert_eq!(text.lines().count(), 1, "{text}");
    for word in words {
        assert!(text.contains(word), "no {word:?} in {text}");
    }
}

#[test]
fn check_fails_where_an_image_is_missing() {
    let directory = Directory::new("check");
    directory.file("kernel", "");
    directory.file(
        "machine.json",
        r#"{"boot-source": {"kernel_image_path": "kernel"},
            "drives": [{"drive_id": "data", "path_on_host": "missing.img"}]}"#,
    );
    let mut check = directory.command(&["check", "--config", "machine.json"]);
    let words = [
        "machine.json: drives[data].path_on_host: missing.img",
        "No such file",
    ];
    refuses(&check.output().unwrap(), 2, &words);
}

#[test]
fn ctl_finds_the_socket_by_its_option_on_either_side_and_in_the_environment() {
    let directory = Directory::new("ctl");
    let server = Server::start(&directory);
    for words in [
        ["ctl", "--api-socket", "socket", "info"],
        ["ctl", "info", "--api-socket", "socket"],
    ] {
        let output = directory.command(&words).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
    let info = |socket| {
        let mut command = directory.command(&["ctl", "info"]);
        command.env("PORTCULLIS_API_SOCKET", socket);
        command.output().unwrap()
    };
    let output = info("socket");
    assert!(output.status.success(), "{output:?}");
    directory.file("file", "");
    refuses(&info("file"), 3, &["file is not a socket"]);
    refuses(&info("missing"), 3, &["no machine is at missing"]);
    drop(server);
}
