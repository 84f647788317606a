//! The queue of actions for the controller, with a callback for each outcome.

use super::error::ActionError;
use super::reply::Outcome;
use super::request::Action;
use devices::error::Chain;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Upper bound on calls that wait for the controller.
const MAX_WAITING: usize = 64;

/// Error of [`Client::send`]: the action was not queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// The queue is full.
    #[error("too many requests wait for the machine; try again")]
    Full,
    /// The [`Inbox`] was dropped.
    #[error("the machine has ended")]
    Gone,
}

/// An action and the callback for its outcome.
pub struct Call {
    /// The action to perform.
    pub action: Action,
    /// The sender prints an error, so that the log needs none.
    pub(crate) prints_error: bool,
    answer: Answer,
}

/// Sends an outcome once. Dropped without one, it sends [`ActionError::Unanswered`].
struct Answer(Option<Box<dyn FnOnce(Outcome) + Send>>);

impl Answer {
    fn send(&mut self, outcome: Outcome) {
        if let Some(deliver) = self.0.take() {
            deliver(outcome);
        }
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        self.send(Err(ActionError::Unanswered));
    }
}

impl Call {
    fn new(action: Action, deliver: impl FnOnce(Outcome) + Send + 'static) -> Self {
        Self {
            action,
            prints_error: false,
            answer: Answer(Some(Box::new(deliver))),
        }
    }

    /// Creates a call whose outcome nothing waits for.
    pub(crate) fn unanswered(action: Action) -> Self {
        Self::new(action, drop)
    }

    /// Creates a call of the command line, which prints an error itself. The receiver gets the
    /// outcome.
    pub(crate) fn printed(action: Action) -> (Self, Receiver<Outcome>) {
        let (deliver, outcome) = mpsc::channel();
        let mut call = Self::new(action, move |outcome| {
            let _ = deliver.send(outcome);
        });
        call.prints_error = true;
        (call, outcome)
    }

    /// Splits the call, so that the action can be consumed before the outcome is sent.
    pub fn split(self) -> (Action, impl FnOnce(Outcome) + Send) {
        let Self {
            action, mut answer, ..
        } = self;
        (action, move |outcome| answer.send(outcome))
    }

    /// Sends the outcome and drops the action.
    pub fn answer(mut self, outcome: Outcome) {
        self.answer.send(outcome);
    }
}

/// Queues actions for the controller. Cheap to clone: one for each thread.
#[derive(Clone)]
pub struct Client {
    calls: SyncSender<Call>,
    wake: Arc<EventFd>,
}

impl Client {
    /// Queues `action` and returns at once. `deliver` is called exactly once, on the controller's
    /// thread, unless this returns an error; it must not block.
    ///
    /// # Errors
    /// The queue is full, or the [`Inbox`] was dropped.
    pub fn send(
        &self,
        action: Action,
        deliver: impl FnOnce(Outcome) + Send + 'static,
    ) -> Result<(), SendError> {
        let refused = match self.calls.try_send(Call::new(action, deliver)) {
            Ok(()) => {
                // It fails only when the counter would overflow, and then it is readable anyway.
                let _ = self.wake.write(1);
                return Ok(());
            }
            Err(refused) => refused,
        };
        let (mut call, error) = match refused {
            TrySendError::Full(call) => (call, SendError::Full),
            TrySendError::Disconnected(call) => (call, SendError::Gone),
        };
        call.answer.0 = None;
        Err(error)
    }

    /// Sends `action` and waits for its outcome. On the controller's own thread it deadlocks.
    ///
    /// # Errors
    /// The action was not queued, was refused, or failed.
    pub fn call(&self, action: Action) -> Outcome {
        let (deliver, outcome) = mpsc::sync_channel(1);
        self.send(action, move |outcome| {
            let _ = deliver.send(outcome);
        })
        .map_err(|error| ActionError::Failed(Chain(&error).to_string()))?;
        outcome.recv().unwrap_or(Err(ActionError::Unanswered))
    }
}

/// The controller's end of the queue.
pub struct Inbox {
    calls: Receiver<Call>,
    wake: Arc<EventFd>,
}

impl Inbox {
    /// Clears the wake-up event. Call it when [`AsRawFd`]'s descriptor is readable and before
    /// [`Inbox::next_call`]: a later call then signals the event again.
    pub(crate) fn acknowledge(&self) {
        // It fails only when there was none.
        let _ = self.wake.read();
    }

    /// Returns the next queued call, or `None`. Never blocks.
    pub(crate) fn next_call(&self) -> Option<Call> {
        self.calls.try_recv().ok()
    }

    /// Blocks until a call is queued; `None` when every [`Client`] is dropped.
    pub fn wait(&self) -> Option<Call> {
        self.calls.recv().ok()
    }
}

/// Readable when a call may wait.
impl AsRawFd for Inbox {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// Creates the queue of a controller.
///
/// # Errors
/// The host has no file descriptor left.
pub fn channel() -> io::Result<(Client, Inbox)> {
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let (sender, calls) = mpsc::sync_channel(MAX_WAITING);
    let client = Client {
        calls: sender,
        wake: Arc::clone(&wake),
    };
    Ok((client, Inbox { calls, wake }))
}
