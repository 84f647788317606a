//! The root directory of a jailed command.
//!
//! Every component of a path is opened on its own, without following symbolic links: the directories
//! beneath `--root` belong to the jailed user, who may have left links there.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{
    AtFlags, CWD, FileType, Mode, OFlags, chownat, fstat, mkdirat, mknodat, openat, unlinkat,
};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind, mount_change, mount_move,
    mount_remount, unmount,
};
use rustix::process::{Gid, Uid, chdir, chroot, fchdir, pivot_root};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The device nodes of the root. A host need not have all of them.
const DEVICES: [&str; 4] = [
    "/dev/kvm",
    "/dev/net/tun",
    "/dev/vhost-net",
    "/dev/vhost-vsock",
];

/// Options of every mount.
const PLAIN: MountFlags = MountFlags::NOSUID;

/// User and group of the command.
#[derive(Clone, Copy)]
pub struct Owner {
    pub uid: Uid,
    pub gid: Gid,
}

impl Owner {
    pub fn new(uid: u32, gid: u32) -> Self {
        Self {
            uid: Uid::from_raw(uid),
            gid: Gid::from_raw(gid),
        }
    }

    fn own(self, directory: BorrowedFd<'_>, name: &OsStr) -> Result<(), Errno> {
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        chownat(directory, name, Some(self.uid), Some(self.gid), flags)
    }
}

/// A root that is being built in this process's mount namespace.
pub struct Root {
    owner: Owner,
    /// The tmpfs, mounted over [`Self::host`].
    inside: OwnedFd,
    /// The directory of `--root` itself.
    host: OwnedFd,
    /// The mount namespace in which the process started.
    namespace: File,
    /// Entries that were made, each with its directory; the empty ones are removed at the end.
    made: Vec<(OwnedFd, OsString, AtFlags)>,
}

