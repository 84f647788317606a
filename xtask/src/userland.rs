//! Programs of the distribution: run from a private directory, or added to an initramfs with their
//! shared libraries.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::cpio::Archive;
use crate::packages::{self, Suite};
use crate::paths;

/// A directory with unpacked packages and all their dependencies.
pub struct Sysroot {
    root: PathBuf,
    arch: Arch,
}

impl Sysroot {
    /// Unpacks `names` of `release` once, into the cache under `label`.
    pub fn of_packages(release: &str, arch: Arch, label: &str, names: &[&str]) -> Result<Sysroot> {
        let root = paths::cache()?.join(format!("{label}-{arch}"));
        let recipe = format!("{release} {}", names.join(" "));
        paths::made_once(&root, &recipe, |root| {
            eprintln!("packages: fetching {} for {arch}", names.join(", "));
            let suite = Suite::open(release, arch)?;
            packages::unpack(&suite.download_with_dependencies(names)?, root)
        })?;
        Ok(Sysroot { root, arch })
    }

    /// A path below the directory.
    pub fn path(&self, below: &str) -> PathBuf {
        self.root.join(below)
    }

    /// A command that runs `program` (a path below the directory) on this machine with the
    /// directory's own C library.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.path(self.arch.loader()));
        let directories = self
            .library_directories()
            .map(|dir| dir.display().to_string());
        command
            .arg("--library-path")
            .arg(directories.join(":"))
            .arg(self.path(program))
            .env_remove("LD_LIBRARY_PATH");
        command
    }

    /// Adds `programs` (paths below the directory) and their libraries to an initramfs.
    pub fn install(&self, archive: &mut Archive, programs: &[&str]) -> Result<()> {
        for program in programs {
            let to = format!("usr/bin/{}", file_name(program));
            archive.copy(&to, &self.path(program))?;
        }
        let loader = self.arch.loader();
        archive.copy(loader, &self.path(loader))?;
        for (name, from) in self.libraries(programs)? {
            archive.copy(&format!("lib/{}/{name}", self.arch.triplet()), &from)?;
        }
        Ok(())
    }

    /// Libraries of `programs`, without the loader, by their names.
    pub fn libraries(&self, programs: &[&str]) -> Result<BTreeMap<String, PathBuf>> {
        let mut waiting: Vec<String> = Vec::new();
        for program in programs {
            waiting.extend(needed(&self.path(program))?);
        }
        let loader = file_name(self.arch.loader());
        let mut found = BTreeMap::new();
        while let Some(library) = waiting.pop() {
            if library == loader || found.contains_key(&library) {
                continue;
            }
            let from = self
                .library_directories()
                .map(|dir| dir.join(&library))
                .into_iter()
                .find(|path| path.exists())
                .with_context(|| format!("library {library} is in none of the packages"))?;
            waiting.extend(needed(&from)?);
            found.insert(library, from);
        }
        Ok(found)
    }

    fn library_directories(&self) -> [PathBuf; 2] {
        ["usr/lib/", "usr/lib64/"].map(|dir| {
            let dir = self.path(dir);
            if dir.ends_with("lib") {
                dir.join(self.arch.triplet())
            } else {
                dir
            }
        })
    }
}

/// QEMU, file system and compression tools for this machine.
pub fn host_tools() -> Result<Sysroot> {
    let names = [
        "qemu-system-x86",
        "qemu-system-arm",
        "e2fsprogs",
        "xz-utils",
        "zstd",
        "lz4",
    ];
    Sysroot::of_packages(packages::TOOLS, Arch::native(), "tools", &names)
}

/// Programs for the initramfs of a guest or of the lab.
pub fn guest_programs(arch: Arch) -> Result<Sysroot> {
    let names = [
        "busybox-static",
        "iproute2",
        "pciutils",
        "ethtool",
        "e2fsprogs",
        "socat",
        "iperf3",
        "strace",
        "tcpdump",
        "util-linux",
        "dash",
        "bash-static",
        "tar",
    ];
    Sysroot::of_packages(packages::STABLE, arch, "programs", &names)
}

fn file_name(path: &str) -> &str {
    path.rsplit_once('/').map_or(path, |(_, name)| name)
}

/// The shared libraries that an ELF file names.
fn needed(file: &Path) -> Result<Vec<String>> {
    let file = fs::canonicalize(file).with_context(|| format!("no {}", file.display()))?;
    let text = packages::output(
        Command::new("readelf")
            .arg("-d")
            .arg(file)
            .env("LC_ALL", "C"),
    )?;
    Ok(text
        .lines()
        .filter(|line| line.contains("(NEEDED)"))
        .filter_map(|line| Some(line.split_once('[')?.1.split_once(']')?.0.to_owned()))
        .collect())
}
