//! A guest for a test: launch it, wait for its output, type to it, check its exit status.
//!
//! The environment provides: `PORTCULLIS_BIN` (the program), `PORTCULLIS_GUEST_DIR` (kernels and
//! initramfs), `PORTCULLIS_RETRIES` (a file that gets a line for each repeated boot),
//! `PORTCULLIS_TEST_SECONDS` (time limit of each wait on a quiet machine; 120 when unset),
//! `PORTCULLIS_LONG` (set: larger transfers), `PORTCULLIS_TEST_SANDBOX` (value of `--sandbox` of all
//! machines; a call that `log` lets pass fails the test), `PORTCULLIS_HOST_START_SECONDS` (start
//! time of the emulated host).
#![allow(dead_code, reason = "each test program uses its part")]

pub mod checks;
mod console;
pub mod host;
pub mod iommu;
mod limits;
pub mod pipe;
mod pty;
pub mod refusal;
mod slowness;

use std::env;
use std::ffi::OsStr;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use console::Console;
pub use pty::Pty;

/// Message of the guest's init when it is ready.
pub const READY: &str = "portcullis-guest: ready";
/// Prompt of its shell.
pub const PROMPT: &str = "guest# ";

/// Upper bound on repeated boots. The emulated host is not perfectly reliable; each retry is
/// reported, and a repeated failure fails the test.
const RETRIES: usize = 2;

/// Kernel command line with a console and without most messages: each byte of them costs an exit,
/// and all of them two thirds of a boot in an emulated host.
const QUIET: &str = "console=ttyS0 quiet panic=-1";

/// Guests run one at a time: an emulated host has one processor.
static ONE_GUEST: Mutex<()> = Mutex::new(());

/// Time limit of each wait. Generous: only a hang reaches it.
pub fn time_limit() -> Duration {
    limits::scaled(usual_limit())
}

