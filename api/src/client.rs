//! The client: one request on its own connection.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

/// Upper bound on the bytes of an answer. A page of mappings has a tenth of it.
const MAX_ANSWER: usize = 4 << 20;

/// Upper bound on the path of a socket, in bytes: `sun_path` of unix(7) less the NUL.
pub(crate) const MAX_PATH: usize = 107;

/// Error of a request without an answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The path does not exist.
    #[error("no machine is at {0}: there is no such socket; is its monitor running?")]
    NoSocket(PathBuf),
    /// The path names a file that is not a socket.
    #[error("{0} is not a socket; give the path of the machine's --api-socket")]
    NotASocket(PathBuf),
    /// The path exceeds the kernel's socket address.
    #[error(
        "the path of a socket has 1 to {MAX_PATH} bytes and this one has {0}; use a shorter one"
    )]
    PathLength(usize),
    /// No server accepts connections at the socket.
    #[error("no machine is at {0} any more: its monitor ended and left the socket behind")]
    Refused(PathBuf),
    /// Another user owns the socket.
    #[error("not permitted to connect to {0}; run this as the user who runs the machine")]
    NotPermitted(PathBuf),
    /// The server did not answer in time.
    #[error("the machine at {0} does not answer")]
    Silent(PathBuf),
    /// The answer is not HTTP, or is too long.
    #[error("what answers at {0} is not a machine: {1}")]
    NotHttp(PathBuf, &'static str),
    /// Another error of the host.
    #[error("cannot talk to the machine at {path}")]
    Host {
        /// Path of the socket.
        path: PathBuf,
        /// Error of the host.
        source: io::Error,
    },
}

/// Answer of a machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The bytes after the head; empty in a 204.
    pub body: Vec<u8>,
}

/// Sends one request to the machine at `path` and waits at most `timeout` for its answer. `target`
/// and `method` must not contain spaces or control characters.
///
/// # Errors
/// The server does not answer. A status of 400 or more is an answer.
pub fn request(
    path: &Path,
    (method, target): (&str, &str),
    body: Option<&str>,
    timeout: Duration,
) -> Result<Answer, ClientError> {
    if let Err(length) = check_length(path) {
        return Err(ClientError::PathLength(length));
    }
    let give_up = Instant::now() + timeout;
    let explain = |source| explain(path, source);
    let mut stream = connect(path, timeout)
        .ok_or_else(|| ClientError::Silent(path.to_owned()))?
        .map_err(explain)?;
    stream.set_write_timeout(Some(timeout)).map_err(explain)?;
    let mut request = format!("{method} {target} HTTP/1.1\r\nHost: localhost\r\n");
    request.push_str("Connection: close\r\n");
    if let Some(body) = body {
        let length = body.len();
        request.push_str("Content-Type: application/json\r\n");
        request.push_str(&format!("Content-Length: {length}\r\n"));
    }
    request.push_str("\r\n");
    request.push_str(body.unwrap_or_default());
    // A server that refuses a request early may close before it has read all bytes; its answer
    // counts.
    match stream.write_all(request.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => return Err(explain(error)),
        _ => {}
    }
    let bytes = read_to_end(&mut stream, give_up, path)?;
    parse(&bytes).map_err(|problem| ClientError::NotHttp(path.to_owned(), problem))
}

fn read_to_end(
    stream: &mut UnixStream,
    give_up: Instant,
    path: &Path,
) -> Result<Vec<u8>, ClientError> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 16 << 10];
    loop {
        let left = give_up.saturating_duration_since(Instant::now());
        // A timeout of zero would mean no timeout.
        let left = left.max(Duration::from_millis(1));
        stream
            .set_read_timeout(Some(left))
            .map_err(|source| explain(path, source))?;
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(bytes),
            Ok(count) => bytes.extend(chunk.iter().take(count)),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::ConnectionReset => return Ok(bytes),
            Err(source) => return Err(explain(path, source)),
        }
        if bytes.len() > MAX_ANSWER {
            return Err(ClientError::NotHttp(path.to_owned(), "it says too much"));
        }
    }
}

