//! The fuzz targets of `fuzz/`: searches, and runs of saved inputs.
//!
//! Built without cargo-fuzz, but with its flags: libFuzzer's coverage and the address sanitizer,
//! which a stable compiler has too (`RUSTC_BOOTSTRAP`).

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::arch::Arch;
use crate::native;
use crate::packages::{checked, output};
use crate::paths;
use crate::product;

/// cargo-fuzz's flags for the compiler.
const FLAGS: [&str; 8] = [
    "--cfg=fuzzing",
    "-Cdebug-assertions",
    "-Zsanitizer=address",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
];
/// Number of generated inputs for a target without saved ones, and their time limit in seconds.
const GENERATED: u32 = 5000;
const GENERATED_LIMIT_S: u32 = 5;
/// Seconds after which one input counts as a hang.
const INPUT_LIMIT_S: u32 = 60;

/// What to fuzz, and for how long.
#[derive(clap::Args)]
pub struct FuzzArgs {
    /// Seconds for each target; 0 runs the saved inputs, as cargo xtask test does
    #[arg(long, default_value_t = 60)]
    seconds: u64,
    /// Save the inputs that reach the most code as fuzz/seeds/NAME.tar.gz
    #[arg(long)]
    save: bool,
    /// Targets; all when none is named
    #[arg(value_name = "NAME")]
    names: Vec<String>,
}

/// A target of `fuzz/Cargo.toml`.
pub struct Target {
    /// Name of the target.
    pub name: String,
    /// Its options of libFuzzer: `package.metadata.fuzz.options`.
    options: Vec<String>,
}

/// Fuzzes. Fails if a target fails on an input.
pub fn run(args: &FuzzArgs) -> Result<ExitCode> {
    let mut targets = targets()?;
    for name in &args.names {
        if !targets.iter().any(|target| target.name == *name) {
            let known: Vec<_> = targets.iter().map(|target| target.name.as_str()).collect();
            bail!("no target {name}: use {}", known.join(", "));
        }
    }
    if !args.names.is_empty() {
        targets.retain(|target| args.names.contains(&target.name));
    }
    build(&[])?;
    let mut failed = Vec::new();
    for target in &targets {
        let passed = if args.seconds == 0 {
            target.run_seeds()?
        } else {
            target.search(args.seconds)?
        };
        if !passed {
            failed.push(target.name.as_str());
        } else if args.save {
            target.save()?;
        }
    }
    println!("{} targets, failed: {}", targets.len(), failed.len());
    if failed.is_empty() {
        return Ok(ExitCode::SUCCESS);
    }
    println!("failed: {}", failed.join(", "));
    Ok(ExitCode::FAILURE)
}

/// The targets, in the order of `fuzz/Cargo.toml`.
pub fn targets() -> Result<Vec<Target>> {
    let mut cargo = cargo("metadata");
    cargo.args(["--no-deps", "--format-version", "1"]);
    let value: Value = serde_json::from_str(&output(&mut cargo)?).context("cargo metadata")?;
    let package = &value["packages"][0];
    let options = &package["metadata"]["fuzz"]["options"];
    let all = package["targets"].as_array().into_iter().flatten();
    let programs = all.filter(|target| target["kind"][0] == "bin");
    let names = programs.filter_map(|target| target["name"].as_str());
    Ok(names.map(|name| target(name, &options[name])).collect())
}

fn target(name: &str, options: &Value) -> Target {
    let options = options.as_array().into_iter().flatten();
    Target {
        name: name.to_owned(),
        options: options
            .filter_map(|option| option.as_str().map(str::to_owned))
            .collect(),
    }
}

/// The missing part, if this machine cannot build the targets.
pub fn obstacle() -> Option<String> {
    let mut compiler = Command::new("c++");
    let found = output(compiler.arg("--version"));
    found
        .is_err()
        .then(|| "libFuzzer needs a C++ compiler (apt install g++)".to_owned())
}

/// Builds all targets. `wrapper` is the program that starts the compiler.
pub fn build(wrapper: &[&str]) -> Result<()> {
    if let Some(reason) = obstacle() {
        bail!(reason);
    }
    let mut cargo = cargo("build");
    cargo
        .args(["--release", "--bins", "--target", Arch::native().target()])
        .arg("--target-dir")
        .arg(directory());
    let flags = FLAGS.join("\x1f");
    cargo
        .env("CARGO_ENCODED_RUSTFLAGS", flags)
        .env("RUSTC_BOOTSTRAP", "1");
    if wrapper.is_empty() {
        return checked(&mut cargo, "building the fuzz targets");
    }
    checked(
        &mut native::wrapped(wrapper, &cargo),
        "building the fuzz targets",
    )
}

