//! Static binaries of the product and of its boot tests, for either architecture.

use std::ffi::OsStr;
use std::fs::{self, Permissions};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use serde_json::Value;

use crate::arch::Arch;
use crate::packages::{self, Suite};
use crate::paths;
use crate::userland::Sysroot;

/// Libraries of the C library's package, by the start of their names.
const C_LIBRARY: [&str; 11] = [
    "libc",
    "libm",
    "libmvec",
    "libdl",
    "librt",
    "libpthread",
    "libresolv",
    "libutil",
    "libanl",
    "libthread_db",
    "libc_malloc_debug",
];

/// Argument of the linker for relocations of 1 bit in place of 24 bytes (`DT_RELR`): a static
/// program relocates itself. GNU ld of Debian 12 has it for x86_64 only, the C library for both.
const PACKED_RELOCATIONS: &str = "link-arg=-Wl,-z,pack-relative-relocs";

/// Profile of the compiler.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// As `cargo build` does.
    Dev,
    /// As `cargo build --release` does.
    Release,
}

/// Builds `portcullis` for `arch` and returns the binary.
pub fn build(arch: Arch, profile: Profile) -> Result<PathBuf> {
    let toolchain = Toolchain::find(arch)?;
    let mut cargo = toolchain.cargo("rustc");
    cargo.args(["--package", "portcullis", "--bin", "portcullis"]);
    if profile == Profile::Release {
        cargo.arg("--release");
        if arch == Arch::X86_64 {
            cargo.args(["--", "-C", PACKED_RELOCATIONS]);
        }
    }
    packages::checked(&mut cargo, &format!("building portcullis for {arch}"))?;
    let directory = match profile {
        Profile::Dev => "debug",
        Profile::Release => "release",
    };
    Ok(toolchain
        .target_dir
        .join(arch.target())
        .join(directory)
        .join("portcullis"))
}

/// A program that cargo built.
pub struct Program {
    /// Name of the target.
    pub name: String,
    /// Kind of the target: `bin`, `test`, `lib`, …
    pub kind: String,
    /// It runs tests: also those of a `bin` or a `lib`.
    pub is_test: bool,
    /// The file.
    pub path: PathBuf,
}

/// Runs a cargo command that builds, and returns the built programs by name.
pub fn built(cargo: &mut Command) -> Result<Vec<Program>> {
    cargo
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit());
    let text = packages::output(cargo)?;
    let mut programs = Vec::new();
    for line in text.lines() {
        let Ok(message) = serde_json::from_str::<Value>(line) else {
            continue;
        };
        let target = &message["target"];
        if let (Some(path), Some(name)) = (message["executable"].as_str(), target["name"].as_str())
        {
            programs.push(Program {
                name: name.to_owned(),
                kind: target["kind"][0].as_str().unwrap_or_default().to_owned(),
                is_test: message["profile"]["test"] == true,
                path: PathBuf::from(path),
            });
        }
    }
    programs.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(programs)
}

/// The packages of the workspace, from `cargo metadata`.
pub fn metadata() -> Result<Vec<Value>> {
    let mut cargo = Command::new(cargo());
    cargo
        .current_dir(paths::workspace())
        .args(["metadata", "--no-deps", "--format-version", "1"]);
    let text = packages::output(&mut cargo)?;
    let value: Value = serde_json::from_str(&text).context("cargo metadata")?;
    Ok(value["packages"].as_array().cloned().unwrap_or_default())
}

/// Compiler, linker and environment for one architecture.
pub struct Toolchain {
    arch: Arch,
    target_dir: PathBuf,
    environment: Vec<(String, String)>,
}

impl Toolchain {
    /// Finds or fetches the parts that `arch` needs: rustup's standard library where it is
    /// available, the distribution's otherwise.
    pub fn find(arch: Arch) -> Result<Toolchain> {
        let variable = arch.target().replace('-', "_").to_uppercase();
        let mut toolchain = Toolchain {
            arch,
            target_dir: paths::target().join("static"),
            environment: vec![
                (
                    format!("CARGO_TARGET_{variable}_RUSTFLAGS"),
                    "-C target-feature=+crt-static".to_owned(),
                ),
                // An emulated host runs unoptimized code for minutes longer than the optimizer
                // takes.
                ("CARGO_PROFILE_DEV_OPT_LEVEL".to_owned(), "2".to_owned()),
            ],
        };
        if arch != Arch::native() {
            let linker = toolchain.find_linker()?;
            toolchain
                .environment
                .push((format!("CARGO_TARGET_{variable}_LINKER"), linker));
            if !has_standard_library(arch) {
                toolchain.use_distribution_compiler()?;
            }
        }
        Ok(toolchain)
    }

