//! Actions that are answered later, each with the event that it waits for.

use std::sync::atomic::Ordering;

use crate::action::{Action, ActionError, Call, Outcome};
use crate::error::Chain;
use crate::metrics::Metrics;

/// Upper bound on the actions that wait for one kind of event.
const MAX_WAITING: usize = 32;

/// Event that completes an action.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// No vCPU executes, because of a pause.
    Paused,
    /// The machine has ended.
    Ended,
    /// The query thread answered this query; the answer is the reply.
    Answer(u64),
    /// The query thread answered this query; the answer is a line of the
    /// metrics file.
    Metrics(u64),
}

/// An action that was taken from the inbox, and its callback.
pub(super) struct Pending {
    /// Name of the action, as a noun.
    name: &'static str,
    is_query: bool,
    prints_error: bool,
    answer: Box<dyn FnOnce(Outcome) + Send>,
}

impl Pending {
    /// Separates the action from the rest of the call.
    pub(super) fn split(call: Call) -> (Action, Self) {
        let prints_error = call.prints_error;
        let (action, answer) = call.split();
        let pending = Self {
            name: action.name(),
            is_query: matches!(action, Action::Query(_)),
            prints_error,
            answer: Box::new(answer),
        };
        (action, pending)
    }

    /// Logs, counts and sends the outcome. A query that succeeds is not logged:
    /// it changes nothing.
    pub(super) fn finish(self, outcome: Outcome, metrics: &Metrics) {
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
                    _ if self.prints_error => {}
                    // Its text contains the name.
                    ActionError::WrongState { .. } => log::warn!("{}", Chain(error)),
                    _ => log::warn!("{name}: {}", Chain(error)),
                }
            }
        }
        (self.answer)(outcome);
    }
}

/// The waiting actions; [`MAX_WAITING`] bounds the number of each kind.
#[derive(Default)]
pub(super) struct WaitingActions(Vec<(Event, Pending)>);

impl WaitingActions {
    /// Checks that another action may wait for this kind of event.
    ///
    /// # Errors
    /// Too many actions wait for it.
    pub(super) fn check_room(&self, event: Event) -> Result<(), ActionError> {
        let kind = std::mem::discriminant(&event);
        let same = |(other, _): &&(Event, Pending)| std::mem::discriminant(other) == kind;
        if self.0.iter().filter(same).count() < MAX_WAITING {
            return Ok(());
        }
        Err(ActionError::Failed(
            "too many requests wait for the machine; try again".into(),
        ))
    }

    /// Stores an action until `event` happens.
    pub(super) fn add(&mut self, event: Event, action: Pending) {
        self.0.push((event, action));
    }

    /// Removes and returns the actions that wait for `event`.
    pub(super) fn take(&mut self, event: Event) -> Vec<Pending> {
        let taken = self.0.extract_if(.., |(other, _)| *other == event);
        taken.map(|(_, action)| action).collect()
    }
}
