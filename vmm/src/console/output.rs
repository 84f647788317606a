//! Serial output of the guest.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use devices::legacy::SerialSink;
use devices::thread::{ThreadKind, spawn};

/// Upper bound on the bytes that wait for the reader.
const LIMIT: usize = 64 * 1024;
/// Bytes that the buffer accepts after [`SerialSink::ready`] returned true.
const FIFO: usize = 64;
/// Bytes written at a time.
const CHUNK: usize = 4096;
/// Time that the writer gathers bytes of a line in, from the first one on.
const GATHER: Duration = Duration::from_millis(1);

/// Called when a full buffer has room again.
type OnRoom = Box<dyn Fn() + Send + Sync>;

/// A bounded buffer between the guest and a file.
///
/// vCPUs fill it and never wait. A separate thread writes it out, so that a
/// reader that stops (a pager, a terminal after Ctrl-s, a full pipe) blocks
/// only that thread. While the buffer is full the guest sees a busy
/// transmitter. After a permanent write error (the reader is gone), output is
/// dropped and the guest runs on.
pub struct Output {
    buffer: Mutex<Buffer>,
    /// The buffer got its first bytes, or was closed.
    filled: Condvar,
    /// Bytes were written.
    drained: Condvar,
    on_room: OnceLock<OnRoom>,
}

#[derive(Default)]
struct Buffer {
    bytes: VecDeque<u8>,
    /// The writer waits for [`Output::filled`].
    idle: bool,
    /// [`SerialSink::ready`] returned false since there was last room.
    refused: bool,
    /// Output is dropped: the reader closed the file, or the file is at its
    /// size limit.
    broken: bool,
}