/// Waits until `is_so` returns true.
#[track_caller]
pub fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + time_limit();
    while !is_so() {
        assert!(Instant::now() < deadline, "never {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Time limit of each wait on a quiet machine.
fn usual_limit() -> Duration {
    let seconds = env::var("PORTCULLIS_TEST_SECONDS").ok();
    Duration::from_secs(seconds.map_or(120, |text| {
        text.parse().expect("PORTCULLIS_TEST_SECONDS is a number")
    }))
}

/// The program under test.
pub fn portcullis() -> PathBuf {
    required("PORTCULLIS_BIN")
}

/// Path of a guest image: a kernel or an initramfs.
pub fn image(name: &str) -> String {
    let path = required("PORTCULLIS_GUEST_DIR").join(name);
    assert!(path.exists(), "there is no guest image {}", path.display());
    path.into_os_string().into_string().expect("a UTF-8 path")
}

fn required(variable: &str) -> PathBuf {
    env::var_os(variable)
        .unwrap_or_else(|| panic!("{variable} is not set; run the boot tests by cargo xtask test"))
        .into()
}

/// The default kernel of tests: the distribution's newest, unchanged.
pub fn kernel() -> String {
    image("vmlinuz-6.12")
}

/// The same kernel in the form that an emulated host boots fastest.
fn unpacked_kernel() -> String {
    image(match env::consts::ARCH {
        "x86_64" => "vmlinux-6.12",
        _ => "vmlinuz-6.12",
    })
}

/// A directory for a test's files, removed when dropped.
pub struct TempDir(PathBuf);

impl TempDir {
    /// Creates an empty directory, unique in this test program.
    pub fn new(name: &str) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("portcullis-{name}-{}-{number}", std::process::id());
        let path = env::temp_dir().join(name);
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path).expect("a directory can be made");
        Self(path)
    }

    /// Path of a file in it.
    pub fn path(&self, name: &str) -> String {
        let path = self.0.join(name);
        path.into_os_string().into_string().expect("a UTF-8 path")
    }

    /// Creates a file in it.
    pub fn file(&self, name: &str, contents: &[u8]) -> String {
        let path = self.path(name);
        fs::write(&path, contents).expect("a file can be written");
        path
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Options of a machine: the default size, kernel and initramfs, and changes to them.
#[derive(Clone, Debug)]
pub struct Machine {
    kernel: String,
    initramfs: String,
    /// `None`: the default one.
    cmdline: Option<String>,
    more: Vec<String>,
}

impl Default for Machine {
    fn default() -> Self {
        Self {
            kernel: unpacked_kernel(),
            initramfs: image("initramfs.cpio"),
            cmdline: Some(QUIET.to_owned()),
            more: Vec::new(),
        }
    }
}

impl Machine {
    /// One processor, the default memory, the default kernel, no messages below warnings.
    pub fn new() -> Self {
        Self::default()
    }

    /// Boots the image `name` instead.
    pub fn kernel(mut self, name: &str) -> Self {
        self.kernel = image(name);
        self
    }

    /// Boots the distribution's newest kernel instead, with tools.
    pub fn newest(mut self) -> Self {
        self.kernel = image("vmlinuz-newest");
        self.initramfs = image("initramfs-newest.cpio");
        self
    }

    /// Uses the initramfs with more tools.
    pub fn tools(mut self) -> Self {
        self.initramfs = image("initramfs-tools.cpio");
        self
    }

    /// Adds an option of `portcullis run` with a value.
    pub fn with(mut self, option: &str, value: impl ToString) -> Self {
        self.more.extend([option.to_owned(), value.to_string()]);
        self
    }

    /// Adds an option of `portcullis run` without a value.
    pub fn flag(mut self, option: &str) -> Self {
        self.more.push(option.to_owned());
        self
    }

    /// Adds `more` to the kernel's command line.
    pub fn cmdline(mut self, more: &str) -> Self {
        self.cmdline = Some(format!("{QUIET} {more}"));
        self
    }

    /// Omits `--cmdline`, so that `portcullis` uses its default.
    pub fn default_cmdline(mut self) -> Self {
        self.cmdline = None;
        self
    }

    /// Arguments of `portcullis` for this machine.
    pub fn arguments(&self) -> Vec<String> {
        let fixed = ["run", "--kernel", &self.kernel, "--initrd", &self.initramfs];
        let mut arguments: Vec<String> = fixed.map(str::to_owned).into();
        if let Some(cmdline) = &self.cmdline {
            arguments.extend(["--cmdline".to_owned(), cmdline.clone()]);
        }
        arguments.extend(self.more.iter().cloned());
        if let Ok(mode) = env::var("PORTCULLIS_TEST_SANDBOX") {
            arguments.extend(["--sandbox".to_owned(), mode]);
        }
        arguments
    }

    /// Starts the machine with pipes for a console.
    pub fn launch(&self) -> Guest {
        Guest::launch(&self.arguments())
    }

    /// Starts the machine and waits for its shell; retries a few times.
    pub fn boot(&self) -> Guest {
        let mut guest = self.boot_by(|| self.launch());
        guest.quieten();
        guest
    }

    /// Starts the machine by `launch` and waits for its shell; retries a few times.
    pub fn boot_by(&self, launch: impl Fn() -> Guest) -> Guest {
        self.boot_until(&[READY, PROMPT], usual_limit(), launch)
    }

    /// Starts the machine by `launch` and waits for all of `marks` in its output, each within
    /// `limit` on a quiet machine; retries a few times.
    pub fn boot_until(&self, marks: &[&str], limit: Duration, launch: impl Fn() -> Guest) -> Guest {
        for _ in 0..RETRIES {
            let mut guest = launch();
            if marks.iter().all(|mark| guest.reaches(mark, limit)) {
                return guest;
            }
            report_retry(&format!("{self:?}"), &guest.console.text());
        }
        let mut guest = launch();
        for mark in marks {
            guest.wait_for_within(limit, mark);
        }
        guest
    }
}

/// Reports a retry in a file and at once on the error stream, past the captured output of the test,
/// so that a failing guest does not look like a hung host. The whole console goes to the test's
/// output.
fn report_retry(machine: &str, console: &str) {
    let line = format!("boot failed, trying again: {machine}");
    say_now(&line);
    eprintln!("{line}\n{console}");
    if let Some(path) = env::var_os("PORTCULLIS_RETRIES") {
        let report = OpenOptions::new().create(true).append(true).open(path);
        let line = format!("boot tried again: {machine}\n");
        let written = report.and_then(|mut file| file.write_all(line.as_bytes()));
        written.expect("a retry can be reported");
    }
}

/// Writes a line past the captured output of tests.
pub fn say_now(line: &str) {
    let written = io::stderr().write_all(format!("\n{line}\n").as_bytes());
    written.expect("the error stream can be written");
}

/// Waits until no other guest runs, and then measures the host's slowness.
fn alone() -> MutexGuard<'static, ()> {
    limits::show_life();
    let alone = ONE_GUEST.lock().unwrap_or_else(PoisonError::into_inner);
    limits::measure();
    alone
}

/// Input of a test to the console.
enum Keyboard {
    Pipe(Option<io::PipeWriter>),
    Terminal,
}

/// A running `portcullis`. Killed when dropped.
pub struct Guest {
    child: Child,
    console: Console,
    log: Console,
    keyboard: Keyboard,
    terminal: Option<Pty>,
    commands: u32,
    _alone: MutexGuard<'static, ()>,
}

impl Guest {
    /// Runs `portcullis` with pipes for its console.
    pub fn launch<S: AsRef<OsStr>>(arguments: &[S]) -> Self {
        let mut command = Command::new(portcullis());
        command.args(arguments);
        Self::launch_piped(command)
    }

    /// Runs `command`, which executes `portcullis`, with pipes for its console.
    pub fn launch_piped(mut command: Command) -> Self {
        let (stdin, keyboard) = io::pipe().expect("a pipe");
        command.stdin(stdin);
        Self::start(command, Keyboard::Pipe(Some(keyboard)))
    }

    /// The same by a program with its arguments, which executes `portcullis`.
    pub fn launch_by<S: AsRef<OsStr>>(by: &[&str], arguments: &[S]) -> Self {
        let (stdin, keyboard) = io::pipe().expect("a pipe");
        let (program, options) = by.split_first().expect("a program");
        let mut command = Command::new(program);
        command.args(options).arg(portcullis());
        command.args(arguments).stdin(stdin);
        Self::start(command, Keyboard::Pipe(Some(keyboard)))
    }

    /// Runs `command`, which executes `portcullis`, with its own standard input and pipes for the
    /// output.
    pub fn launch_command(command: Command) -> Self {
        Self::start(command, Keyboard::Pipe(None))
    }

    /// Kills the process and its process group.
    fn kill(&mut self) {
        let group = format!("kill -KILL -{}", self.child.id());
        // The process may have ended, or lead no group.
        let _ = Command::new("sh")
            .args(["-c", &group])
            .stderr(Stdio::null())
            .status();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    fn start(mut command: Command, keyboard: Keyboard) -> Self {
        let alone = alone();
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command.process_group(0);
        let mut child = command.spawn().expect("portcullis can be started");
        let stdout = child.stdout.take().expect("its output is a pipe");
        let stderr = child.stderr.take().expect("its log is a pipe");
        Self {
            child,
            console: Console::collect(OwnedFd::from(stdout)),
            log: Console::collect(OwnedFd::from(stderr)),
            keyboard,
            terminal: None,
            commands: 0,
            _alone: alone,
        }
    }

    /// Runs `program` in its own session on a new terminal, as a terminal window does for a shell.
    pub fn launch_on_terminal<S: AsRef<OsStr>>(program: &Path, arguments: &[S]) -> Self {
        let alone = alone();
        let terminal = Pty::open().expect("a pseudo-terminal");
        let slave = || Stdio::from(terminal.slave().expect("its other side"));
        let mut command = Command::new("setsid");
        // In place: this process leads no group, so that setsid need not fork.
        command.arg("-c").arg(program).args(arguments);
        command.stdin(slave()).stdout(slave()).stderr(slave());
        let child = command.spawn().expect("setsid can be started");
        let output = terminal.output().expect("the terminal can be read");
        Self {
            child,
            console: Console::collect(output),
            log: Console::empty(),
            keyboard: Keyboard::Terminal,
            terminal: Some(terminal),
            commands: 0,
            _alone: alone,
        }
    }

    /// Process ID of the monitor.
    pub fn process_id(&self) -> u32 {
        self.child.id()
    }

    /// The terminal of [`Guest::launch_on_terminal`].
    pub fn terminal(&self) -> &Pty {
        self.terminal.as_ref().expect("it has a terminal")
    }

    /// Waits for `text` in the console output after the last match.
    #[track_caller]
    pub fn wait_for(&mut self, text: &str) -> &mut Self {
        self.wait_for_within(usual_limit(), text)
    }

    /// The same with another time limit: `limit` on a quiet machine.
    #[track_caller]
    pub fn wait_for_within(&mut self, limit: Duration, text: &str) -> &mut Self {
        if !self.reaches(text, limit) {
            panic!(
                "the guest did not say {text:?}; its console:\n{}\nits log:\n{}",
                self.console.text(),
                self.log.text()
            );
        }
        self
    }

    fn reaches(&mut self, text: &str, limit: Duration) -> bool {
        self.console.find(text, limits::scaled(limit)).is_some()
    }

    /// Keeps kernel messages, except for a panic, off the console.
    pub fn quieten(&mut self) {
        self.run("dmesg -n 1");
    }

    /// Types text without a newline.
    #[track_caller]
    pub fn type_text(&mut self, text: &str) -> &mut Self {
        let typed = match (&mut self.keyboard, &mut self.terminal) {
            (Keyboard::Pipe(Some(pipe)), _) => pipe.write_all(text.as_bytes()),
            (Keyboard::Terminal, Some(terminal)) => terminal.type_text(text),
            _ => panic!("there is no keyboard"),
        };
        typed.expect("the guest's keyboard can be typed on");
        self
    }

    /// Types text and the key that ends a line.
    #[track_caller]
    pub fn type_line(&mut self, line: &str) -> &mut Self {
        self.type_text(&format!("{line}\n"))
    }

    /// Closes its standard input.
    pub fn close_keyboard(&mut self) -> &mut Self {
        self.keyboard = Keyboard::Pipe(None);
        self
    }

    /// Runs a command in the guest's shell, which must succeed, and returns its trimmed output.
    #[track_caller]
    pub fn run(&mut self, command: &str) -> String {
        self.run_within(usual_limit(), command)
    }

    /// The same for a command with another time limit: `limit` on a quiet machine.
    #[track_caller]
    pub fn run_within(&mut self, limit: Duration, command: &str) -> String {
        let (status, output) = self.try_run_within(limit, command);
        assert_eq!(status, 0, "{command} failed: {output}");
        output
    }

    /// Starts a command in the guest's background, without output.
    #[track_caller]
    pub fn in_background(&mut self, command: &str) {
        self.run(&format!(
            "{{ ( {command} ) > /dev/null 2>&1 < /dev/null & }}"
        ));
    }

    /// Runs a command in the guest's shell. Returns its exit status and output.
    #[track_caller]
    pub fn try_run(&mut self, command: &str) -> (u8, String) {
        self.try_run_within(usual_limit(), command)
    }

    #[track_caller]
    fn try_run_within(&mut self, limit: Duration, command: &str) -> (u8, String) {
        self.commands += 1;
        let number = self.commands;
        // The shell's echo of the line has the words apart, so that it does not match the end mark.
        self.type_line(&format!(
            "echo '[begin' '{number}]'; {command}; echo '[end' \"{number} $?]\""
        ));
        self.wait_for(&format!("[begin {number}]"));
        let limit = limits::scaled(limit);
        let output = self.console.find(&format!("[end {number} "), limit);
        let output = output.unwrap_or_else(|| {
            panic!(
                "{command} does not end; the console:\n{}\nthe log:\n{}",
                self.console.text(),
                self.log.text()
            )
        });
        let status = self.console.find("]", time_limit()).expect("its status");
        let status = status.parse().expect("a status is a number");
        self.wait_for(PROMPT);
        (status, output.replace('\r', "").trim().to_owned())
    }

    /// The log so far; empty with [`Guest::launch_on_terminal`].
    pub fn log(&self) -> String {
        self.log.text()
    }

    /// The console output so far.
    pub fn console_output(&self) -> String {
        self.console.text()
    }

    /// Sends a signal by its name, such as `TERM`.
    pub fn signal(&mut self, name: &str) -> &mut Self {
        signal(self.child.id(), name);
        self
    }

    /// Waits for the end of the process, which must have this exit status, and of its output.
    #[track_caller]
    pub fn expect_exit(&mut self, status: i32) {
        let deadline = Instant::now() + time_limit();
        let ended = loop {
            if let Some(ended) = self.child.try_wait().expect("it can be waited for") {
                break ended;
            }
            if Instant::now() > deadline {
                panic!("it does not end; its console:\n{}", self.console.text());
            }
            thread::sleep(Duration::from_millis(20));
        };
        // A process can end before its last output is read.
        let console = self.console.whole(time_limit());
        let log = self.log.whole(time_limit());
        assert_eq!(
            ended.code(),
            Some(status),
            "its end: {ended}; its console:\n{console}\nits log:\n{log}"
        );
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Only a failed test leaves a process to kill.
        self.kill();
        for text in [self.log.text(), self.console.text()] {
            let passed = text.contains("makes the forbidden system call");
            assert!(!passed || thread::panicking(), "{text}");
        }
    }
}

/// Sends a signal by its name, such as `TERM`.
pub fn signal(process: u32, name: &str) {
    let mut kill = Command::new("kill");
    kill.args([format!("-{name}"), process.to_string()]);
    assert!(kill.status().expect("kill can be started").success());
}

/// Exit status and output of a `portcullis` that starts no guest.
#[derive(Debug)]
pub struct ProgramOutput {
    /// Exit status.
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// Runs a command to its end, with an empty standard input.
pub fn run_to_end(command: &mut Command) -> ProgramOutput {
    let output = command.stdin(Stdio::null()).output();
    let output = output.expect("portcullis can be started");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("it says UTF-8");
    ProgramOutput {
        status: output.status.code(),
        stdout: text(output.stdout),
        stderr: text(output.stderr),
    }
}