fn parse(bytes: &[u8]) -> Result<Answer, &'static str> {
    let mut headers = [httparse::EMPTY_HEADER; 32];
    let mut head = httparse::Response::new(&mut headers);
    let head_len = match head.parse(bytes) {
        Ok(httparse::Status::Complete(len)) => len,
        Ok(httparse::Status::Partial) if bytes.is_empty() => return Err("it says nothing"),
        Ok(httparse::Status::Partial) => return Err("it breaks off"),
        Err(_) => return Err("it does not speak HTTP"),
    };
    let body = bytes.get(head_len..).unwrap_or_default();
    let announced = head
        .headers
        .iter()
        .find(|header| header.name.eq_ignore_ascii_case("content-length"))
        .map_or(Some(0), |header| {
            std::str::from_utf8(header.value)
                .ok()?
                .parse::<usize>()
                .ok()
        });
    if announced != Some(body.len()) {
        return Err("it breaks off");
    }
    Ok(Answer {
        status: head.code.unwrap_or_default(),
        body: body.to_vec(),
    })
}

fn explain(path: &Path, source: io::Error) -> ClientError {
    let path = path.to_owned();
    match source.kind() {
        ErrorKind::NotFound => ClientError::NoSocket(path),
        ErrorKind::ConnectionRefused | ErrorKind::PermissionDenied if is_other_file(&path) => {
            ClientError::NotASocket(path)
        }
        ErrorKind::ConnectionRefused => ClientError::Refused(path),
        ErrorKind::PermissionDenied => ClientError::NotPermitted(path),
        ErrorKind::WouldBlock | ErrorKind::TimedOut => ClientError::Silent(path),
        _ => ClientError::Host { path, source },
    }
}

/// Whether `path` names a file that is not a socket.
fn is_other_file(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|metadata| !metadata.file_type().is_socket())
}

/// Checks that the path fits a socket address; the error is its length in bytes.
pub(crate) fn check_length(path: &Path) -> Result<(), usize> {
    let length = path.as_os_str().len();
    if (1..=MAX_PATH).contains(&length) {
        Ok(())
    } else {
        Err(length)
    }
}

/// Connects within `timeout`. `None` when the time is over, as with a blocked server whose queue
/// is full.
pub(crate) fn connect(path: &Path, timeout: Duration) -> Option<io::Result<UnixStream>> {
    let (sender, receiver) = mpsc::channel();
    let path = path.to_owned();
    let thread = thread::Builder::new().name("connect".to_owned());
    if let Err(error) = thread.spawn(move || sender.send(UnixStream::connect(path))) {
        return Some(Err(error));
    }
    receiver.recv_timeout(timeout).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Directory;
    use std::os::unix::net::UnixListener;

    const TIMEOUT: Duration = Duration::from_secs(10);

    fn error(path: &Path, timeout: Duration) -> String {
        request(path, ("GET", "/"), None, timeout)
            .unwrap_err()
            .to_string()
    }

    /// Returns the error against a server that sends `words` and closes.
    fn error_after(words: &'static [u8]) -> String {
        let directory = Directory::new();
        let path = directory.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 512];
            let count = stream.read(&mut request).unwrap();
            assert!(request[..count].starts_with(b"GET / HTTP/1.1\r\n"));
            stream.write_all(words).unwrap();
        });
        let error = error(&path, TIMEOUT);
        server.join().unwrap();
        error
    }

    #[test]
    fn each_reason_for_no_answer_has_its_own_text() {
        let directory = Directory::new();
        let path = directory.path().join("s");
        assert!(error(&path, TIMEOUT).contains("no such socket"));
        let listener = UnixListener::bind(&path).unwrap();
        let silent = error(&path, Duration::from_millis(20));
        assert!(silent.contains("does not answer"), "{silent}");
        drop(listener);
        assert!(error(&path, TIMEOUT).contains("left the socket behind"));
        let file = directory.path().join("f");
        fs::write(&file, "").unwrap();
        for path in [&file, directory.path()] {
            let text = error(path, TIMEOUT);
            assert!(text.contains("is not a socket"), "{text}");
        }
        for length in [0, 108, 5000] {
            let text = error(Path::new(&"x".repeat(length)), TIMEOUT);
            assert!(text.contains(&format!("this one has {length};")), "{text}");
        }
    }

    #[test]
    fn bytes_that_are_not_an_answer_are_an_error() {
        assert!(error_after(b"").contains("says nothing"));
        assert!(error_after(b"HTTP/1.1 200 OK\r\n").contains("breaks off"));
        let short = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nab";
        assert!(error_after(short).contains("breaks off"));
        assert!(error_after(b"220 mail ready\r\n\r\n").contains("does not speak HTTP"));
    }
}
