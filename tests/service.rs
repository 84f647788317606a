//! The monitor as a service of systemd: its unit, its messages to the service manager, the
//! priorities of its lines. Starts no machine.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;
use std::{fs, thread};

const PROGRAM: &str = env!("CARGO_BIN_EXE_portcullis");
/// A message that does not come is a failure, long after any slow host would have sent it.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Values of the keys of the unit's section `[Service]`, in their order.
fn service() -> BTreeMap<String, Vec<String>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("resources/portcullis@.service");
    let text = fs::read_to_string(path).unwrap().replace("\\\n", "");
    let mut keys: BTreeMap<_, Vec<_>> = BTreeMap::new();
    let (_, section) = text.split_once("\n[Service]\n").unwrap();
    for line in section.lines().take_while(|line| !line.starts_with('[')) {
        if let (false, Some((key, value))) = (line.starts_with('#'), line.split_once('=')) {
            keys.entry(key.to_owned())
                .or_default()
                .push(value.to_owned());
        }
    }
    keys
}

#[test]
fn unit_confines_the_service() {
    let service = service();
    for (key, values) in [
        ("Type", &["notify"][..]),
        ("DynamicUser", &["yes"]),
        ("NoNewPrivileges", &["yes"]),
        ("CapabilityBoundingSet", &[""]),
        ("AmbientCapabilities", &[""]),
        ("ProtectSystem", &["strict"]),
        ("DevicePolicy", &["closed"]),
        (
            "DeviceAllow",
            &[
                "/dev/kvm rw",
                "/dev/net/tun rw",
                "/dev/vhost-net rw",
                "/dev/vhost-vsock rw",
            ],
        ),
        // The guest reset.
        ("RestartForceExitStatus", &["3"]),
    ] {
        assert_eq!(
            service.get(key).map(Vec::as_slice),
            Some(&*values.iter().map(ToString::to_string).collect::<Vec<_>>()),
            "{key}"
        );
    }
}

#[test]
fn memory_limit_of_the_unit_is_for_the_default_ram() {
    let limit = &service()["MemoryMax"][0];
    let limit: u32 = limit.strip_suffix('M').unwrap().parse().unwrap();
    let ram = 512;
    assert_eq!(limit, ram + ram / 16 + 32);
}

/// A command line that the program does not accept would only be noticed on a host.
#[test]
fn command_of_the_unit_is_accepted_until_its_file_is_missing() {
    let command = &service()["ExecStart"][0];
    let mut words = command.split_whitespace();
    assert_eq!(words.next(), Some("/usr/bin/portcullis"));
    let output = Command::new(PROGRAM).args(words).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.starts_with("portcullis: /etc/portcullis/%i.json cannot be opened"),
        "{text}"
    );
}

/// A server in a directory of its own.
struct Server {
    child: Child,
    directory: PathBuf,
}

impl Server {
    fn start(name: &str, prepare: impl FnOnce(&mut Command, &Path)) -> Self {
        let name = format!("portcullis-service-{}-{name}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        fs::create_dir(&directory).unwrap();
        let mut command = Command::new(PROGRAM);
        command
            .args(["serve", "--api-socket", "socket"])
            .current_dir(&directory)
            .stdin(Stdio::null());
        prepare(&mut command, &directory);
        let child = command.spawn().unwrap();
        Self { child, directory }
    }

    fn ctl(&self, words: &[&str]) -> bool {
        let mut command = Command::new(PROGRAM);
        command.args(["ctl", "--api-socket", "socket"]).args(words);
        command.current_dir(&self.directory);
        command.output().unwrap().status.success()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_dir_all(&self.directory);
    }
}

fn message(receiver: &UnixDatagram) -> String {
    receiver.set_read_timeout(Some(TIMEOUT)).unwrap();
    let mut bytes = [0; 64];
    let length = receiver.recv(&mut bytes).unwrap();
    String::from_utf8_lossy(&bytes[..length]).into_owned()
}

#[test]
fn service_manager_hears_of_readiness_and_of_the_end() {
    let abstract_name = format!("portcullis-service-{}", std::process::id());
    for is_abstract in [false, true] {
        let mut receiver = None;
        let mut server = Server::start(&format!("notify-{is_abstract}"), |command, directory| {
            let (bound, address) = if is_abstract {
                let address = SocketAddr::from_abstract_name(&abstract_name).unwrap();
                (
                    UnixDatagram::bind_addr(&address),
                    format!("@{abstract_name}").into(),
                )
            } else {
                let path = directory.join("notify");
                (UnixDatagram::bind(&path), path)
            };
            receiver = Some(bound.unwrap());
            command.env("NOTIFY_SOCKET", address);
        });
        let receiver = receiver.unwrap();
        assert_eq!(message(&receiver), "READY=1");
        // Ready means that the API answers.
        assert!(server.ctl(&["info"]));
        assert!(server.ctl(&["stop"]));
        assert_eq!(message(&receiver), "STOPPING=1");
        assert!(server.child.wait().unwrap().success());
    }
}

#[test]
fn lines_have_a_priority_in_the_journal_only() {
    for is_journal in [true, false] {
        let (mut reader, writer) = UnixStream::pair().unwrap();
        let mut server = Server::start(&format!("journal-{is_journal}"), |command, _| {
            let stream = std::os::fd::OwnedFd::from(writer);
            let metadata = fs::File::from(stream.try_clone().unwrap())
                .metadata()
                .unwrap();
            let inode = metadata.ino() + u64::from(!is_journal);
            command.env("JOURNAL_STREAM", format!("{}:{inode}", metadata.dev()));
            command.args(["--log-level", "info"]).stderr(stream);
        });
        while !server.directory.join("socket").exists() {
            assert_eq!(server.child.try_wait().unwrap(), None);
            thread::yield_now();
        }
        assert!(!server.ctl(&["PUT", "/vsock", r#"{"guest_cid": 0}"#]));
        assert!(server.ctl(&["stop"]));
        assert!(server.child.wait().unwrap().success());
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert!(!text.is_empty());
        for line in text.lines() {
            let expected = if is_journal { "<" } else { "[" };
            assert!(line.starts_with(expected), "{line}");
        }
        assert_eq!(text.contains("<6>["), is_journal, "{text}");
    }
}
