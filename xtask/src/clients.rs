//! Third-party clients of the API: a generator of requests for a real server.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::packages::checked;
use crate::paths;

/// A user without write permission, used when this process is root: requests name files, and the
/// server writes its log and its metrics there.
const NOBODY: u32 = 65534;

/// Seed of the requests: they are the same each time.
const SEED: &str = "1";

/// A Python environment with the clients, created once. The error names the missing part.
pub fn environment() -> Result<PathBuf> {
    let list = paths::workspace().join("api/tests/clients/requirements.txt");
    let dir = paths::cache()?.join("clients");
    let recipe = fs::read_to_string(&list)?;
    paths::made_once(&dir, &recipe, |dir| {
        eprintln!("clients: fetching {}", list.display());
        let mut python = Command::new("python3");
        checked(python.args(["-m", "venv"]).arg(dir), "python3 -m venv")
            .context("python3 with venv and pip is needed (apt install python3-venv)")?;
        let mut pip = Command::new(dir.join("bin/python"));
        pip.args(["-m", "pip", "install", "--quiet", "--requirement"]);
        checked(pip.arg(&list), "pip install")
    })?;
    Ok(dir)
}

/// Whether a server without a started machine answers requests generated from its document as that
/// says.
pub fn agree_with_document(environment: &Path, portcullis: &Path) -> Result<bool> {
    let scratch = Scratch::new()?;
    let binary = scratch.dir.join("portcullis");
    fs::copy(portcullis, &binary)?;
    let socket = scratch.dir.join("api.sock");
    let mut server = Command::new(&binary);
    server
        .args(["serve", "--api-socket"])
        .arg(&socket)
        .current_dir(&scratch.dir)
        .stdin(Stdio::null());
    if scratch.runs_as_nobody {
        server.uid(NOBODY).gid(NOBODY);
    }
    let mut server = Server(server.spawn().context("cannot start the server")?);
    server.wait_for(&socket)?;

    let bin = environment.join("bin");
    let mut client = Command::new(bin.join("python"));
    client
        .arg(paths::workspace().join("api/tests/clients/schema_driven.py"))
        .arg(&socket)
        .args(["--seed", SEED])
        .env("PATH", paths::search_path(&bin))
        .current_dir(&scratch.dir);
    let status = client.status().context("cannot start the client")?;
    Ok(status.success())
}

/// A directory for the server and the files that requests name.
struct Scratch {
    dir: PathBuf,
    runs_as_nobody: bool,
}

impl Scratch {
    fn new() -> Result<Self> {
        let name = format!("portcullis-clients-{}", std::process::id());
        let dir = std::env::temp_dir().join(name);
        fs::create_dir(&dir).with_context(|| format!("cannot create {}", dir.display()))?;
        fs::set_permissions(&dir, Permissions::from_mode(0o700))?;
        let runs_as_nobody = fs::metadata("/proc/self")?.uid() == 0;
        if runs_as_nobody {
            chown(&dir, Some(NOBODY), Some(NOBODY))?;
        }
        Ok(Self {
            dir,
            runs_as_nobody,
        })
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
    }
}

struct Server(Child);

impl Server {
    fn wait_for(&mut self, socket: &Path) -> Result<()> {
        for _ in 0..200 {
            if socket.exists() {
                return Ok(());
            }
            let ended = self.0.try_wait()?;
            ensure!(ended.is_none(), "the server has ended: {ended:?}");
            sleep(Duration::from_millis(50));
        }
        anyhow::bail!("the server does not listen")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