impl Root {
    /// Mounts an empty root at `path`. `namespace` is the mount namespace in which the process
    /// started.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn make(path: &Path, owner: Owner, namespace: File) -> Result<Self> {
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).context("cannot make the mounts private")?;
        let host = open_directory(path)?;
        mount(
            "tmpfs",
            path,
            "tmpfs",
            PLAIN | MountFlags::NOEXEC,
            c"mode=0755,size=1m",
        )
        .with_context(|| format!("cannot mount a root at {}", path.display()))?;
        Ok(Self {
            owner,
            inside: open_directory(path)?,
            host,
            namespace,
            made: Vec::new(),
        })
    }

    /// Adds a directory for output: the one of this path beneath `--root`, made if it is missing.
    ///
    /// # Errors
    /// It cannot be made, or is no directory.
    pub fn add_directory(&mut self, path: &Path) -> Result<()> {
        let names: Vec<_> = names(path).collect();
        if names.is_empty() || path.starts_with("/dev") {
            // A file directly in the root, or a device: there is no directory to keep.
            return Ok(());
        }
        let what = || format!("cannot make {} beneath --root", path.display());
        let mut source = self.host.try_clone()?;
        for (index, name) in names.iter().enumerate() {
            let is_made = self.make_directory(&source, name).with_context(what)?;
            if is_made && index + 1 == names.len() {
                self.owner.own(source.as_fd(), name).with_context(what)?;
            }
            source = descend(&source, name).with_context(what)?;
        }
        let target = self.make_directories(path).with_context(what)?;
        let flags = PLAIN | MountFlags::NODEV | MountFlags::NOEXEC;
        self.bind(&source, &target, path, flags)
    }

    /// Adds the file `source` of the host at `path`, read-only unless `is_writable`.
    ///
    /// # Errors
    /// There is no such file, or it is a directory.
    pub fn add_file(&mut self, source: &Path, path: &Path, is_writable: bool) -> Result<()> {
        let metadata = fs::metadata(source);
        let metadata = metadata.with_context(|| format!("cannot find {}", source.display()))?;
        let mut flags = PLAIN | MountFlags::NOEXEC;
        // A disk may be a block device.
        if !metadata.file_type().is_block_device() {
            flags |= MountFlags::NODEV;
        }
        if !is_writable {
            flags |= MountFlags::RDONLY;
        }
        self.bind_file(source, path, flags)
    }

    /// Adds the program, and its shared libraries if it has any, at their own paths: no other path
    /// is free of the files that the command names. Returns the words that start it.
    ///
    /// # Errors
    /// A library cannot be added, or none is the dynamic loader.
    pub fn add_program(&mut self, program: &Path) -> Result<Vec<PathBuf>> {
        let flags = PLAIN | MountFlags::NODEV | MountFlags::RDONLY;
        self.bind_file(program, program, flags)?;
        let libraries = mapped_files(program)?;
        for library in &libraries {
            self.bind_file(library, library, flags)?;
        }
        let is_loader = |path: &&PathBuf| {
            let name = path.file_name().unwrap_or_default();
            name.to_string_lossy().starts_with("ld-")
        };
        let program = program.to_path_buf();
        match libraries.iter().find(is_loader) {
            _ if libraries.is_empty() => Ok(vec![program]),
            Some(loader) => Ok(vec![loader.clone(), program]),
            None => bail!("cannot find this program's dynamic loader; use a static build"),
        }
    }

    /// Makes the device nodes that the host has.
    ///
    /// # Errors
    /// The kernel refuses one.
    pub fn add_devices(&mut self) -> Result<()> {
        for path in DEVICES {
            let Ok(metadata) = fs::metadata(path) else {
                continue;
            };
            let path = Path::new(path);
            let what = || format!("cannot make {} in the root", path.display());
            let (directory, name) = self.make_parent(path).with_context(what)?;
            let mode = Mode::RUSR | Mode::WUSR;
            mknodat(
                &directory,
                name,
                FileType::CharacterDevice,
                mode,
                metadata.rdev(),
            )
            .with_context(what)?;
            self.owner.own(directory.as_fd(), name).with_context(what)?;
        }
        Ok(())
    }

    /// Makes this the root of the process, and `directory` in it the current one.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn enter(&mut self, directory: &Path) -> Result<()> {
        self.make_directories(directory)
            .with_context(|| format!("cannot make {} in the root", directory.display()))?;
        let enter = || -> Result<(), Errno> {
            fchdir(&self.inside)?;
            match pivot_root(".", ".") {
                Ok(()) => unmount(".", UnmountFlags::DETACH)?,
                // The host runs from its initial ramdisk, which pivot_root(2) cannot replace.
                Err(Errno::INVAL) => {
                    mount_move(".", "/")?;
                    chroot(".")?;
                }
                Err(error) => return Err(error),
            }
            chdir("/")?;
            let flags = MountFlags::BIND | MountFlags::RDONLY | PLAIN | MountFlags::NOEXEC;
            mount_remount("/", flags, c"")?;
            chdir(directory)
        };
        enter().context("cannot enter the root")
    }

    fn bind_file(&mut self, source: &Path, path: &Path, flags: MountFlags) -> Result<()> {
        let what = || format!("cannot add {} to the root", path.display());
        let opened = openat(CWD, source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
        let opened = opened.with_context(what)?;
        let (directory, name) = self.make_parent(path).with_context(what)?;
        match mknodat(&directory, name, FileType::RegularFile, Mode::empty(), 0) {
            Ok(()) => self
                .made
                .push((directory.try_clone()?, name.to_owned(), AtFlags::empty())),
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error).with_context(what),
        }
        let target = open_file(&directory, name).with_context(what)?;
        self.bind(&opened, &target, path, flags)
    }

    /// Mounts `source` over `target`, which is at `path`.
    fn bind(
        &self,
        source: &OwnedFd,
        target: &OwnedFd,
        path: &Path,
        flags: MountFlags,
    ) -> Result<()> {
        let what = || format!("cannot mount {} in the root", path.display());
        mount_bind(link(source), link(target)).with_context(what)?;
        // A bind ignores other options: they are set on the new mount, found at the path again.
        let (parent, last) = split(path).with_context(what)?;
        let mut directory = self.inside.try_clone()?;
        for name in names(parent) {
            directory = descend(&directory, name).with_context(what)?;
        }
        let mounted = open_file(&directory, last).with_context(what)?;
        let flags = MountFlags::BIND | flags;
        mount_remount(link(&mounted), flags, c"").with_context(what)
    }

    /// Makes the directory of `path` in the root. Returns it, and the name of the file.
    fn make_parent<'a>(&mut self, path: &'a Path) -> Result<(OwnedFd, &'a OsStr)> {
        let (parent, name) = split(path)?;
        Ok((self.make_directories(parent)?, name))
    }

    fn make_directories(&mut self, path: &Path) -> Result<OwnedFd> {
        let mut directory = self.inside.try_clone()?;
        for name in names(path) {
            self.make_directory(&directory, name)?;
            directory = descend(&directory, name)?;
        }
        Ok(directory)
    }

    /// Makes the directory `name` unless it exists. Returns whether it was made.
    fn make_directory(&mut self, parent: &OwnedFd, name: &OsStr) -> Result<bool> {
        match mkdirat(parent, name, Mode::from_raw_mode(0o755)) {
            Ok(()) => {
                self.made
                    .push((parent.try_clone()?, name.to_owned(), AtFlags::REMOVEDIR));
                Ok(true)
            }
            Err(Errno::EXIST) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Root {
    /// Removes what is left beneath `--root`: empty directories, and the files over which others
    /// were mounted. What is in the tmpfs goes with it.
    fn drop(&mut self) {
        // No file over which another is mounted in the process's namespace can be removed.
        let mounts = Some(LinkNameSpaceType::Mount);
        let _ = move_into_link_name_space(self.namespace.as_fd(), mounts);
        for (directory, name, flags) in self.made.iter().rev() {
            let _ = unlinkat(directory, name, *flags);
        }
    }
}

/// Files that are mapped into this process besides `program`: its shared libraries.
fn mapped_files(program: &Path) -> Result<BTreeSet<PathBuf>> {
    let maps = fs::read_to_string("/proc/self/maps").context("cannot read /proc/self/maps")?;
    let paths = maps
        .lines()
        .filter_map(|line| Some(line.split_at(line.find('/')?).1));
    let paths = paths.map(PathBuf::from);
    Ok(paths.filter(|path| path != program).collect())
}

/// Components of an absolute path without "..".
fn names(path: &Path) -> impl Iterator<Item = &OsStr> {
    path.components().filter_map(|component| match component {
        Component::Normal(name) => Some(name),
        _ => None,
    })
}

fn split(path: &Path) -> Result<(&Path, &OsStr)> {
    let parts = path.parent().zip(path.file_name());
    parts.with_context(|| format!("{} is no path of a file", path.display()))
}

fn open_directory(path: &Path) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = openat(CWD, path, flags, Mode::empty());
    opened.with_context(|| format!("cannot open {}", path.display()))
}

fn descend(directory: impl AsFd, name: &OsStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(directory, name, flags, Mode::empty())
}

/// Opens a file or directory that is no symbolic link.
fn open_file(directory: impl AsFd, name: &OsStr) -> Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let opened = openat(directory, name, flags, Mode::empty())?;
    let kind = FileType::from_raw_mode(fstat(&opened)?.st_mode);
    if kind == FileType::Symlink {
        bail!("{} is a symbolic link", name.to_string_lossy());
    }
    Ok(opened)
}

/// Path of an open file, for mount(2).
fn link(file: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}
