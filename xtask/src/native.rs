//! Runs a command on this machine, with the programs, images and variables of the lab.

use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::guest;
use crate::paths;

/// A command with a time limit, without its program and arguments: the caller adds them. `programs`
/// are in its `PATH`; the one called `portcullis` is the program under test. `guest_tools` is an
/// initramfs segment appended to those of the guests.
pub fn command(
    arch: Arch,
    programs: &[(String, PathBuf)],
    guest_tools: Option<&Path>,
    limit: Duration,
) -> Result<Command> {
    let images = guest::prepare(arch)?;
    let dir = paths::target().join("native");
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    let (bin, guest) = (dir.join("bin"), dir.join("guest"));
    fs::create_dir_all(&bin)?;
    fs::create_dir_all(&guest)?;
    for (name, program) in programs {
        fs::copy(program, bin.join(name))?;
    }
    let tools = guest_tools.map(fs::read).transpose()?.unwrap_or_default();
    for entry in fs::read_dir(&images.dir)? {
        let (from, to) = (entry?.path(), &guest);
        let name = from.file_name().context("image without a name")?;
        if from
            .extension()
            .is_some_and(|extension| extension == "cpio")
        {
            let mut data = fs::read(&from)?;
            data.extend(&tools);
            fs::write(to.join(name), data)?;
        } else {
            symlink(&from, to.join(name))?;
        }
    }
    let mut command = Command::new("timeout");
    command
        .arg(limit.as_secs().to_string())
        .env("PATH", paths::search_path(&bin))
        .env("PORTCULLIS_BIN", bin.join("portcullis"))
        .env("PORTCULLIS_GUEST_DIR", guest)
        .env("PORTCULLIS_RETRIES", dir.join("retries"))
        .stdin(Stdio::null());
    Ok(command)
}

/// The same command as the last arguments of `wrapper`, a program and its arguments.
pub fn wrapped(wrapper: &[&str], command: &Command) -> Command {
    let mut outer = Command::new(wrapper.first().unwrap_or(&"env"));
    outer
        .args(wrapper.iter().skip(1))
        .arg(command.get_program())
        .args(command.get_args());
    if let Some(dir) = command.get_current_dir() {
        outer.current_dir(dir);
    }
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => outer.env(name, value),
            None => outer.env_remove(name),
        };
    }
    outer
}

/// Runs a command, prints each line of its standard output after `label`, and passes it to
/// `on_line`. True if the command succeeded.
pub fn listen(command: &mut Command, label: &str, on_line: &mut dyn FnMut(&str)) -> Result<bool> {
    let name = command.get_program().display().to_string();
    let mut child = command
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {name}"))?;
    let output = child.stdout.take().context("no standard output")?;
    for line in BufReader::new(output).split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        writeln!(io::stdout(), "{label}{line}")?;
        on_line(line.trim_end());
    }
    Ok(child.wait()?.success())
}
