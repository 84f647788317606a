//! Actions that are answered later, and what each waits for.

use std::sync::atomic::Ordering;

use crate::action::{ActionError, Outcome};
use crate::error::Chain;
use crate::metrics::Metrics;

/// Most actions that wait for one kind of event at a time.
const MAX_WAITING: usize = 32;

/// What an action waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// No vCPU executes, because of a pause.
    Paused,
    /// The machine has ended.
    Ended,
    /// The query thread's answer of this number is the reply.
    Answer(u64),
    /// The query thread's answer of this number is written to the metrics file.
    Metrics(u64),
}

/// An action that was taken from the inbox.
pub struct Pending {
    /// What was asked, as a noun.
    pub name: &'static str,
    /// Whether it changes nothing.
    pub is_query: bool,
    /// Sends the outcome.
    pub answer: Box<dyn FnOnce(Outcome) + Send>,
}

impl Pending {
    /// Logs, counts and sends the outcome.
    pub fn finish(self, outcome: Outcome, metrics: &Metrics) {
        let name = self.name;
        match &outcome {
            Ok(_) => {
                metrics.actions_done.fetch_add(1, Ordering::Relaxed);
                if !self.is_query {
                    log::info!("{name}: done");
                }
            }
            Err(error) => {
                metrics.actions_failed.fetch_add(1, Ordering::Relaxed);
                match error {
                    // Its text has the name.
                    ActionError::WrongState { .. } => log::warn!("{}", Chain(error)),
                    _ => log::warn!("{name}: {}", Chain(error)),
                }
            }
        }
        (self.answer)(outcome);
    }
}

/// The actions that wait. The number of each kind is bounded.
#[derive(Default)]
pub struct WaitingActions(Vec<(Event, Pending)>);

impl WaitingActions {
    /// Whether another action may wait for such an event.
    ///
    /// # Errors
    /// There are too many already.
    pub fn check_room(&self, event: Event) -> Result<(), ActionError> {
        let kind = std::mem::discriminant(&event);
        let same = |(other, _): &&(Event, Pending)| std::mem::discriminant(other) == kind;
        if self.0.iter().filter(same).count() < MAX_WAITING {
            return Ok(());
        }
        Err(ActionError::Failed(
            "too many requests wait for the machine; try again".into(),
        ))
    }

    /// Keeps an action until `event` happens.
    pub fn add(&mut self, event: Event, action: Pending) {
        self.0.push((event, action));
    }

    /// Takes the actions that waited for `event`.
    pub fn take(&mut self, event: Event) -> Vec<Pending> {
        let taken = self.0.extract_if(.., |(other, _)| *other == event);
        taken.map(|(_, action)| action).collect()
    }
}
