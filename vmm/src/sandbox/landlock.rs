//! Landlock: what a thread may open, connect to and signal after its
//! confinement. Open files stay usable.
//!
//! A domain belongs to a thread, so that each thread enters its own. Rights
//! that the kernel's ABI does not have are left out.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, Erratum, LandlockStatus, PathBeneath, Ruleset,
    RulesetAttr, RulesetCreated, RulesetCreatedAttr as _, RulesetError, RulesetStatus, Scope,
};

/// The newest ABI whose rights are denied.
const NEWEST: ABI = ABI::V10;

/// Error of a step of the confinement.
#[derive(Debug, thiserror::Error)]
pub enum LandlockError {
    /// The kernel has no landlock, or it is switched off.
    #[error(
        "the kernel has no landlock (Linux 5.13, CONFIG_SECURITY_LANDLOCK, and landlock in the \
         kernel parameter lsm); enable it, or give --sandbox off"
    )]
    Missing,
    /// A directory that stays accessible cannot be opened.
    #[error("{} cannot be opened as a directory; create it, or name another one", .0.display())]
    Directory(PathBuf, #[source] io::Error),
    /// The kernel refused the rules.
    #[error("landlock refused the rules")]
    Refused(#[source] RulesetError),
}

impl From<RulesetError> for LandlockError {
    fn from(error: RulesetError) -> Self {
        Self::Refused(error)
    }
}

/// Directories that stay accessible to the event loop.
#[derive(Debug, Default)]
pub struct Directories(Vec<Directory>);

#[derive(Debug)]
struct Directory {
    path: PathBuf,
    /// Opened with `O_PATH`.
    file: File,
    access: BitFlags<AccessFs>,
}

impl Directories {
    /// Keeps `path` accessible for the files of log and metrics: opening and
    /// creating regular files, and opening FIFOs, which are opened for reading
    /// too.
    ///
    /// # Errors
    /// It is no directory, or cannot be opened.
    pub fn allow_files(&mut self, path: &Path) -> Result<(), LandlockError> {
        let access = AccessFs::ReadFile | AccessFs::WriteFile | AccessFs::MakeReg;
        self.allow(path, access)
    }

    /// Keeps `path` accessible for the removal of a socket in it.
    ///
    /// # Errors
    /// See [`Self::allow_files`].
    pub fn allow_removal(&mut self, path: &Path) -> Result<(), LandlockError> {
        self.allow(path, AccessFs::RemoveFile.into())
    }

    fn allow(&mut self, path: &Path, access: BitFlags<AccessFs>) -> Result<(), LandlockError> {
        let path = match path {
            // The parent of a path without a slash.
            empty if empty.as_os_str().is_empty() => Path::new("."),
            path => path,
        };
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        let opened = File::options().read(true).custom_flags(flags).open(path);
        let file = opened.map_err(|error| LandlockError::Directory(path.to_owned(), error))?;
        let path = path.to_owned();
        self.0.push(Directory { path, file, access });
        Ok(())
    }

    /// The directories in which files can be opened, for an error's text.
    pub fn of_files(&self) -> impl Iterator<Item = &Path> {
        let directories = self.0.iter();
        directories
            .filter(|directory| directory.access.contains(AccessFs::WriteFile))
            .map(|directory| directory.path.as_path())
    }
}

/// Denies the calling thread every path, network access and signal to another
/// process, as far as the kernel's ABI has a right for it.
///
/// # Errors
/// The kernel has no landlock, or refuses.
pub fn deny_all() -> Result<(), LandlockError> {
    restrict(&Directories::default()).map(|_| ())
}

/// Calls [`deny_all`], except for `directories`. Returns the ABI that is in
/// use, for the log.
///
/// # Errors
/// The kernel has no landlock, or refuses.
pub fn restrict(directories: &Directories) -> Result<ABI, LandlockError> {
    let mut rules = rules()?;
    for directory in &directories.0 {
        rules = rules.add_rule(PathBeneath::new(directory.file.as_fd(), directory.access))?;
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
    use std::fs;
    use std::net::{TcpListener, TcpStream};
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener};
    use std::thread;
    use vmm_sys_util::tempdir::TempDir;
    use vmm_sys_util::tempfile::TempFile;

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
        directories.allow_files(inside.as_path()).unwrap();
        assert_eq!(
            directories.of_files().collect::<Vec<_>>(),
            [inside.as_path()]
        );
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
        directories.allow_removal(directory.as_path()).unwrap();
        assert_eq!(directories.of_files().count(), 0);
        confined(&directories, |_| {
            assert!(denied(File::open(&file)));
            fs::remove_file(&socket).unwrap();
        });
    }

    #[test]
    fn missing_directory_is_named() {
        let mut directories = Directories::default();
        let file = TempFile::new().unwrap();
        for path in [Path::new("/nowhere/else"), file.as_path()] {
            let error = directories.allow_files(path).unwrap_err().to_string();
            let expected = format!("{} cannot be opened as a directory; ", path.display());
            assert!(error.starts_with(&expected), "{error}");
        }
        directories.allow_files(Path::new("")).unwrap();
        assert_eq!(directories.of_files().collect::<Vec<_>>(), [Path::new(".")]);
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
