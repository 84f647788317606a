//! `portcullis jail`, without a machine. The tests need root and namespaces, and do nothing without.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;

const PROGRAM: &str = env!("CARGO_BIN_EXE_portcullis");
/// User and group of the jailed command.
const OWNER: u32 = 64_321;

/// Directory of one test, with an empty `root`.
struct Place(PathBuf);

impl Place {
    /// `None` where the host does not let the test make a jail.
    fn new(name: &str) -> Option<Self> {
        let possible = Command::new("unshare")
            .args(["--mount", "--pid", "true"])
            .status();
        if !possible.is_ok_and(|status| status.success()) {
            return None;
        }
        let name = format!("portcullis-jail-{}-{name}", std::process::id());
        let path = std::env::temp_dir().join(name);
        fs::create_dir_all(path.join("root")).unwrap();
        Some(Self(path))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// `portcullis jail` with `options`, around `words`.
    fn jail(&self, options: &[&str], words: &[&str]) -> Command {
        let mut command = Command::new(PROGRAM);
        let owner = OWNER.to_string();
        command.args(["jail", "--root", "root", "--uid", &owner, "--gid", &owner]);
        command.args(options).arg("--").args(words);
        command.current_dir(&self.0).stdin(Stdio::null());
        command
    }

    fn root_is_empty(&self) -> bool {
        entries(&self.path("root")).is_empty()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A jailed server; its socket is `run/vm.sock` in the root.
struct Server<'a> {
    place: &'a Place,
    jail: Child,
}

impl<'a> Server<'a> {
    fn start(place: &'a Place, options: &[&str]) -> Self {
        let mut command = place.jail(options, &["serve", "--api-socket", "/run/vm.sock"]);
        let mut jail = command.spawn().unwrap();
        while !place.path("root/run/vm.sock").exists() {
            assert_eq!(jail.try_wait().unwrap(), None);
            thread::yield_now();
        }
        Self { place, jail }
    }

    /// Directory of the command in `/proc`.
    fn command(&self) -> PathBuf {
        let jail = self.jail.id();
        let children = fs::read_to_string(format!("/proc/{jail}/task/{jail}/children")).unwrap();
        Path::new("/proc").join(children.trim())
    }

    fn ctl(&self, words: &[&str]) -> Output {
        let mut command = Command::new(PROGRAM);
        let socket = self.place.path("root/run/vm.sock");
        command
            .arg("ctl")
            .arg("--api-socket")
            .arg(socket)
            .args(words);
        command.output().unwrap()
    }
}

impl Drop for Server<'_> {
    fn drop(&mut self) {
        let _ = self.jail.kill();
        let _ = self.jail.wait();
    }
}

fn entries(directory: &Path) -> BTreeSet<String> {
    let entries = fs::read_dir(directory).unwrap();
    let names = entries.map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).collect()
}

fn error_of(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr)
        .trim_end()
        .to_owned()
}

#[test]
fn command_has_a_root_of_its_own_and_no_privilege() {
    let Some(place) = Place::new("root") else {
        return;
    };
    let mut server = Server::start(&place, &[]);
    let command = server.command();
    let status = fs::read_to_string(command.join("status")).unwrap();
    let field = |name: &str| {
        let mut lines = status.lines();
        let value = lines.find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
        value
            .unwrap()
            .split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    for name in ["Uid", "Gid"] {
        assert_eq!(field(name), vec![OWNER.to_string(); 4]);
    }
    assert!(field("Groups").is_empty());
    assert_eq!(field("CapEff"), ["0000000000000000"]);
    assert_eq!(field("NoNewPrivs"), ["1"]);
    assert_eq!(field("NSpid").last().unwrap(), "1");
    for namespace in ["mnt", "pid", "ipc", "uts"] {
        let of = |process: &Path| fs::read_link(process.join("ns").join(namespace)).unwrap();
        assert_ne!(of(&command), of(Path::new("/proc/self")), "{namespace}");
    }

    let root = command.join("root");
    let devices = ["kvm", "net", "vhost-net", "vhost-vsock"].map(str::to_owned);
    assert!(entries(&root.join("dev")).is_subset(&devices.into()));
    if Path::new("/dev/kvm").exists() {
        let node = fs::metadata(root.join("dev/kvm")).unwrap();
        assert_eq!(node.rdev(), fs::metadata("/dev/kvm").unwrap().rdev());
        assert_eq!((node.uid(), node.mode() & 0o7777), (OWNER, 0o600));
    }
    for absent in ["etc", "proc", "sys", "home"] {
        assert!(!root.join(absent).exists(), "{absent}");
    }
    // The root is read-only, for root too.
    let error = fs::write(root.join("file"), "").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);

    let info = server.ctl(&["info"]);
    assert!(info.status.success(), "{info:?}");
    assert!(server.ctl(&["stop"]).status.success());
    assert!(server.jail.wait().unwrap().success());
    assert!(place.root_is_empty());
}

#[test]
fn signal_to_the_jail_ends_the_command_which_removes_its_socket() {
    let Some(place) = Place::new("signal") else {
        return;
    };
    let mut server = Server::start(&place, &[]);
    let id = server.jail.id().to_string();
    assert!(Command::new("kill").arg(&id).status().unwrap().success());
    assert!(server.jail.wait().unwrap().success());
    assert!(place.root_is_empty());
}

