//! The host's part of a test: commands, tap devices, files for disks. Needs root.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::limits;

/// Runs a shell command on the host, which must succeed, and returns its trimmed output.
pub fn run(command: &str) -> String {
    let (status, output) = try_run(command);
    assert!(
        status == 0,
        "on the host, `{command}` ended with {status}:\n{output}"
    );
    output
}

/// Runs a shell command on the host and returns its exit status and trimmed output.
pub fn try_run(command: &str) -> (i32, String) {
    let output = Command::new("sh")
        .args(["-c", &format!("exec 2>&1\n{command}")])
        .stdin(Stdio::null())
        .output()
        .expect("the host has a shell");
    let text = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    (output.status.code().unwrap_or(-1), text)
}

/// A program running on the host; killed when dropped.
pub struct Job {
    child: Child,
    what: String,
}

impl Job {
    /// Starts `command`, which is one program without a shell around it.
    pub fn start(command: &str) -> Self {
        let mut words = command.split_whitespace();
        let program = words.next().expect("a command has a first word");
        let child = Command::new(program)
            .args(words)
            .stdin(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("cannot start `{command}` on the host: {error}"));
        Self {
            child,
            what: command.to_owned(),
        }
    }

    /// Number of the process.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits until it ends by itself with success; `limit` is for a quiet machine.
    pub fn finish(mut self, limit: Duration) {
        let deadline = Instant::now() + limits::scaled(limit);
        loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                assert!(
                    status.success(),
                    "`{}` on the host ended: {status}",
                    self.what
                );
                return;
            }
            assert!(
                Instant::now() < deadline,
                "`{}` on the host did not end",
                self.what
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Whether the program still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }
}

impl Drop for Job {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A tap device on the host, with an address in its own network; removed when dropped.
pub struct Tap {
    /// Name of the tap device.
    pub name: String,
    net: u8,
}

impl Tap {
    /// Creates a tap device with `queues` queues. The host's address on it is 10.9.NET.1; `net` is
    /// unique among the taps.
    pub fn create(name: &str, queues: u16, net: u8) -> Self {
        let multi_queue = if queues > 1 { "multi_queue" } else { "" };
        run(&format!(
            "ip tuntap add {name} mode tap vnet_hdr {multi_queue}"
        ));
        Self::configure(name, net)
    }

    /// Configures the address of an existing tap device and brings it up.
    pub fn configure(name: &str, net: u8) -> Self {
        let tap = Self {
            name: name.to_owned(),
            net,
        };
        run(&format!(
            "ip address add {}/24 dev {name} && ip link set {name} up",
            tap.host_address()
        ));
        tap
    }

    /// Number of packets that the host received from the guest.
    pub fn received(&self) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/rx_packets", self.name);
        let text = std::fs::read_to_string(&path).expect("a tap has statistics");
        text.trim().parse().expect("a number of packets")
    }

    /// IPv4 address of the host on this tap.
    pub fn host_address(&self) -> String {
        format!("10.9.{}.1", self.net)
    }

    /// IPv4 address for the guest, with `last` as its last number.
    pub fn guest_address(&self, last: u8) -> String {
        format!("10.9.{}.{last}", self.net)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        try_run(&format!("ip link delete {}", self.name));
    }
}

/// Makes a sparse file.
pub fn sparse(path: &str, mebibytes: u64) {
    File::create(path)
        .and_then(|file| file.set_len(mebibytes << 20))
        .unwrap_or_else(|error| panic!("cannot make {path}: {error}"));
}

/// Copies a file, with holes in place of its zeros.
pub fn sparse_copy(from: &str, to: &str) {
    let copied = copy_but_zeros(from, to);
    copied.unwrap_or_else(|error| panic!("cannot copy {from} to {to}: {error}"));
}

fn copy_but_zeros(from: &str, to: &str) -> io::Result<()> {
    const PIECE: usize = 64 << 10;
    let (zeros, mut piece) = (vec![0; PIECE], vec![0; PIECE]);
    let (mut from, to) = (File::open(from)?, File::create(to)?);
    let mut at = 0;
    loop {
        let count = from.read(&mut piece)?;
        if count == 0 {
            return to.set_len(at);
        }
        if piece[..count] != zeros[..count] {
            to.write_all_at(&piece[..count], at)?;
        }
        at += u64::try_from(count).expect("a piece is small");
    }
}

/// Shell command, in one line, that fills a file with noise: a few MiB of random bytes are
/// repeated, each time after a different number of other bytes, so that a misplaced piece changes
/// the checksum.
pub fn noise(path: &str, mebibytes: u32) -> String {
    format!(
        "dd if=/dev/urandom of={path}.seed bs=1M count=4 2>/dev/null; \
         for i in $(seq 1 {mebibytes}); do printf %0${{i}}d $i; cat {path}.seed; done | \
         dd of={path} bs=1M count={mebibytes} iflag=fullblock 2>/dev/null; rm {path}.seed"
    )
}

/// Checksum of a host file.
pub fn checksum(path: &str) -> String {
    let text = run(&format!("md5sum < {path}"));
    text.split_whitespace()
        .next()
        .unwrap_or_default()
        .to_owned()
}
