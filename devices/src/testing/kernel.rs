//! The kernel's side of a vhost file.

use std::collections::VecDeque;
use std::io;
use std::sync::{Mutex, MutexGuard};

use iommu::{Access, Iova};

use crate::vhost::iotlb::Channel;
use crate::vhost::message::{Message, Miss, UnknownMessage, parse_message};
use crate::vhost::shadow::Entry;

/// A naive model of the kernel: a list of entries, misses to be read, and
/// misses that were read and wait for an answer.
#[derive(Default)]
pub struct Kernel(Mutex<KernelState>);

#[derive(Default)]
pub struct KernelState {
    /// Entries that the list can hold; 0 is no limit.
    pub limit: usize,
    pub list: Vec<Entry>,
    pub to_read: VecDeque<Result<Miss, UnknownMessage>>,
    pub unanswered: Vec<Iova>,
    pub woken: Vec<Iova>,
    pub invalidations: usize,
    /// Every message is refused.
    pub refuses: bool,
    pub halted: bool,
}

impl Kernel {
    pub fn state(&self) -> MutexGuard<'_, KernelState> {
        self.0.lock().unwrap()
    }

    /// Accesses a byte for a queue. Returns whether it can; otherwise the queue
    /// reports a miss, or an error where an entry forbids the access.
    pub fn access(&self, iova: u64, access: Access) -> bool {
        let mut state = self.state();
        let iova = Iova(iova);
        let held = state.list.iter().find(|entry| entry.iova.contains(iova));
        match held.map(|entry| entry.perm.allows(access)) {
            Some(may) => may,
            None => {
                state.to_read.push_back(Ok(Miss { iova, access }));
                false
            }
        }
    }

    pub fn holds(&self, iova: u64) -> Option<Entry> {
        let state = self.state();
        let mut holders = state.list.iter().filter(|e| e.iova.contains(Iova(iova)));
        holders.next().copied()
    }
}

impl Channel for Kernel {
    fn send(&self, message: &Message) -> io::Result<()> {
        let bytes = message.to_bytes().expect("a message has a form");
        let mut state = self.state();
        if state.refuses {
            return Err(io::Error::from_raw_os_error(libc::EFAULT));
        }
        match parse_message(&bytes).expect("the kernel understands it") {
            Message::Update(entry) => {
                if state.limit != 0 && state.list.len() == state.limit {
                    state.list.remove(0);
                }
                state.list.push(entry);
                let (woken, still) = (state.unanswered.iter())
                    .partition::<Vec<Iova>, _>(|iova| entry.iova.contains(**iova));
                state.woken.extend(woken);
                state.unanswered = still;
            }
            Message::Invalidate(range) => {
                state.invalidations += 1;
                state.list.retain(|entry| !entry.iova.overlaps(range));
            }
        }
        Ok(())
    }

    fn receive(&self) -> io::Result<Option<Miss>> {
        let mut state = self.state();
        let miss = state.to_read.pop_front().transpose();
        let miss = miss.map_err(io::Error::other)?;
        state.unanswered.extend(miss.map(|miss| miss.iova));
        Ok(miss)
    }

    fn halt(&self) {
        self.state().halted = true;
    }
}
