//! The way from whoever asks to the controller and back.

use super::error::ActionError;
use super::reply::Outcome;
use super::request::Action;
use devices::error::Chain;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most calls that can wait for the controller at a time.
const MAX_WAITING: usize = 64;

/// Why a call could not be handed to the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SendError {
    /// Too many calls wait already.
    #[error("too many requests wait for the machine; try again")]
    Full,
    /// The controller is gone.
    #[error("the machine has ended")]
    Gone,
}

/// An action on its way, with the way back for its outcome.
pub struct Call {
    /// What is asked.
    pub action: Action,
    answer: Answer,
}

/// Sends an outcome once; if it is dropped before, [`ActionError::Unanswered`].
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
    /// Takes the call apart, so that the action can be consumed before it is answered.
    pub fn split(self) -> (Action, impl FnOnce(Outcome) + Send) {
        let Self { action, mut answer } = self;
        (action, move |outcome| answer.send(outcome))
    }

    /// Answers without taking the action apart.
    pub fn answer(mut self, outcome: Outcome) {
        self.answer.send(outcome);
    }
}

/// Where calls are made. Cheap to clone, one for each thread that asks.
#[derive(Clone)]
pub struct Client {
    calls: SyncSender<Call>,
    wake: Arc<EventFd>,
}

impl Client {
    /// Hands `action` to the controller and returns at once. `deliver` is called exactly once,
    /// on the controller's thread, unless this returns an error; it must not block.
    pub fn send(
        &self,
        action: Action,
        deliver: impl FnOnce(Outcome) + Send + 'static,
    ) -> Result<(), SendError> {
        let answer = Answer(Some(Box::new(deliver)));
        let refused = match self.calls.try_send(Call { action, answer }) {
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

    /// Asks and waits for the outcome. Never call it on the controller's own thread.
    pub fn call(&self, action: Action) -> Outcome {
        let (deliver, outcome) = mpsc::sync_channel(1);
        self.send(action, move |outcome| {
            let _ = deliver.send(outcome);
        })
        .map_err(|error| ActionError::Failed(Chain(&error).to_string()))?;
        outcome.recv().unwrap_or(Err(ActionError::Unanswered))
    }
}

/// Where the controller takes calls from.
pub struct Inbox {
    calls: Receiver<Call>,
    wake: Arc<EventFd>,
}

impl Inbox {
    /// Forgets earlier wake-ups. Call it when [`AsRawFd`]'s descriptor is readable and before
    /// taking calls with [`Inbox::next_call`], so that none made meanwhile is overlooked.
    pub fn acknowledge(&self) {
        // It fails only when there was none.
        let _ = self.wake.read();
    }

    /// The next waiting call; `None` when there is none. Never waits.
    pub fn next_call(&self) -> Option<Call> {
        self.calls.try_recv().ok()
    }

    /// The next call; waits for it, and returns `None` when every [`Client`] is gone.
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

/// Makes a way to a controller.
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