fn cargo(subcommand: &str) -> Command {
    let mut cargo = Command::new(product::cargo());
    cargo
        .arg(subcommand)
        .arg("--locked")
        .arg("--manifest-path")
        .arg(paths::workspace().join("fuzz/Cargo.toml"));
    cargo
}

/// Directory of all generated files.
fn directory() -> PathBuf {
    paths::target().join("fuzz")
}

/// Creates or clears a directory of this name.
fn cleared(name: &str, target: &str) -> Result<PathBuf> {
    let dir = directory().join(name).join(target);
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    fs::create_dir_all(&dir)?;
    Ok(dir)
}

impl Target {
    /// Runs the saved inputs once. Without saved ones, runs generated ones: the same each time.
    pub fn run_seeds(&self) -> Result<bool> {
        let seeds = self.seeds()?;
        let none = fs::read_dir(&seeds)?.next().is_none();
        let mut program = self.program(&seeds)?;
        if none {
            program.args(["-seed=1", &format!("-runs={GENERATED}")]);
            program.arg(format!("-max_total_time={GENERATED_LIMIT_S}"));
        } else {
            program.arg("-runs=0");
        }
        self.passes(program.args(["-verbosity=0", "-print_funcs=0"]))
    }

    /// Searches for inputs that fail, starting from the saved and the earlier ones.
    fn search(&self, seconds: u64) -> Result<bool> {
        let mut program = self.program(&self.corpus()?)?;
        program.arg(self.seeds()?);
        program.args([
            &format!("-max_total_time={seconds}"),
            "-print_final_stats=1",
        ]);
        self.passes(&mut program)
    }

    /// Saves the fewest inputs with the same coverage.
    fn save(&self) -> Result<()> {
        let (corpus, seeds) = (self.corpus()?, self.seeds()?);
        let merged = cleared("merged", &self.name)?;
        let mut program = self.program(&merged)?;
        program.arg(seeds).arg(corpus);
        ensure!(
            self.passes(program.args(["-set_cover_merge=1", "-verbosity=0", "-print_funcs=0"]))?,
            "merging the inputs of {} failed",
            self.name
        );
        let archive = self.archive();
        fs::create_dir_all(archive.parent().context("a directory")?)?;
        let mut tar = Command::new("tar");
        tar.args(["--sort=name", "--mtime=@0", "--owner=0", "--group=0"])
            .args(["--numeric-owner", "--mode=0644", "-I", "gzip -n9"])
            .arg("-cf")
            .arg(&archive)
            .arg("-C")
            .arg(&merged);
        for entry in fs::read_dir(&merged)? {
            tar.arg(entry?.file_name());
        }
        checked(&mut tar, "packing the inputs")?;
        println!("saved: {}", archive.display());
        Ok(())
    }

    fn archive(&self) -> PathBuf {
        let name = format!("fuzz/seeds/{}.tar.gz", self.name);
        paths::workspace().join(name)
    }

    /// Unpacks the saved inputs into a directory.
    fn seeds(&self) -> Result<PathBuf> {
        let dir = cleared("seeds", &self.name)?;
        let archive = self.archive();
        if archive.exists() {
            let mut tar = Command::new("tar");
            tar.arg("-xzf").arg(archive).arg("-C").arg(&dir);
            checked(&mut tar, "unpacking the inputs")?;
        }
        Ok(dir)
    }

    /// The directory of the inputs that searches find.
    fn corpus(&self) -> Result<PathBuf> {
        let dir = directory().join("corpus").join(&self.name);
        fs::create_dir_all(&dir)?;
        Ok(dir)
    }

    /// Returns the program, with `inputs` as its first directory of inputs.
    fn program(&self, inputs: &Path) -> Result<Command> {
        let artifacts = directory().join("artifacts").join(&self.name);
        fs::create_dir_all(&artifacts)?;
        let program = directory()
            .join(Arch::native().target())
            .join("release")
            .join(&self.name);
        let mut command = Command::new(program);
        command
            .arg(inputs)
            .arg(format!("-artifact_prefix={}/", artifacts.display()))
            .arg(format!("-timeout={INPUT_LIMIT_S}"))
            .args(&self.options)
            .stdin(Stdio::null());
        Ok(command)
    }

    /// Runs the program, which names the failed input.
    fn passes(&self, program: &mut Command) -> Result<bool> {
        println!("\n== fuzz target {}", self.name);
        let status = program
            .status()
            .with_context(|| format!("cannot run {}", self.name))?;
        Ok(status.success())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_and_their_options_come_from_the_manifest() {
        let names: Vec<_> = targets().unwrap().into_iter().map(|one| one.name).collect();
        assert!(
            names.contains(&"virtio_iommu_requests".to_owned()),
            "{names:?}"
        );
        let options = serde_json::json!(["-detect_leaks=0"]);
        assert_eq!(target("rings", &options).options, ["-detect_leaks=0"]);
        assert!(target("rings", &Value::Null).options.is_empty());
    }
}
