//! The socket's file: accessible to its owner only from its creation, never taken from a running
//! server, taken over from a dead one, removed when its server ends.

use crate::client::{MAX_PATH, check_length, connect};
use std::fs::{self, DirBuilder, File, Permissions};
use std::io::{self, ErrorKind};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Upper bound on attempts when another process races for the same path.
const ATTEMPTS: u32 = 8;

/// Timeout of a connection to a server with a full queue, which then counts as running.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Error of [`Socket::bind`].
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A process accepts connections at the path.
    #[error(
        "another process serves {0}; stop it (portcullis ctl --api-socket {0} stop) or choose another path"
    )]
    InUse(PathBuf),
    /// The path names a file that is not a socket.
    #[error("{0} exists and is not a socket; remove it or choose another path")]
    NotASocket(PathBuf),
    /// The path exceeds the kernel's socket address.
    #[error(
        "the path of a socket has 1 to {MAX_PATH} bytes and this one has {0}; use a shorter one"
    )]
    PathLength(usize),
    /// The host refused a step.
    #[error("cannot {step} {path}")]
    Host {
        /// What failed, as in the error's text.
        step: &'static str,
        /// Path of the step.
        path: PathBuf,
        /// Error of the host.
        source: io::Error,
    },
    /// Other processes created and removed the path repeatedly.
    #[error("{0} keeps changing hands; choose another path")]
    Contended(PathBuf),
}

/// A listening socket that is removed from the file system when dropped.
pub struct Socket {
    listener: UnixListener,
    path: PathBuf,
    inode: (u64, u64),
}

impl Socket {
    /// Creates a socket at `path` to which only this user can connect. A relative path stays
    /// relative, so that the process must not change its directory while it serves.
    ///
    /// # Errors
    /// A running server uses `path`, another file is there, or the host refuses.
    pub fn bind(path: &Path) -> Result<Self, BindError> {
        check_length(path).map_err(BindError::PathLength)?;
        for _ in 0..ATTEMPTS {
            let listener = match bind_hidden(path) {
                Ok(bound) => bound,
                Err(BindError::Host { source, .. })
                    if source.kind() == ErrorKind::AlreadyExists =>
                {
                    clear_stale(path)?;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let inode = fs::symlink_metadata(path)
                .map(|metadata| inode_of(&metadata))
                .map_err(|source| host("look at", path, source))?;
            return Ok(Self {
                listener,
                path: path.to_owned(),
                inode,
            });
        }
        Err(BindError::Contended(path.to_owned()))
    }

    /// The listener, for the poll loop.
    pub(crate) fn listener(&self) -> &UnixListener {
        &self.listener
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        // Only this socket: another process may have taken over the path.
        let ours = fs::symlink_metadata(&self.path)
            .is_ok_and(|metadata| inode_of(&metadata) == self.inode);
        if ours && let Err(error) = fs::remove_file(&self.path) {
            log::warn!("cannot remove {}: {error}", self.path.display());
        }
    }
}

/// Binds in a directory that only the owner can enter, sets the mode there, and links the socket to
/// `path` in one step that fails if the path exists. So no other user can connect at any moment,
/// and the process's umask, which other threads share, does not change.
fn bind_hidden(path: &Path) -> Result<UnixListener, BindError> {
    let directory = hidden_directory(path)?;
    let inner = directory.join("s");
    let bound = bind_within(&directory, &inner)
        .map_err(|source| host("make a socket for", path, source))
        .and_then(|listener| {
            fs::set_permissions(&inner, Permissions::from_mode(0o600))
                .map_err(|source| host("restrict", path, source))?;
            fs::hard_link(&inner, path).map_err(|source| host("make", path, source))?;
            listener
                .set_nonblocking(true)
                .map_err(|source| host("set up", path, source))?;
            Ok(listener)
        });
    // A directory that stays is empty and private; the outcome above matters more.
    let _ = fs::remove_file(&inner);
    let _ = fs::remove_dir(&directory);
    bound
}

/// Binds to `inner` in `directory`, by a shorter path where its own exceeds the address: the name
/// of the directory may be longer than the socket's.
fn bind_within(directory: &Path, inner: &Path) -> io::Result<UnixListener> {
    if check_length(inner).is_ok() {
        return UnixListener::bind(inner);
    }
    let opened = File::open(directory)?;
    let name = inner.file_name().unwrap_or_default();
    let through = PathBuf::from(format!("/proc/self/fd/{}", opened.as_raw_fd()));
    UnixListener::bind(through.join(name))
}

fn hidden_directory(path: &Path) -> Result<PathBuf, BindError> {
    let parent = path.parent().unwrap_or(Path::new(""));
    let mut number = std::process::id();
    for _ in 0..ATTEMPTS {
        let directory = parent.join(format!(".p{number:x}"));
        match DirBuilder::new().mode(0o700).create(&directory) {
            Ok(()) => return Ok(directory),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                number = number.wrapping_mul(31).wrapping_add(1);
            }
            Err(source) => return Err(host("make a socket in the directory of", path, source)),
        }
    }
    Err(BindError::Contended(path.to_owned()))
}

/// Removes the socket at `path` if no process accepts connections there.
fn clear_stale(path: &Path) -> Result<(), BindError> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(host("look at", path, source)),
    };
    if !metadata.file_type().is_socket() {
        return Err(BindError::NotASocket(path.to_owned()));
    }
    match connect(path, CONNECT_TIMEOUT) {
        Some(Err(error)) if error.kind() == ErrorKind::ConnectionRefused => {}
        Some(Err(error)) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Some(Ok(_)) | None => return Err(BindError::InUse(path.to_owned())),
        Some(Err(source)) => return Err(host("find out who serves", path, source)),
    }
    // Another process may have replaced it since the connection attempt.
    let unchanged =
        fs::symlink_metadata(path).is_ok_and(|now| inode_of(&now) == inode_of(&metadata));
    if unchanged {
        fs::remove_file(path).map_err(|source| host("remove the stale socket", path, source))?;
    }
    Ok(())
}

