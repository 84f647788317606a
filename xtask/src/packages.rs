//! The distribution's packages, downloaded and unpacked into private directories.
//!
//! Nothing is installed and nothing requires root: a private apt configuration with its own state
//! derives its sources from the machine's, with another release and architecture.

use std::fs;
use std::io::stderr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::arch::Arch;
use crate::paths;

/// Release of the kernels, guest programs and the cross compiler.
pub const STABLE: &str = "bookworm";
/// Release of QEMU: the older one emulates Arm at half the speed.
pub const TOOLS: &str = "trixie";

/// Suite of the newest kernel.
pub const BACKPORTS: &str = "trixie-backports";

/// One release for one architecture, with apt's state for it.
pub struct Suite {
    dir: PathBuf,
}

impl Suite {
    /// Creates the private apt state of `release` for `arch`, and fetches the package lists once.
    pub fn open(release: &str, arch: Arch) -> Result<Suite> {
        let dir = paths::cache()?.join(format!("apt/{release}-{}", arch.debian()));
        let sources = sources_for(release)?;
        let recipe = format!("{}\n{sources}", arch.debian());
        paths::made_once(&dir, &recipe, |dir| {
            eprintln!("packages: fetching the package lists of {release} for {arch}");
            for sub in ["lists/partial", "none/partial", "archives", "parts"] {
                fs::create_dir_all(dir.join(sub))?;
            }
            fs::write(dir.join("status"), "")?;
            fs::write(dir.join("suite.sources"), &sources)?;
            fs::write(dir.join("apt.conf"), configuration(dir, arch))?;
            let suite = Suite {
                dir: dir.to_owned(),
            };
            checked(suite.apt("apt-get").arg("update"), "apt-get update")
        })?;
        Ok(Suite { dir })
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .arg("-c")
            .arg(self.dir.join("apt.conf"))
            .env("LC_ALL", "C")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }

    /// The current package of the meta package `meta`, e.g. the newest kernel of a series.
    pub fn newest(&self, meta: &str) -> Result<String> {
        let text = output(self.apt("apt-cache").args(["depends", "--important", meta]))?;
        let found = text
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "))
            .find(|name| name.starts_with("linux-image-"));
        found.map(str::to_owned).with_context(|| {
            format!("package {meta} names no kernel: is it in the package sources?")
        })
    }

    /// Whether the release has a package of this name.
    pub fn has(&self, package: &str) -> bool {
        let mut cache = self.apt("apt-cache");
        output(cache.args(["show", "--no-all-versions", package])).is_ok()
    }

    /// Downloads `names` without their dependencies.
    pub fn download(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        self.fetch(&["download"], names)
    }

    /// Downloads `names` and all their dependencies.
    pub fn download_with_dependencies(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        self.fetch(&["install", "-y", "--no-install-recommends"], names)
    }

    fn fetch(&self, selection: &[&str], names: &[&str]) -> Result<Vec<PathBuf>> {
        // Another thread, or another checkout, may be fetching into the same directories.
        let lock = fs::File::create(self.dir.join("fetch.lock"))?;
        lock.lock()?;
        let attempt = || self.fetch_listed(&self.listed(selection, names)?);
        attempt().or_else(|_| {
            // The archive may have changed since its lists were fetched.
            checked(self.apt("apt-get").arg("update"), "apt-get update")?;
            attempt()
        })
    }

    /// File names of the packages in a selection.
    fn listed(&self, selection: &[&str], names: &[&str]) -> Result<Vec<String>> {
        let mut command = self.apt("apt-get");
        let text = output(command.args(selection).arg("--print-uris").args(names))?;
        // apt omits files that are in its archives: that directory stays empty. Lines read: 'URI'
        // file size checksum
        let files: Vec<String> = text
            .lines()
            .filter(|line| line.starts_with('\''))
            .filter_map(|line| line.split_whitespace().nth(1).map(str::to_owned))
            .collect();
        ensure!(
            !files.is_empty(),
            "apt-get offers no package for: {}",
            names.join(" ")
        );
        Ok(files)
    }

    fn fetch_listed(&self, files: &[String]) -> Result<Vec<PathBuf>> {
        let archives = self.dir.join("archives");
        // The file of a package is called name_version_architecture.deb.
        let missing: Vec<String> = files
            .iter()
            .filter(|file| !archives.join(file).exists())
            .filter_map(|file| {
                let mut parts = file.split('_');
                Some(format!(
                    "{}={}",
                    parts.next()?,
                    parts.next()?.replace("%3a", ":")
                ))
            })
            .collect();
        if !missing.is_empty() {
            let incoming = self.dir.join("incoming");
            fs::create_dir_all(&incoming)?;
            let mut get = self.apt("apt-get");
            get.arg("download").args(&missing).current_dir(&incoming);
            checked(&mut get, "apt-get download")?;
            for entry in fs::read_dir(&incoming)? {
                let entry = entry?;
                fs::rename(entry.path(), archives.join(entry.file_name()))?;
            }
        }
        Ok(files.iter().map(|file| archives.join(file)).collect())
    }
}

