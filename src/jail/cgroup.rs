//! The control group of a jailed command (cgroup version 2). Its files get the values that the user
//! gives; nothing else is managed.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context as _, Result, ensure};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, openat, unlinkat};

const MOUNT: &str = "/sys/fs/cgroup";

/// Value for a file of the group.
#[derive(Clone, Debug)]
pub struct Setting {
    file: String,
    value: String,
}

impl FromStr for Setting {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let Some((file, value)) = text.split_once('=') else {
            return Err("use FILE=VALUE, such as memory.max=600M");
        };
        if !file.contains('.') || file.contains('/') {
            return Err("FILE is CONTROLLER.NAME, such as memory.max");
        }
        let (file, value) = (file.to_owned(), value.to_owned());
        Ok(Self { file, value })
    }
}

impl Setting {
    fn controller(&self) -> &str {
        self.file.split('.').next().unwrap_or_default()
    }
}

/// A group, which is removed when dropped.
pub struct Cgroup {
    parent: OwnedFd,
    id: String,
    /// `cgroup.procs` of the group.
    processes: File,
}

impl Cgroup {
    /// Makes the group `parent`/`id` unless it exists, and writes its settings.
    ///
    /// # Errors
    /// The host has no groups of version 2, or the kernel refuses a setting.
    pub fn make(parent: &Path, id: &str, settings: &[Setting]) -> Result<Self> {
        let mount = Path::new(MOUNT);
        ensure!(
            mount.join("cgroup.controllers").exists(),
            "--cgroup: {MOUNT} has no control groups of version 2; leave it out"
        );
        let parent = mount.join(parent);
        fs::create_dir_all(&parent).with_context(|| format!("cannot make {}", parent.display()))?;
        let between: Vec<&Path> = parent
            .ancestors()
            .take_while(|it| it.starts_with(mount))
            .collect();
        for directory in between.into_iter().rev() {
            for setting in settings {
                let name = setting.controller();
                // "cgroup" is no controller; its files are everywhere.
                if name != "cgroup" {
                    write(
                        &directory.join("cgroup.subtree_control"),
                        &format!("+{name}"),
                    )?;
                }
            }
        }
        let group = parent.join(id);
        match fs::create_dir(&group) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            made => made.with_context(|| format!("cannot make {}", group.display()))?,
        }
        let processes = group.join("cgroup.procs");
        let processes = File::options().write(true).open(&processes);
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let made = Self {
            parent: openat(CWD, &parent, flags, Mode::empty())?,
            id: id.to_owned(),
            processes: processes.with_context(|| format!("cannot join {}", group.display()))?,
        };
        for setting in settings {
            write(&group.join(&setting.file), &setting.value)?;
        }
        Ok(made)
    }

    /// File to which a process writes "0" to join the group.
    pub fn processes(&self) -> BorrowedFd<'_> {
        self.processes.as_fd()
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A group with a process stays.
        let _ = unlinkat(&self.parent, self.id.as_str(), AtFlags::REMOVEDIR);
    }
}

fn write(path: &PathBuf, value: &str) -> Result<()> {
    fs::write(path, value)
        .with_context(|| format!("--cgroup: cannot write {value} to {}", path.display()))
}
