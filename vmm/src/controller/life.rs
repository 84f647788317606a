//! The state of a machine between its start and its end.

use std::time::{Duration, Instant};

use crate::action::MachineState;
use crate::assemble::Machine;
use crate::ending::Ending;
use crate::queries::QueryThread;

/// A machine that was started.
pub struct Running {
    /// The machine.
    pub machine: Machine,
    /// Answers what its devices know.
    pub queries: QueryThread,
}

/// How the machine ends, and when it is waited for no longer.
pub struct Departure {
    /// How it ends.
    pub ending: Ending,
    /// When vCPUs and devices that have not ended are left alone.
    pub deadline: Instant,
}

impl Departure {
    /// An ending from now on.
    #[must_use]
    pub fn new(ending: Ending, patience: Duration) -> Self {
        let deadline = Instant::now() + patience;
        Self { ending, deadline }
    }
}

/// The machine and its state. No method waits for a vCPU.
#[derive(Default)]
pub struct Life {
    state: MachineState,
    running: Option<Running>,
    /// The vCPUs were asked to pause, and some still execute.
    pausing: bool,
    departure: Option<Departure>,
}

impl Life {
    /// What the machine does.
    #[must_use]
    pub fn state(&self) -> MachineState {
        self.state
    }

    /// Answers what the devices know, once the machine was started.
    #[must_use]
    pub fn queries(&self) -> Option<&QueryThread> {
        self.running.as_ref().map(|running| &running.queries)
    }

    /// Whether an end has begun.
    #[must_use]
    pub fn is_ending(&self) -> bool {
        self.departure.is_some()
    }

    /// Runs a machine that was built.
    pub fn start(&mut self, machine: Machine, queries: QueryThread) {
        machine.vcpus.resume();
        self.running = Some(Running { machine, queries });
        self.state = MachineState::Running;
    }

    /// Asks the vCPUs to pause. Whether they are paused already;
    /// [`Self::complete_pause`] tells when they are.
    pub fn pause(&mut self) -> bool {
        if let Some(running) = &self.running
            && self.state == MachineState::Running
            && !self.pausing
        {
            running.machine.vcpus.request_pause();
            self.pausing = true;
        }
        !self.pausing
    }

    /// Whether a pause is complete now that was not at the last call.
    pub fn complete_pause(&mut self) -> bool {
        let complete = self.pausing && self.is_idle();
        if complete {
            self.pausing = false;
            self.state = MachineState::Paused;
        }
        complete
    }

    /// Lets the vCPUs run; withdraws a pause that is not complete.
    pub fn resume(&mut self) {
        self.pausing = false;
        if let Some(running) = &self.running {
            running.machine.vcpus.resume();
            self.state = MachineState::Running;
        }
    }

    /// Begins to end the machine. Of several endings the first counts, and the
    /// least patience.
    pub fn end(&mut self, ending: Ending, patience: Duration) {
        if let Some(departure) = &mut self.departure {
            departure.deadline = departure.deadline.min(Instant::now() + patience);
            return;
        }
        self.pausing = false;
        if let Some(running) = &self.running {
            running.machine.vcpus.request_stop();
        }
        self.departure = Some(Departure::new(ending, patience));
    }

    /// The ending, once the vCPUs have ended or are waited for no longer.
    pub fn take_departure(&mut self) -> Option<Departure> {
        let idle = self.is_idle();
        let due = |departure: &mut Departure| idle || departure.deadline <= Instant::now();
        self.departure.take_if(due)
    }

    /// How long the event loop may wait for events.
    #[must_use]
    pub fn patience(&self) -> Option<Duration> {
        let departure = self.departure.as_ref()?;
        Some(departure.deadline.saturating_duration_since(Instant::now()))
    }

    /// Gives the machine away, to be dropped.
    pub fn take(&mut self) -> Option<Running> {
        self.running.take()
    }

    fn is_idle(&self) -> bool {
        let running = self.running.as_ref();
        running.is_none_or(|running| running.machine.vcpus.is_idle())
    }
}
