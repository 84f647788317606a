//! What other threads tell the event loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{self, Receiver, Sender};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::ending::Ending;

/// Where a thread that sees the machine end says so. Never blocks; of several
/// reports the first counts.
#[derive(Debug)]
pub struct Reporter {
    reports: Sender<Ending>,
    wake: EventFd,
}

/// Where the event loop hears it. Readable as a file when there may be one.
#[derive(Debug)]
pub struct Reports {
    reports: Receiver<Ending>,
    wake: EventFd,
}

/// A way from any thread to the event loop.
///
/// # Errors
/// No more file descriptors.
pub fn channel() -> io::Result<(Reporter, Reports)> {
    let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let (sender, receiver) = mpsc::channel();
    let reporter = Reporter {
        reports: sender,
        wake: wake.try_clone()?,
    };
    let reports = Reports {
        reports: receiver,
        wake,
    };
    Ok((reporter, reports))
}

impl Reporter {
    /// Another way to the same event loop.
    ///
    /// # Errors
    /// No more file descriptors.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            reports: self.reports.clone(),
            wake: self.wake.try_clone()?,
        })
    }

    /// Makes the event loop look at what changed.
    pub fn wake(&self) {
        // A full counter is readable.
        let _ = self.wake.write(1);
    }

    /// Says how the machine ended.
    pub fn ended(&self, ending: Ending) {
        // A loop that has left has heard of an earlier ending.
        let _ = self.reports.send(ending);
        self.wake();
    }
}

impl Reports {
    /// The first report since the last call, if there is one.
    pub fn take(&self) -> Option<Ending> {
        let _ = self.wake.read();
        let first = self.reports.try_recv().ok()?;
        // A guest may report endings faster than it is ended.
        while self.reports.try_recv().is_ok() {}
        Some(first)
    }
}

impl AsRawFd for Reports {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_report_counts() {
        let (reporter, reports) = channel().unwrap();
        assert_eq!(reports.take(), None);
        let other = reporter.try_clone().unwrap();
        other.ended(Ending::Reset);
        reporter.ended(Ending::PoweredOff);
        assert_eq!(reports.take(), Some(Ending::Reset));
        assert_eq!(reports.take(), None);
    }
}
