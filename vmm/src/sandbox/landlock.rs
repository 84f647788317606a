//! Landlock: what a thread may open, connect to and signal after its
//! confinement. Open files stay usable.
//!
//! A domain belongs to a thread, so that each thread enters its own. Rights
//! that the kernel's ABI does not have are left out.

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, Erratum, LandlockStatus, PathBeneath, Ruleset,
    RulesetAttr as _, RulesetCreated, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};

use super::directories::{Directories, Purpose};

/// The newest ABI whose rights are denied.
const NEWEST: ABI = ABI::V10;

/// Error of a step of the confinement.
#[derive(Debug, thiserror::Error)]
pub(super) enum LandlockError {
    /// The kernel has no landlock, or it is switched off.
    #[error(
        "the kernel has none, or has it switched off (Linux 5.13 with CONFIG_SECURITY_LANDLOCK, \
         and landlock in the kernel parameter lsm)"
    )]
    Missing,
    /// The kernel refused the rules.
    #[error("the kernel refused the rules")]
    Refused(#[source] RulesetError),
}

impl From<RulesetError> for LandlockError {
    fn from(error: RulesetError) -> Self {
        Self::Refused(error)
    }
}

/// Denies the calling thread every path, network access and signal to another
/// process, as far as the kernel's ABI has a right for it.
///
/// # Errors
/// The kernel has no landlock, or refuses.
pub(super) fn deny_all() -> Result<(), LandlockError> {
    restrict(&Directories::default()).map(|_| ())
}

/// Calls [`deny_all`], except for `directories`. Returns the ABI that is in
/// use, for the log.
///
/// # Errors
/// The kernel has no landlock, or refuses.
pub(super) fn restrict(directories: &Directories) -> Result<ABI, LandlockError> {
    let mut rules = rules()?;
    for (directory, purpose) in directories.opened() {
        let access = match purpose {
            // A FIFO is opened for reading too.
            Purpose::Files => AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::MakeReg,
            Purpose::Removal => AccessFs::RemoveFile.into(),
        };
        rules = rules.add_rule(PathBeneath::new(directory, access))?;
    }
    let status = rules.restrict_self()?;
    match status.landlock {
        LandlockStatus::Available { effective_abi, .. }
            if status.ruleset != RulesetStatus::NotEnforced =>
        {
            Ok(effective_abi)
        }
        _ => Err(LandlockError::Missing),
    }
}

fn rules() -> Result<RulesetCreated, RulesetError> {
    let rules = Ruleset::default()
        .handle_access(AccessFs::from_all(NEWEST))?
        .handle_access(AccessNet::from_all(NEWEST))?
        .scope(Scope::AbstractUnixSocket)?;
    // Without this fix, a thread cannot signal the process's other threads: the
    // vCPUs would not be stopped.
    let rules = match Erratum::current().contains(Erratum::ScopedSignalHandling) {
        true => rules.scope(Scope::Signal)?,
        false => rules,
    };
    rules.create()
}

#[cfg(test)]
mod tests {
    use super::*;
    use devices::host_file;
    use std::fs::{self, File};
    use std::io;
    use std::net::{TcpListener, TcpStream};
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
    use std::thread;
    use vmm_sys_util::tempdir::TempDir;

    /// Runs `test` on a thread of its own, whose domain ends with it. Without
    /// landlock the kernel cannot run it.
    fn confined(directories: &Directories, test: impl FnOnce(ABI) + Send) {
        thread::scope(|scope| {
            let run = scope.spawn(|| match restrict(directories) {
                Ok(abi) => test(abi),
                Err(LandlockError::Missing) => {}
                Err(error) => panic!("{error}"),
            });
            run.join().unwrap();
        });
    }

    fn denied<T>(outcome: io::Result<T>) -> bool {
        outcome.is_err_and(|error| matches!(error.raw_os_error(), Some(libc::EACCES | libc::EPERM)))
    }

