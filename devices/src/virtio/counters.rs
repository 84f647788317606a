//! Counters of the devices and their back ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::vhost::IotlbMonitor;

/// Counters of a device, by its kind; shared with the device.
#[derive(Clone, Default)]
pub enum DeviceCounters {
    /// The device has no counters.
    #[default]
    None,
    /// Counters of a disk.
    Block(Arc<BlockCounters>),
    /// Counters of a device whose back end is the kernel's vhost.
    Vhost {
        /// The IOTLB of each vhost file.
        iotlbs: Vec<IotlbMonitor>,
        /// Counters of a network device; `None` for a socket device.
        net: Option<Arc<NetCounters>>,
    },
}

/// Counters of a disk.
#[derive(Debug, Default)]
pub struct BlockCounters {
    /// Bytes the guest read.
    pub read_bytes: AtomicU64,
    /// Bytes the guest wrote.
    pub written_bytes: AtomicU64,
    /// Requests of any kind.
    pub requests: AtomicU64,
    /// Requests that ended in an error.
    pub errors: AtomicU64,
}

/// Counters of a network device, and its link.
#[derive(Debug, Default)]
pub struct NetCounters {
    /// Commands of the control queue.
    pub control_commands: AtomicU64,
    /// Commands that were answered with `VIRTIO_NET_ERR`.
    pub control_errors: AtomicU64,
    /// `VIRTIO_NET_S_LINK_UP` (virtio 1.2 §5.1.4).
    pub link_up: AtomicBool,
}

impl NetCounters {
    /// Counts a command of the control queue; `done` is `false` for an error.
    pub(super) fn count_command(&self, done: bool) {
        self.control_commands.fetch_add(1, Ordering::Relaxed);
        let errors = u64::from(!done);
        self.control_errors.fetch_add(errors, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_their_errors_are_counted() {
        let counters = NetCounters::default();
        for done in [true, false, false] {
            counters.count_command(done);
        }
        let counted = [&counters.control_commands, &counters.control_errors];
        assert_eq!(counted.map(|it| it.load(Ordering::Relaxed)), [3, 2]);
    }
}