/// Unpacks packages into `root`, laid out with /usr merged.
pub fn unpack(packages: &[PathBuf], root: &Path) -> Result<()> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        fs::create_dir_all(root.join("usr").join(name))?;
        let link = root.join(name);
        if !link.exists() {
            std::os::unix::fs::symlink(format!("usr/{name}"), link)?;
        }
    }
    for package in packages {
        let what = format!("unpacking {}", package.display());
        let mut archive = Command::new("dpkg-deb")
            .arg("--fsys-tarfile")
            .arg(package)
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run dpkg-deb")?;
        let files = archive.stdout.take().context("no standard output")?;
        let mut tar = Command::new("tar");
        // Not `dpkg-deb -x`: it replaces the links above by directories.
        tar.args(["-xp", "--keep-directory-symlink", "--no-same-owner", "-C"])
            .arg(root);
        checked(tar.stdin(files), &what)?;
        ensure!(archive.wait()?.success(), "{what} failed");
    }
    Ok(())
}

/// Runs a command with its standard output on this process's standard error.
pub fn checked(command: &mut Command, what: &str) -> Result<()> {
    let status = command
        .stdout(stderr())
        .status()
        .with_context(|| format!("cannot run {}", command.get_program().display()))?;
    ensure!(status.success(), "{what} failed ({status})");
    Ok(())
}

