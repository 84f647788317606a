//! Writes an initramfs: the kernel's "newc" cpio, with device nodes, without root.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};

#[derive(Clone)]
enum Entry {
    Directory,
    File { data: Vec<u8>, mode: u32 },
    Link(String),
    CharDevice { major: u32, minor: u32 },
}

/// The files of an initramfs by their path, which has no leading slash.
#[derive(Clone, Default)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// Adds an empty directory and its parents.
    pub fn directory(&mut self, path: &str) {
        self.parents(path);
        self.entries
            .entry(path.to_owned())
            .or_insert(Entry::Directory);
    }

    /// Adds a file from memory.
    pub fn file(&mut self, path: &str, mode: u32, data: Vec<u8>) {
        self.put(path, Entry::File { data, mode });
    }

    /// Adds a file from this machine, links followed.
    pub fn copy(&mut self, path: &str, from: &Path) -> Result<()> {
        let context = || format!("cannot read {}", from.display());
        let mode = fs::metadata(from)
            .with_context(context)?
            .permissions()
            .mode()
            & 0o777;
        let data = fs::read(from).with_context(context)?;
        self.file(path, mode, data);
        Ok(())
    }

    /// Adds a symbolic link.
    pub fn link(&mut self, path: &str, to: &str) {
        self.put(path, Entry::Link(to.to_owned()));
    }

    /// Adds a character device.
    pub fn char_device(&mut self, path: &str, major: u32, minor: u32) {
        self.put(path, Entry::CharDevice { major, minor });
    }

    /// Writes the archive.
    pub fn write(&self, to: &Path) -> Result<()> {
        let file = File::create(to).with_context(|| format!("cannot write {}", to.display()))?;
        let mut out = BufWriter::new(file);
        for (inode, (path, entry)) in (1u32..).zip(&self.entries) {
            let (mode, data, device) = match entry {
                Entry::Directory => (0o040_755, &[][..], (0, 0)),
                Entry::File { data, mode } => (0o100_000 | mode, data.as_slice(), (0, 0)),
                Entry::Link(to) => (0o120_777, to.as_bytes(), (0, 0)),
                Entry::CharDevice { major, minor } => (0o020_600, &[][..], (*major, *minor)),
            };
            member(&mut out, path, [inode, mode], data, device)?;
        }
        member(&mut out, "TRAILER!!!", [0, 0], &[], (0, 0))?;
        out.flush()?;
        Ok(())
    }

    fn put(&mut self, path: &str, entry: Entry) {
        self.parents(path);
        self.entries.insert(path.to_owned(), entry);
    }

    fn parents(&mut self, path: &str) {
        if let Some((parent, _)) = path.rsplit_once('/') {
            self.directory(parent);
        }
    }
}

fn member(
    out: &mut impl Write,
    path: &str,
    [inode, mode]: [u32; 2],
    data: &[u8],
    (major, minor): (u32, u32),
) -> Result<()> {
    let size = u32::try_from(data.len()).ok();
    ensure!(size.is_some(), "{path} is too big for an initramfs");
    let fields = [
        inode,
        mode,
        0, // uid
        0, // gid
        1, // links
        0, // time: the same files make the same archive
        size.unwrap_or_default(),
        0,
        0,
        major,
        minor,
        u32::try_from(path.len() + 1)?,
        0,
    ];
    let mut header = String::from("070701");
    for field in fields {
        header += &format!("{field:08X}");
    }
    header += path;
    header.push('\0');
    out.write_all(header.as_bytes())?;
    out.write_all(&[0; 3][..padding(header.len())])?;
    out.write_all(data)?;
    out.write_all(&[0; 3][..padding(data.len())])?;
    Ok(())
}

/// Bytes to the next multiple of four.
fn padding(length: usize) -> usize {
    length.next_multiple_of(4) - length
}
