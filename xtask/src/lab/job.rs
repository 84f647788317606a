//! A job of the lab.

use std::path::PathBuf;
use std::time::Duration;

use crate::arch::Arch;
use crate::cpio::Archive;

/// A command to run in the lab.
pub struct Job {
    /// Architecture of the emulated host.
    pub arch: Arch,
    /// Number of its processors.
    pub cpus: u8,
    /// Its memory in MiB.
    pub memory_mib: u32,
    /// Time from power-on to the end of the command.
    pub timeout: Duration,
    /// Longest silence of the command, after which the host counts as hung.
    pub silence: Option<Duration>,
    /// Seed of an emulated host whose clock counts instructions; `None`: it follows real time.
    pub virtual_time: Option<u32>,
    /// `timeout` and `silence` are those of a quiet machine: a host that starts slower has more.
    pub scaled: bool,
    /// Programs for /portcullis/bin, which is in PATH, each with its name there.
    pub programs: Vec<(String, PathBuf)>,
    /// Files appended to the initramfs of the emulated host.
    pub files: Archive,
    /// An initramfs segment appended to those of the guests.
    pub guest_tools: Option<PathBuf>,
    /// Directory copied to /share; the command's changes in it are copied back.
    pub share: Option<PathBuf>,
    /// Command and arguments; a shell when empty.
    pub command: Vec<String>,
    /// Connect the command with the terminal.
    pub interactive: bool,
    /// Label at the start of each line of output, which distinguishes two labs.
    pub label: String,
}

impl Job {
    /// Creates a job with defaults with which the architecture is reliable.
    pub fn new(arch: Arch) -> Job {
        Job {
            arch,
            // With more than one the emulated x86_64 host itself crashes now and then, and the
            // aarch64 one takes a quarter more processor time for the same work.
            cpus: 1,
            memory_mib: 4096,
            timeout: Duration::from_secs(600),
            silence: None,
            virtual_time: None,
            scaled: false,
            programs: Vec::new(),
            files: Archive::default(),
            guest_tools: None,
            share: None,
            command: Vec::new(),
            interactive: false,
            label: String::new(),
        }
    }

    /// Prints a line of the lab itself.
    pub fn say(&self, text: &str) {
        eprintln!("{}lab: {text}", self.label);
    }
}