fn inode_of(metadata: &fs::Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

fn host(step: &'static str, path: &Path, source: io::Error) -> BindError {
    BindError::Host {
        step,
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;
    use std::os::unix::net::UnixStream;
    use vmm::error::Chain;

    #[test]
    fn the_socket_is_for_its_owner_and_leaves_nothing_behind() {
        let directory = Directory::new();
        let path = directory.path().join("api.sock");
        let socket = Socket::bind(&path).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert!(metadata.file_type().is_socket());
        assert_eq!(metadata.permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        UnixStream::connect(&path).unwrap();
        drop(socket);
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_live_socket_is_not_taken_over() {
        let directory = Directory::new();
        let path = directory.path().join("api.sock");
        let _socket = Socket::bind(&path).unwrap();
        let error = Socket::bind(&path).err().unwrap();
        assert!(matches!(error, BindError::InUse(_)), "{error}");
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_stale_socket_is_replaced() {
        let directory = Directory::new();
        let path = directory.path().join("api.sock");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _socket = Socket::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_not_a_socket_is_left_alone() {
        let directory = Directory::new();
        let path = directory.path().join("precious");
        fs::write(&path, "data").unwrap();
        let error = Socket::bind(&path).err().unwrap();
        assert!(matches!(error, BindError::NotASocket(_)), "{error}");
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
    }

    #[test]
    fn only_its_own_socket_is_removed() {
        let directory = Directory::new();
        let path = directory.path().join("api.sock");
        let old = Socket::bind(&path).unwrap();
        fs::remove_file(&path).unwrap();
        let _new = Socket::bind(&path).unwrap();
        drop(old);
        assert!(path.exists());
    }

    #[test]
    fn paths_of_every_length_an_address_has_are_bound_and_longer_ones_are_refused() {
        let directory = Directory::new();
        let base = directory.path().as_os_str().len() + 1;
        for length in [base + 1, 90, 95, 96, 97, 98, 99, 100, 105, 106, 107] {
            let path = directory.path().join("n".repeat(length - base));
            assert_eq!(path.as_os_str().len(), length);
            let socket = Socket::bind(&path).unwrap();
            UnixStream::connect(&path).unwrap();
            drop(socket);
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
        }
        for length in [0, 108, 200, 5000] {
            let error = Socket::bind(Path::new(&"n".repeat(length))).err().unwrap();
            let text = error.to_string();
            assert!(text.contains(&format!("this one has {length};")), "{text}");
        }
    }

    #[test]
    fn a_missing_directory_is_named() {
        let error = Socket::bind(Path::new("/nonexistent/api.sock"));
        let text = Chain(&error.err().unwrap()).to_string();
        assert!(text.contains("/nonexistent/api.sock"), "{text}");
        assert_eq!(text.matches("No such file").count(), 1, "{text}");
    }
}
