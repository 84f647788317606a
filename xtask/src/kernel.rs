//! Kernels of the distribution and their modules.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::arch::Arch;
use crate::cpio::Archive;
use crate::packages::{self, Suite};
use crate::paths;
use crate::userland;

/// An unpacked kernel package.
pub struct Kernel {
    /// The package's kernel file (`vmlinuz`).
    pub image: PathBuf,
    release: String,
    modules: PathBuf,
}

impl Kernel {
    /// Downloads and unpacks the current kernel of the meta package `meta` in `suite`, the name of
    /// a Debian release.
    pub fn fetch(suite: &str, meta: &str, arch: Arch) -> Result<Kernel> {
        let suite = Suite::open(suite, arch)?;
        let package = suite.newest(meta)?;
        let release = package.trim_start_matches("linux-image-").to_owned();
        // Newer releases split the image into several packages, and leave its own empty.
        let parts = ["binary", "base", "modules"].map(|part| format!("linux-{part}-{release}"));
        let mut names = vec![package.as_str()];
        if suite.has(&parts[0]) {
            names.extend(parts.iter().map(String::as_str));
        }
        let root = paths::cache()?.join(format!("kernel-{release}"));
        paths::made_once(&root, &names.join(" "), |root| {
            eprintln!("packages: fetching kernel {release}");
            packages::unpack(&suite.download(&names)?, root)
        })?;
        let modules = root.join(format!("lib/modules/{release}"));
        let places = [
            root.join(format!("boot/vmlinuz-{release}")),
            modules.join("vmlinuz"),
        ];
        let image = places.into_iter().find(|path| path.exists());
        Ok(Kernel {
            image: image.with_context(|| format!("no kernel image in {}", names.join(", ")))?,
            modules,
            release,
        })
    }

    /// Its release, as printed by `uname -r`.
    pub fn release(&self) -> &str {
        &self.release
    }

    /// Adds the modules `names` that are not built in, and their dependencies, to an initramfs for
    /// `modprobe`. Prints those that the kernel lacks and leaves them out.
    pub fn add_modules(&self, archive: &mut Archive, names: &[&str]) -> Result<()> {
        let tools = userland::host_tools()?;
        let builtin = fs::read_to_string(self.modules.join("modules.builtin"))?;
        let builtin: BTreeSet<String> = builtin.lines().map(module_name).collect();
        let mut files = BTreeMap::new();
        index(&self.modules.join("kernel"), &mut files)?;

        let mut needs: BTreeMap<String, Vec<String>> = BTreeMap::new();
        let mut waiting: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        while let Some(name) = waiting.pop() {
            if builtin.contains(&name) || needs.contains_key(&name) {
                continue;
            }
            let Some(file) = files.get(&name) else {
                eprintln!("guest: kernel {} has no module {name}", self.release);
                continue;
            };
            let data = if file.extension().is_some_and(|extension| extension == "xz") {
                let output = tools.command("usr/bin/xz").arg("-dc").arg(file).output()?;
                ensure!(output.status.success(), "cannot unpack {}", file.display());
                output.stdout
            } else {
                fs::read(file)?
            };
            let depends = depends(&data);
            waiting.extend(depends.iter().cloned());
            archive.file(
                &format!("lib/modules/{}/{name}.ko", self.release),
                0o644,
                data,
            );
            needs.insert(name, depends);
        }
        let mut table = String::new();
        for name in needs.keys() {
            let all: Vec<String> = closure(name, &needs)
                .iter()
                .map(|name| format!("{name}.ko"))
                .collect();
            table += &format!("{name}.ko: {}\n", all.join(" "));
        }
        let table_path = format!("lib/modules/{}/modules.dep", self.release);
        archive.file(&table_path, 0o644, table.into());
        Ok(())
    }
}

/// The dependencies of `name`, in the order that `modprobe` processes backwards.
fn closure(name: &str, needs: &BTreeMap<String, Vec<String>>) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for direct in needs
        .get(name)
        .into_iter()
        .flatten()
        .filter(|name| needs.contains_key(*name))
    {
        for name in std::iter::once(direct.clone()).chain(closure(direct, needs)) {
            // The later mention counts: a dependency of several modules is loaded first.
            all.retain(|other| *other != name);
            all.push(name);
        }
    }
    all
}

/// Modules below a directory, by name.
fn index(dir: &Path, files: &mut BTreeMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("no {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            index(&path, files)?;
        } else {
            files.insert(module_name(&path.display().to_string()), path);
        }
    }
    Ok(())
}

/// `kernel/drivers/net/virtio-net.ko.xz` is the module `virtio_net`.
fn module_name(path: &str) -> String {
    let file = path.rsplit_once('/').map_or(path, |(_, file)| file);
    let name = file.split_once(".ko").map_or(file, |(name, _)| name);
    name.replace('-', "_")
}

/// The names in a module's `depends=` record.
fn depends(module: &[u8]) -> Vec<String> {
    const RECORD: &[u8] = b"\0depends=";
    let Some(at) = module
        .windows(RECORD.len())
        .position(|window| window == RECORD)
    else {
        return Vec::new();
    };
    let rest = &module[at + RECORD.len()..];
    let end = rest
        .iter()
        .position(|byte| *byte == 0)
        .unwrap_or(rest.len());
    let text = String::from_utf8_lossy(&rest[..end]);
    text.split(',')
        .filter(|name| !name.is_empty())
        .map(module_name)
        .collect()
}
