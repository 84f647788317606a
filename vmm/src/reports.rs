//! Reports from other threads to the event loop.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{self, Receiver, Sender};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::ending::Ending;

/// Reports the machine's end to the event loop, from any thread. Never blocks;
/// of several reports the first counts.
#[derive(Debug)]
pub(crate) struct Reporter {
    reports: Sender<Ending>,
    wake: EventFd,
}

/// The event loop's end of the channel. Its descriptor is readable when a
/// report may be there.
#[derive(Debug)]
pub(crate) struct Reports {
    reports: Receiver<Ending>,
    wake: EventFd,
}

/// Creates the channel from other threads to the event loop.
///
/// # Errors
/// No file descriptor is left.
pub(crate) fn channel() -> io::Result<(Reporter, Reports)> {
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
    /// Creates another sender to the same event loop.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        Ok(Self {
            reports: self.reports.clone(),
            wake: self.wake.try_clone()?,
        })
    }

    /// Makes the event loop poll its control events.
    pub(crate) fn wake(&self) {
        // A full counter is readable.
        let _ = self.wake.write(1);
    }

    /// Reports the machine's ending.
    pub(crate) fn ended(&self, ending: Ending) {
        // An event loop that has ended has received an earlier ending.
        let _ = self.reports.send(ending);
        self.wake();
    }
}

impl Reports {
    /// Returns the first report since the last call, if there is one.
    pub(crate) fn take(&self) -> Option<Ending> {
        let _ = self.wake.read();
        let first = self.reports.try_recv().ok()?;
        // A guest may cause reports faster than the loop ends it.
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