impl Output {
    /// Starts the thread that writes to `file`, at most `room` bytes if there
    /// is a limit.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(file: File, room: Option<u64>) -> io::Result<Arc<Self>> {
        let output = Arc::new(Self {
            buffer: Mutex::default(),
            filled: Condvar::new(),
            drained: Condvar::new(),
            on_room: OnceLock::new(),
        });
        let writer = Arc::clone(&output);
        // Never joined: it may be blocked in a write until the process ends.
        spawn(ThreadKind::Console, "console", move || {
            writer.write_out(Sink::new(file, room));
        })?;
        Ok(output)
    }

    /// Sets the callback for a full buffer that is half empty again. It runs on
    /// the writing thread with no lock held. Only the first call has an effect.
    pub(crate) fn on_room(&self, call: impl Fn() + Send + Sync + 'static) {
        let _ = self.on_room.set(Box::new(call));
    }

    /// Waits until everything is written, or until nothing has been written for
    /// `timeout`. Returns the number of bytes left.
    pub fn flush(&self, timeout: Duration) -> usize {
        let mut buffer = self.lock();
        let mut left = buffer.bytes.len();
        let mut deadline = Instant::now() + timeout;
        while left != 0 && !buffer.broken {
            let Some(wait) = deadline.checked_duration_since(Instant::now()) else {
                break;
            };
            let waited = self.drained.wait_timeout(buffer, wait);
            buffer = waited.unwrap_or_else(PoisonError::into_inner).0;
            if buffer.bytes.len() < left {
                deadline = Instant::now() + timeout;
            }
            left = buffer.bytes.len();
        }
        left
    }

    fn write_out(&self, mut sink: Sink) {
        let mut chunk = Vec::with_capacity(CHUNK);
        loop {
            self.next_chunk(&mut chunk);
            // Bytes leave the buffer after they are written, so that an empty
            // buffer means that everything is written.
            if sink.write(&chunk) == Written::NeverAgain {
                self.lock().broken = true;
            }
            self.remove(chunk.len());
        }
    }

    /// Waits for bytes and copies the next ones into `chunk`.
    fn next_chunk(&self, chunk: &mut Vec<u8>) {
        let mut buffer = self.lock();
        if buffer.bytes.is_empty() {
            while buffer.bytes.is_empty() {
                buffer.idle = true;
                let woken = self.filled.wait(buffer);
                buffer = woken.unwrap_or_else(PoisonError::into_inner);
            }
            buffer.idle = false;
            // A guest sends byte by byte: this delay makes one write and one
            // wake-up of a whole line.
            drop(buffer);
            thread::sleep(GATHER);
            buffer = self.lock();
        }
        chunk.clear();
        chunk.extend(buffer.bytes.iter().take(CHUNK));
    }

    fn remove(&self, count: usize) {
        let mut buffer = self.lock();
        buffer.bytes.drain(..count);
        if buffer.broken {
            buffer.bytes.clear();
        }
        let has_room = buffer.refused && buffer.bytes.len() <= LIMIT / 2;
        if has_room {
            buffer.refused = false;
        }
        drop(buffer);
        self.drained.notify_all();
        if let (true, Some(on_room)) = (has_room, self.on_room.get()) {
            on_room();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Buffer> {
        self.buffer.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl SerialSink for Output {
    fn put(&self, byte: u8) -> bool {
        let mut buffer = self.lock();
        if buffer.broken {
            return true;
        }
        if buffer.bytes.len() >= LIMIT {
            return false;
        }
        buffer.bytes.push_back(byte);
        if std::mem::take(&mut buffer.idle) {
            self.filled.notify_one();
        }
        true
    }

    fn ready(&self) -> bool {
        let mut buffer = self.lock();
        let ready = buffer.broken || buffer.bytes.len() + FIFO <= LIMIT;
        buffer.refused |= !ready;
        ready
    }
}

/// Whether another write can succeed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Written {
    GoOn,
    NeverAgain,
}

/// The file that receives the output. Refused bytes are counted, and logged
/// only at the first one and at the end: a guest decides how often it happens.
struct Sink {
    file: File,
    /// Bytes that the file may still take.
    room: Option<u64>,
    lost: u64,
}

impl Sink {
    fn new(file: File, room: Option<u64>) -> Self {
        Self {
            file,
            room,
            lost: 0,
        }
    }

    /// Writes the part of `chunk` that fits.
    fn write(&mut self, chunk: &[u8]) -> Written {
        let room = self.room.unwrap_or(u64::MAX);
        let len = chunk.len().min(usize::try_from(room).unwrap_or(usize::MAX));
        let (taken, beyond) = chunk.split_at(len);
        let (written, result) = write_all(&mut self.file, taken);
        self.room = self.room.map(|room| room.saturating_sub(written as u64));
        match result {
            Ok(()) if self.lost != 0 => {
                log::warn!("console: {} bytes are lost; going on", self.lost);
                self.lost = 0;
            }
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                log::info!("console: the reader closed the file; dropping further output");
                return Written::NeverAgain;
            }
            Err(error) => {
                if self.lost == 0 {
                    log::warn!("console: output is lost until it can be written again: {error}");
                }
                self.lost = self.lost.saturating_add((len - written) as u64);
            }
        }
        if beyond.is_empty() {
            return Written::GoOn;
        }
        log::warn!("console: the file is as long as its limit; dropping further output");
        Written::NeverAgain
    }
}

/// Writes all of `bytes`, and waits also where another process made the file
/// non-blocking. Returns the number written, and the error that stopped it.
fn write_all(file: &mut File, bytes: &[u8]) -> (usize, io::Result<()>) {
    let mut done = 0;
    while let Some(rest) = bytes.get(done..).filter(|rest| !rest.is_empty()) {
        match file.write(rest) {
            Ok(0) => return (done, Err(io::ErrorKind::WriteZero.into())),
            Ok(written) => done += written,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                thread::sleep(Duration::from_millis(10));
            }
            Err(error) => return (done, Err(error)),
        }
    }
    (done, Ok(()))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::sync::mpsc;

    use super::*;

    fn pipe() -> (io::PipeReader, Arc<Output>) {
        let (reader, writer) = io::pipe().unwrap();
        let output = Output::start(File::from(OwnedFd::from(writer)), None).unwrap();
        (reader, output)
    }

    #[test]
    fn bytes_come_out_in_order_and_flush_waits_for_them() {
        let (mut reader, output) = pipe();
        assert!(b"hello".iter().all(|&byte| output.put(byte)));
        assert_eq!(output.flush(Duration::from_secs(60)), 0);
        let mut bytes = [0; 5];
        reader.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello");
    }

    #[test]
    fn a_reader_that_stops_makes_the_transmitter_busy_until_it_reads_again() {
        let (mut reader, output) = pipe();
        let (room, has_room) = mpsc::channel();
        output.on_room(move || room.send(()).unwrap());
        let mut sent = 0;
        // The pipe fills first.
        while output.ready() || output.flush(Duration::from_millis(10)) == 0 {
            assert!(output.put(b'x'));
            sent += 1;
        }
        // After `ready`, the buffer accepts one whole FIFO.
        for _ in 0..FIFO - 1 {
            sent += usize::from(output.put(b'x'));
        }
        assert!(output.flush(Duration::from_millis(1)) > 0);
        let mut bytes = vec![0; sent];
        reader.read_exact(&mut bytes).unwrap();
        has_room.recv().unwrap();
        assert!(output.ready());
    }

    #[test]
    fn file_grows_to_its_limit_and_the_guest_goes_on() {
        let mut file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        let output = Output::start(file.try_clone().unwrap(), Some(10_000)).unwrap();
        for _ in 0..3 * LIMIT {
            if !output.ready() {
                output.flush(Duration::from_secs(60));
            }
            assert!(output.put(b'x'));
        }
        assert_eq!(output.flush(Duration::from_secs(60)), 0);
        assert_eq!(file.metadata().unwrap().len(), 10_000);
        io::Seek::rewind(&mut file).unwrap();
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, [b'x'; 10_000]);
    }

    #[test]
    fn output_that_cannot_be_written_is_counted_until_it_can_be() {
        let full = || std::fs::OpenOptions::new().write(true).open("/dev/full");
        let mut sink = Sink::new(full().unwrap(), Some(100));
        for lost in [30, 60, 90] {
            assert_eq!(sink.write(&[0; 30]), Written::GoOn);
            assert_eq!((sink.lost, sink.room), (lost, Some(100)));
        }
        sink.file = vmm_sys_util::tempfile::TempFile::new().unwrap().into_file();
        assert_eq!(sink.write(&[0; 30]), Written::GoOn);
        assert_eq!((sink.lost, sink.room), (0, Some(70)));
        assert_eq!(sink.write(&[0; 71]), Written::NeverAgain);
        assert_eq!(sink.file.metadata().unwrap().len(), 100);
    }

    #[test]
    fn output_is_dropped_after_the_reader_closed_the_file() {
        let (reader, output) = pipe();
        drop(reader);
        for _ in 0..2 * LIMIT {
            if !output.ready() {
                output.flush(Duration::from_secs(60));
            }
            assert!(output.put(b'x'));
        }
        assert_eq!(output.flush(Duration::from_secs(60)), 0);
    }
}