/// Runs a command and returns its standard output.
pub fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().display().to_string();
    let output = command
        .output()
        .with_context(|| format!("cannot run {name}"))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        bail!("{name} failed: {}", message.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn configuration(dir: &Path, arch: Arch) -> String {
    let dir = dir.display();
    let arch = arch.debian();
    format!(
        r#"APT::Architecture "{arch}";
#clear APT::Architectures;
APT::Architectures {{ "{arch}"; }};
APT::Sandbox::User "root";
APT::Get::AllowUnauthenticated "false";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
Dir::State "{dir}";
Dir::State::lists "{dir}/lists";
Dir::State::status "{dir}/status";
Dir::Cache "{dir}";
Dir::Cache::archives "{dir}/none";
Dir::Cache::pkgcache "{dir}/pkgcache.bin";
Dir::Cache::srcpkgcache "";
Dir::Etc::sourcelist "{dir}/suite.sources";
Dir::Etc::sourceparts "{dir}/parts";
Dir::Etc::preferences "{dir}/parts/none";
Dir::Etc::preferencesparts "{dir}/parts";
"#
    )
}

/// The machine's sources of its own distribution, with `release` in place of the machine's release.
fn sources_for(release: &str) -> Result<String> {
    let own = own_release()?;
    let text = output(Command::new("apt-config").args([
        "shell",
        "LIST",
        "Dir::Etc::sourcelist/f",
        "PARTS",
        "Dir::Etc::sourceparts/d",
    ]))?;
    let mut files = Vec::new();
    for line in text.lines() {
        let Some((_, path)) = line.split_once('=') else {
            continue;
        };
        let path = Path::new(path.trim_matches('\''));
        if path.is_dir() {
            for entry in fs::read_dir(path)? {
                files.push(entry?.path());
            }
        } else {
            files.push(path.to_owned());
        }
    }
    files.sort();
    let mut stanzas = Vec::new();
    for file in files {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        match file.extension().and_then(|extension| extension.to_str()) {
            Some("list") => {
                let lines = text
                    .lines()
                    .filter_map(|line| stanza_of_line(line, &own, release));
                stanzas.extend(lines);
            }
            Some("sources") => {
                let parts = text
                    .split("\n\n")
                    .filter_map(|part| stanza_of(part, &own, release));
                stanzas.extend(parts);
            }
            _ => {}
        }
    }
    stanzas.sort();
    stanzas.dedup();
    ensure!(
        !stanzas.is_empty(),
        "no package source for {own} in this machine's apt configuration: \
         the guest images and the lab are made from Debian's packages"
    );
    Ok(stanzas.join("\n"))
}

fn own_release() -> Result<String> {
    let text = fs::read_to_string("/etc/os-release").context("cannot read /etc/os-release")?;
    text.lines()
        .find_map(|line| line.strip_prefix("VERSION_CODENAME="))
        .map(|name| name.trim_matches('"').to_owned())
        .context("/etc/os-release names no release (VERSION_CODENAME)")
}

/// `bookworm-updates` becomes `trixie-updates`; a suite of another distribution is dropped.
/// Backports have no updates of their own.
fn translated(suite: &str, own: &str, release: &str) -> Option<String> {
    let rest = suite
        .strip_prefix(own)
        .or_else(|| suite.strip_prefix("stable"))?;
    let known = rest.is_empty()
        || !release.ends_with("-backports") && (rest == "-updates" || rest == "-security");
    known.then(|| format!("{release}{rest}"))
}

/// Rewrites one entry in the one-line format as a stanza.
fn stanza_of_line(line: &str, own: &str, release: &str) -> Option<String> {
    let rest = line.trim().strip_prefix("deb ")?.trim_start();
    let (options, rest) = match rest.strip_prefix('[') {
        Some(rest) => rest.split_once(']')?,
        None => ("", rest),
    };
    let mut words = rest.split_whitespace();
    let (uri, suite) = (words.next()?, words.next()?);
    let components: Vec<&str> = words.take_while(|word| !word.starts_with('#')).collect();
    let suite = translated(suite, own, release)?;
    let components = components.join(" ");
    let mut stanza =
        format!("Types: deb\nURIs: {uri}\nSuites: {suite}\nComponents: {components}\n");
    for option in options.split_whitespace() {
        match option.split_once('=') {
            Some(("signed-by", key)) => stanza += &format!("Signed-By: {key}\n"),
            Some(("trusted", value)) => stanza += &format!("Trusted: {value}\n"),
            _ => {}
        }
    }
    Some(stanza)
}

/// Rewrites one deb822 stanza: its suites replaced, its restriction to architectures dropped.
fn stanza_of(part: &str, own: &str, release: &str) -> Option<String> {
    let mut stanza = String::new();
    let mut useful = false;
    let mut skipping = false;
    for line in part.lines().filter(|line| !line.starts_with('#')) {
        if line.starts_with([' ', '\t']) {
            if !skipping {
                stanza += &format!("{line}\n");
            }
            continue;
        }
        let (field, value) = line.split_once(':')?;
        skipping = false;
        match field.to_ascii_lowercase().as_str() {
            "types" => {
                value.split_whitespace().find(|kind| *kind == "deb")?;
                stanza += "Types: deb\n";
            }
            "suites" => {
                let suites: Vec<String> = value
                    .split_whitespace()
                    .filter_map(|suite| translated(suite, own, release))
                    .collect();
                useful = !suites.is_empty();
                stanza += &format!("Suites: {}\n", suites.join(" "));
            }
            "enabled" if value.trim() == "no" => return None,
            "architectures" => skipping = true,
            _ => stanza += &format!("{line}\n"),
        }
    }
    useful.then_some(stanza)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_one_line_source_keeps_its_key_and_changes_its_release() {
        let line = "deb [arch=amd64 signed-by=/k.gpg] http://mirror/debian bookworm-updates main contrib # x";
        assert_eq!(
            stanza_of_line(line, "bookworm", "trixie").as_deref(),
            Some(
                "Types: deb\nURIs: http://mirror/debian\nSuites: trixie-updates\n\
                 Components: main contrib\nSigned-By: /k.gpg\n"
            )
        );
        assert_eq!(
            stanza_of_line("# deb http://m bookworm main", "bookworm", "trixie"),
            None
        );
        assert_eq!(
            stanza_of_line("deb http://m nodistro main", "bookworm", "trixie"),
            None
        );
    }

    #[test]
    fn a_stanza_drops_foreign_suites_and_its_restriction_to_architectures() {
        let part = "Types: deb deb-src\n# why\nURIs: http://mirror\nSuites: bookworm bookworm-backports\n\
                    Architectures: amd64\n i386\nComponents: main\nSigned-By:\n -----BEGIN";
        assert_eq!(
            stanza_of(part, "bookworm", "trixie").as_deref(),
            Some(
                "Types: deb\nURIs: http://mirror\nSuites: trixie\nComponents: main\n\
                 Signed-By:\n -----BEGIN\n"
            )
        );
        assert_eq!(
            stanza_of("Types: deb\nSuites: nodistro", "bookworm", "trixie"),
            None
        );
        assert_eq!(
            stanza_of("Types: deb-src\nSuites: bookworm", "bookworm", "trixie"),
            None
        );
    }
}
