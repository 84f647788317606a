//! Directories that stay accessible to the event loop of a confined process.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use crate::config::{ConfigError, VmConfig};

/// Purpose for which a directory stays accessible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// Opening and creating the files of log and metrics.
    Files,
    /// Removing the API socket.
    Removal,
}

/// Directories, each with its purpose.
#[derive(Debug, Default)]
pub struct Directories(Vec<Directory>);

#[derive(Debug)]
struct Directory {
    path: PathBuf,
    /// Opened with `O_PATH`.
    file: File,
    purpose: Purpose,
}

impl Directories {
    /// Adds the directory `path`, unless it is present.
    ///
    /// # Errors
    /// It is no directory, or cannot be opened.
    pub fn allow(&mut self, path: &Path, purpose: Purpose) -> io::Result<()> {
        let mut known = self.0.iter();
        if known.any(|known| known.path == path && known.purpose == purpose) {
            return Ok(());
        }
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_CLOEXEC;
        let file = File::options().read(true).custom_flags(flags).open(path)?;
        let path = path.to_owned();
        let directory = Directory {
            path,
            file,
            purpose,
        };
        self.0.push(directory);
        Ok(())
    }

    /// Adds the directory of the file `path`.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn allow_beside(&mut self, path: &Path, purpose: Purpose) -> io::Result<()> {
        let directory = match path.parent() {
            Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
            Some(parent) => parent,
            None => path,
        };
        self.allow(directory, purpose)
    }

    /// Adds the directories that `config` names, and those of its log and its
    /// metrics.
    ///
    /// # Errors
    /// The first directory that cannot be opened, by its field.
    pub fn allow_configured(&mut self, config: &VmConfig) -> Result<(), ConfigError> {
        let refused = |field: &str, path: &str, error| {
            let problem = format!("{path} is not accessible as a directory: {error}; create it");
            ConfigError::new(field, problem)
        };
        for (index, path) in config.allow_dirs.iter().enumerate() {
            self.allow(Path::new(path), Purpose::Files)
                .map_err(|error| refused(&format!("allow-dirs[{index}]"), path, error))?;
        }
        let log = config.logger.as_ref();
        let log = log.and_then(|logger| logger.log_path.as_ref());
        let metrics = config.metrics.as_ref().map(|it| &it.metrics_path);
        for path in log.into_iter().chain(metrics) {
            // The open file does not need it: a FIFO's directory may be gone.
            if let Err(error) = self.allow_beside(Path::new(path), Purpose::Files) {
                log::info!("the directory of {path} does not stay accessible: {error}");
            }
        }
        Ok(())
    }

    /// Adds the fix to the error of a file that a confined process was told to
    /// open.
    #[must_use]
    pub fn explain(&self, error: ConfigError) -> ConfigError {
        if !error.is_denied {
            return error;
        }
        let allowed = self.0.iter().filter(|it| it.purpose == Purpose::Files);
        let allowed: Vec<_> = allowed.map(|it| it.path.to_string_lossy()).collect();
        let where_to = match allowed.as_slice() {
            [] => "in no directory".to_owned(),
            some => format!("only in {}", some.join(", ")),
        };
        let problem = format!(
            "{}; the sandbox lets a running machine open files {where_to}: start it with \
             --allow-dir DIR to add one",
            error.problem
        );
        ConfigError::new(error.field, problem)
    }

    /// The open directories.
    pub(super) fn opened(&self) -> impl Iterator<Item = (BorrowedFd<'_>, Purpose)> {
        self.0.iter().map(|it| (it.file.as_fd(), it.purpose))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use vmm_sys_util::tempfile::TempFile;

    #[test]
    fn only_directories_are_allowed_and_each_once() {
        let mut directories = Directories::default();
        let file = TempFile::new().unwrap();
        for path in [Path::new("/nowhere/else"), file.as_path()] {
            directories.allow(path, Purpose::Files).unwrap_err();
        }
        for _ in 0..2 {
            for path in ["log", "/log", "/"] {
                let path = Path::new(path);
                directories.allow_beside(path, Purpose::Files).unwrap();
            }
            directories.allow(Path::new("/"), Purpose::Removal).unwrap();
        }
        let paths: Vec<_> = directories.0.iter().map(|it| it.path.as_path()).collect();
        assert_eq!(paths, [".", "/", "/"].map(Path::new));
    }

    #[test]
    fn configured_directory_that_is_missing_is_named() {
        let config = VmConfig {
            allow_dirs: vec!["/".into(), "/nowhere".into()],
            ..VmConfig::default()
        };
        let error = Directories::default().allow_configured(&config);
        let text = error.unwrap_err().to_string();
        assert!(
            text.starts_with("allow-dirs[1]: /nowhere is not "),
            "{text}"
        );
    }
}
