//! Directories of this workspace, and files that are made at most once.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// Top directory of the source tree.
pub fn workspace() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_owned()
}

/// Cargo's output directory.
pub fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}

/// Directory of packages and of the images made from them; several checkouts may share it.
pub fn cache() -> Result<PathBuf> {
    let dir =
        std::env::var_os("PORTCULLIS_CACHE").map_or_else(|| target().join("cache"), PathBuf::from);
    fs::create_dir_all(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
    dir.canonicalize()
        .with_context(|| format!("cannot resolve {}", dir.display()))
}

/// A `PATH` with `first` at its beginning.
pub fn search_path(first: &Path) -> String {
    let rest = std::env::var("PATH").unwrap_or_default();
    format!("{}:{rest}", first.display())
}

/// Makes `dir` by calling `make` with an empty directory, unless it was made by the same `recipe`.
/// Concurrent callers wait; a failed attempt leaves no directory that looks complete.
pub fn made_once(dir: &Path, recipe: &str, make: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let parent = dir.parent().context("directory without a parent")?;
    fs::create_dir_all(parent)?;
    let mut lock = dir.as_os_str().to_owned();
    lock.push(".lock");
    let lock = File::create(lock)?;
    lock.lock()?;
    let stamp = dir.join(".recipe");
    if fs::read_to_string(&stamp).is_ok_and(|made_by| made_by == recipe) {
        return Ok(());
    }
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot clear {}", dir.display()))?;
    }
    fs::create_dir_all(dir)?;
    make(dir)?;
    fs::write(stamp, recipe)?;
    Ok(())
}
