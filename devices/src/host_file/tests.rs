use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::thread;

use vmm_sys_util::tempfile::TempFile;

use super::*;
use crate::error::Chain;
use crate::testing;

/// A path without a file, in a directory that is removed with the guard.
fn absent_path() -> (PathBuf, TempFile) {
    let guard = TempFile::new().unwrap();
    let mut path = guard.as_path().to_owned();
    path.as_mut_os_string().push("-made");
    (path, guard)
}

fn refusal(result: Result<File, FileError>) -> String {
    Chain(&result.unwrap_err()).to_string()
}

#[test]
fn files_that_would_block_or_act_are_not_opened_as_an_output() {
    let socket = absent_path().0;
    let _listener = UnixListener::bind(&socket).unwrap();
    for (path, is) in [
        (Path::new("/dev/zero"), "a character device"),
        (Path::new("/dev/ptmx"), "a character device"),
        (Path::new("/proc/self/mem"), "an interface of the kernel"),
        (Path::new("/tmp"), "a directory"),
        (&socket, "a socket"),
    ] {
        let refused = refusal(open_output(path));
        let expected = format!("is not a regular file or a FIFO: it is {is}");
        assert_eq!(refused, expected, "{}", path.display());
    }
    fs::remove_file(socket).unwrap();
    let refused = refusal(open_output(Path::new("/nowhere/log")));
    assert!(
        refused.starts_with("cannot be opened to append: No such file"),
        "{refused}"
    );
}

#[test]
fn created_output_has_mode_0600_and_is_appended_to() {
    let (path, _guard) = absent_path();
    for text in ["one", "two"] {
        open_output(&path)
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
    }
    assert_eq!(fs::read_to_string(&path).unwrap(), "onetwo");
    let mode = fs::metadata(&path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    fs::remove_file(path).unwrap();
}

#[test]
fn fifo_without_a_peer_does_not_block() {
    let fifo = testing::fifo();
    let mut output = open_output(&fifo.0).unwrap();
    // More than the capacity of a FIFO: an error, not a wait.
    let written = output.write_all(&vec![0; 1 << 21]);
    assert_eq!(written.unwrap_err().kind(), io::ErrorKind::WouldBlock);
    for result in [open_boot_file(&fifo.0), open_image(&fifo.0, true)] {
        assert!(refusal(result).ends_with("it is a FIFO"));
    }
    open_output(Path::new("/dev/null")).unwrap();
}

#[test]
fn text_comes_from_a_file_or_through_a_fifo() {
    let file = TempFile::new().unwrap();
    file.as_file().write_all(b"{}").unwrap();
    assert_eq!(read_text(file.as_path(), 2).unwrap(), "{}");
    assert!(matches!(
        read_text(file.as_path(), 1),
        Err(FileError::TooLong(1))
    ));
    let fifo = testing::fifo();
    let writer = {
        let path = fifo.0.clone();
        thread::spawn(move || {
            let mut file = OpenOptions::new().write(true).open(path).unwrap();
            for _ in 0..3 {
                file.write_all(&[b'x'; 5000]).unwrap();
            }
        })
    };
    assert_eq!(read_text(&fifo.0, 20_000).unwrap().len(), 15_000);
    writer.join().unwrap();
    assert!(read_text(Path::new("/dev/zero"), 20).is_err());
}