    #[test]
    fn nothing_is_opened_or_made_by_path() {
        let directory = TempDir::new().unwrap();
        let file = directory.as_path().join("file");
        fs::write(&file, "text").unwrap();
        let open = File::options().append(true).open(&file).unwrap();
        confined(&Directories::default(), |_| {
            assert!(denied(File::open("/etc/passwd")));
            assert!(denied(File::open("/proc/self/mem")));
            assert!(denied(fs::read_dir("/")));
            assert!(denied(File::open(&file)));
            assert!(denied(fs::remove_file(&file)));
            assert!(denied(fs::write(directory.as_path().join("new"), "")));
            assert!(denied(fs::create_dir(directory.as_path().join("new"))));
            assert!(denied(UnixListener::bind(directory.as_path().join("s"))));
            assert!(denied(std::process::Command::new("/bin/true").status()));
            io::Write::write_all(&mut &open, b" and more").unwrap();
        });
        assert_eq!(fs::read_to_string(&file).unwrap(), "text and more");
    }

    #[test]
    fn files_of_an_allowed_directory_are_opened_and_made() {
        let outside = TempDir::new().unwrap();
        let inside = TempDir::new().unwrap();
        let log = inside.as_path().join("log");
        fs::write(outside.as_path().join("file"), "").unwrap();
        fs::create_dir(inside.as_path().join("below")).unwrap();
        std::os::unix::fs::symlink(
            outside.as_path().join("file"),
            inside.as_path().join("link"),
        )
        .unwrap();
        let mut directories = Directories::default();
        directories.allow(inside.as_path(), Purpose::Files).unwrap();
        confined(&directories, |_| {
            host_file::open_output(&log).unwrap();
            host_file::open_output(&log).unwrap();
            host_file::open_output(&inside.as_path().join("below/log")).unwrap();
            assert!(host_file::open_output(&outside.as_path().join("file")).is_err());
            assert!(host_file::open_output(&inside.as_path().join("link")).is_err());
            let out = format!("../{}", outside.as_path().file_name().unwrap().display());
            assert!(host_file::open_output(&inside.as_path().join(out).join("file")).is_err());
            assert!(denied(fs::remove_file(&log)));
            assert!(denied(fs::rename(&log, inside.as_path().join("other"))));
            assert!(denied(fs::create_dir(inside.as_path().join("new"))));
        });
    }

    #[test]
    fn socket_is_removed_from_its_directory_which_gives_nothing_else() {
        let directory = TempDir::new().unwrap();
        let socket = directory.as_path().join("s");
        let _listener = UnixListener::bind(&socket).unwrap();
        let file = directory.as_path().join("file");
        fs::write(&file, "").unwrap();
        let mut directories = Directories::default();
        directories
            .allow(directory.as_path(), Purpose::Removal)
            .unwrap();
        confined(&directories, |_| {
            assert!(denied(File::open(&file)));
            fs::remove_file(&socket).unwrap();
        });
    }

    #[test]
    fn network_and_abstract_sockets_are_denied_by_newer_kernels() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let name = SocketAddr::from_abstract_name(format!("landlock-{}", std::process::id()));
        let name = name.unwrap();
        let _receiver = UnixDatagram::bind_addr(&name).unwrap();
        let sender = UnixDatagram::unbound().unwrap();
        let connected = UnixDatagram::unbound().unwrap();
        connected.connect_addr(&name).unwrap();
        confined(&Directories::default(), |abi| {
            assert_eq!(denied(TcpStream::connect(address)), abi >= ABI::V4);
            assert_eq!(denied(sender.send_to_addr(b"x", &name)), abi >= ABI::V6);
            connected.send(b"x").unwrap();
        });
    }

    #[test]
    fn threads_of_the_process_are_signalled_and_others_only_without_the_scope() {
        use rustix::process::{Signal, getpid, test_kill_process};
        // Process 1 is of another domain; as root it may be signalled.
        let allowed = test_kill_process(rustix::process::Pid::INIT).is_ok();
        confined(&Directories::default(), |_| {
            // SIGCONT of a process that runs does nothing.
            rustix::process::kill_process(getpid(), Signal::CONT).unwrap();
            let scoped = Erratum::current().contains(Erratum::ScopedSignalHandling);
            let init = test_kill_process(rustix::process::Pid::INIT);
            assert_eq!(init.is_ok(), allowed && !scoped);
        });
    }
}