#[test]
fn named_files_are_at_their_paths_and_what_the_command_writes_stays() {
    let Some(place) = Place::new("files") else {
        return;
    };
    for name in ["kernel", "disk"] {
        fs::write(place.path(name), [b'x'; 4096]).unwrap();
        fs::set_permissions(place.path(name), fs::Permissions::from_mode(0o644)).unwrap();
    }
    let config = r#"{"boot-source": {"kernel_image_path": "kernel"}}"#;
    fs::write(place.path("vm.json"), config).unwrap();
    let words = [
        "run",
        "--config",
        "vm.json",
        "--disk",
        "path=disk,readonly=on",
        "--log-file",
        "log/file",
        "--log-level",
        "debug",
    ];
    fs::create_dir(place.path("log")).unwrap();
    let outside = Command::new(PROGRAM)
        .args(words)
        .current_dir(&place.0)
        .output()
        .unwrap();
    let inside = place.jail(&[], &words).output().unwrap();
    // Both open the files, and refuse the kernel for what is in it.
    assert_eq!(error_of(&inside), error_of(&outside));
    assert_eq!(inside.status.code(), outside.status.code());
    assert!(error_of(&inside).contains("kernel"), "{inside:?}");
    let below = place.0.strip_prefix("/").unwrap();
    let log = place.path("root").join(below).join("log");
    assert_eq!(entries(&log), ["file".to_owned()].into());
    assert_eq!(fs::metadata(log.join("file")).unwrap().uid(), OWNER);
    // The files over which others were mounted are gone.
    assert_eq!(entries(log.parent().unwrap()), ["log".to_owned()].into());
}

#[test]
fn input_and_output_may_share_a_directory() {
    let Some(place) = Place::new("shared") else {
        return;
    };
    fs::write(place.path("vm.json"), "{}").unwrap();
    fs::set_permissions(place.path("vm.json"), fs::Permissions::from_mode(0o644)).unwrap();
    let words = ["serve", "--config", "vm.json", "--api-socket", "vm.sock"];
    let mut jail = place.jail(&[], &words).spawn().unwrap();
    let below = place.path("root").join(place.0.strip_prefix("/").unwrap());
    while !below.join("vm.sock").exists() {
        assert_eq!(jail.try_wait().unwrap(), None);
        thread::yield_now();
    }
    let id = jail.id().to_string();
    assert!(Command::new("kill").arg(&id).status().unwrap().success());
    assert!(jail.wait().unwrap().success());
    assert!(place.root_is_empty());
}

#[test]
fn failure_is_one_line_and_leaves_nothing() {
    let Some(place) = Place::new("failure") else {
        return;
    };
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let serve = ["serve", "--api-socket", "/run/vm.sock"];
    for (options, words, expected) in [
        (
            &[][..],
            &["run", "--kernel", "absent"][..],
            "cannot find absent: No such file",
        ),
        (
            &[],
            &["run", "--kernel", "../k"],
            "../k: a jailed command's paths have no \"..\"",
        ),
        (
            &[],
            &["check", "--config", "x"],
            "unrecognized subcommand 'check'",
        ),
        (
            &[],
            &["serve"],
            "the following required arguments were not provided",
        ),
        (
            &["--netns", "/nowhere"],
            &serve,
            "--netns: cannot enter /nowhere: No such file",
        ),
        (&["--id", "a/b"], &serve, "--id has 1 to 64 letters"),
        (&["--cgroup", "memory.max=1G"], &serve, "--id <ID>"),
        (
            &["--id", "a", "--cgroup", "../x=1"],
            &serve,
            "FILE is CONTROLLER.NAME",
        ),
        (
            &["--parent-cgroup", "../a"],
            &serve,
            "--parent-cgroup is a relative path",
        ),
        (
            &["--resource-limit", "core=1"],
            &serve,
            "use fsize=BYTES or no-file=NUMBER",
        ),
    ] {
        let output = place.jail(options, words).output().unwrap();
        let text = error_of(&output);
        assert!(!output.status.success());
        assert!(text.contains(expected), "{text}");
        assert_eq!(text.lines().count(), 1, "{text}");
        assert!(place.root_is_empty(), "{text}");
    }
    assert_eq!(fs::read_to_string("/proc/self/mounts").unwrap(), mounts);
}

#[test]
fn links_that_a_command_left_are_not_followed() {
    let Some(place) = Place::new("links") else {
        return;
    };
    fs::create_dir(place.path("precious")).unwrap();
    symlink(place.path("precious"), place.path("root/run")).unwrap();
    let output = place
        .jail(&[], &["serve", "--api-socket", "/run/vm.sock"])
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert!(
        error_of(&output).contains("cannot make /run beneath --root"),
        "{output:?}"
    );
    assert_eq!(fs::metadata(place.path("precious")).unwrap().uid(), 0);
    assert!(entries(&place.path("precious")).is_empty());
}

#[test]
fn limits_are_those_of_the_command() {
    let Some(place) = Place::new("limits") else {
        return;
    };
    // A name alone makes no control group: it needs no host that has them.
    let server = Server::start(&place, &["--id", "a", "--resource-limit", "no-file=77"]);
    let limits = fs::read_to_string(server.command().join("limits")).unwrap();
    let line = limits
        .lines()
        .find(|line| line.starts_with("Max open files"));
    let values: Vec<_> = line.unwrap().split_whitespace().collect();
    assert_eq!(values[3..5], ["77", "77"]);
}