    /// A cargo command with static linking for the architecture.
    pub fn cargo(&self, subcommand: &str) -> Command {
        let mut command = Command::new(cargo());
        command
            .current_dir(paths::workspace())
            .arg(subcommand)
            .args(["--target", self.arch.target(), "--target-dir"])
            .arg(&self.target_dir)
            .env_remove("RUSTFLAGS")
            .envs(self.environment.iter().map(|(name, value)| (name, value)));
        command
    }

    /// False if the compiler is not rustup's: only rustup has clippy.
    pub fn has_clippy(&self) -> bool {
        self.environment.iter().all(|(name, _)| name != "RUSTC")
    }

    fn find_linker(&self) -> Result<String> {
        let name = format!("{}-gcc", self.arch.triplet());
        // The C library for the architecture is a separate package, and may be missing.
        let start_file = packages::output(Command::new(&name).arg("-print-file-name=crt1.o"));
        if start_file.is_ok_and(|path| path.trim().starts_with('/')) {
            return Ok(name);
        }
        let compiler = Sysroot::of_packages(
            packages::STABLE,
            Arch::native(),
            &format!("cross-{}", self.arch),
            &[
                &format!("gcc-{}", self.arch.triplet().replace('_', "-")),
                &format!("libc6-dev-{}-cross", self.arch.debian()),
            ],
        )?;
        wrapper(&compiler, &name)
    }

    fn use_distribution_compiler(&mut self) -> Result<()> {
        let native = Arch::native();
        let root = Sysroot::of_packages(
            packages::STABLE,
            native,
            &format!("rustc-for-{}", self.arch),
            &["rustc-web", "libstd-rust-web-dev"],
        )?;
        let library = root.path(&format!("usr/lib/rustlib/{}", self.arch.target()));
        if !library.exists() {
            let suite = Suite::open(packages::STABLE, self.arch)?;
            let files = suite.download(&["libstd-rust-web-dev"])?;
            packages::unpack(&files, &root.path(""))?;
        }
        let compiler = wrapper(&root, "rustc")?;
        self.target_dir = paths::target().join("static-distribution");
        self.environment.push(("RUSTC".to_owned(), compiler));
        Ok(())
    }
}

/// The cargo that runs this program.
pub fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

/// True if the compiler has a standard library for `arch`; asks rustup for it if it is missing.
fn has_standard_library(arch: Arch) -> bool {
    let present = || {
        let mut rustc = Command::new("rustc");
        rustc.args(["--print", "target-libdir", "--target", arch.target()]);
        packages::output(&mut rustc).is_ok_and(|dir| {
            std::fs::read_dir(dir.trim()).is_ok_and(|mut entries| entries.next().is_some())
        })
    };
    if present() {
        return true;
    }
    eprintln!("build: asking rustup for the standard library of {arch}");
    let mut rustup = Command::new("timeout");
    rustup.args(["120", "rustup", "target", "add", arch.target()]);
    packages::checked(&mut rustup, "rustup target add").is_ok() && present()
}

/// Writes a script that runs `program` of a private directory with that directory's libraries,
/// except the C library: the programs that it starts are partly the machine's own.
fn wrapper(root: &Sysroot, program: &str) -> Result<String> {
    let base = root.path("wrapped");
    paths::made_once(&base.join(program), program, |dir| {
        let libraries = dir.join("lib");
        fs::create_dir(&libraries)?;
        for entry in fs::read_dir(root.path("usr/lib").join(Arch::native().triplet()))? {
            let path = entry?.path();
            let name = path.file_name().and_then(OsStr::to_str).unwrap_or_default();
            let stem = name.split_once('.').map_or(name, |(stem, _)| stem);
            let of_c = C_LIBRARY.contains(&stem)
                || name.starts_with("ld-linux")
                || name.starts_with("libnss");
            if name.contains(".so") && !of_c {
                symlink(&path, libraries.join(name))?;
            }
        }
        let script = dir.join(program);
        let text = format!(
            "#!/bin/sh\nLD_LIBRARY_PATH='{}' exec '{}' \"$@\"\n",
            libraries.display(),
            root.path("usr/bin").join(program).display()
        );
        fs::write(&script, text)?;
        fs::set_permissions(script, Permissions::from_mode(0o755))?;
        Ok(())
    })?;
    Ok(base.join(program).join(program).display().to_string())
}
