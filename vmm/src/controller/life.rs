//! State of a machine from its start to its end.

use std::time::{Duration, Instant};

use crate::action::MachineState;
use crate::assemble::Machine;
use crate::ending::Ending;
use crate::queries::QueryThread;

/// Time for vCPUs and devices to stop after the user stops the machine. One
/// that is inside the host's kernel may never stop.
pub(super) const STOP_TIMEOUT: Duration = Duration::from_millis(1500);
/// Time for vCPUs and devices to stop after the guest ended the machine.
const END_TIMEOUT: Duration = Duration::from_secs(10);

/// A machine that was started.
pub(super) struct Running {
    /// Ends the guest when dropped.
    pub machine: Machine,
    /// Answers queries that read the devices' state.
    pub queries: QueryThread,
}

/// Ending of the machine, and the deadline for it.
pub(super) struct PendingEnd {
    /// Ending of the machine.
    pub ending: Ending,
    /// Time from which vCPUs and devices that still run are left to the end of
    /// the process.
    pub deadline: Instant,
}

impl PendingEnd {
    /// Creates an ending, whose time begins now.
    #[must_use]
    pub(super) fn new(ending: Ending) -> Self {
        let timeout = match ending {
            Ending::Stopped => STOP_TIMEOUT,
            _ => END_TIMEOUT,
        };
        let deadline = Instant::now() + timeout;
        Self { ending, deadline }
    }
}

/// The machine and its state. No method waits for a vCPU.
#[derive(Default)]
pub(super) struct Life {
    state: MachineState,
    running: Option<Running>,
    /// A pause is requested, and some vCPUs still execute.
    pausing: bool,
    pending_end: Option<PendingEnd>,
}

impl Life {
    /// State of the machine, for the API.
    #[must_use]
    pub(super) fn state(&self) -> MachineState {
        self.state
    }

    /// The query thread; `None` until the machine is started.
    pub(super) fn queries(&mut self) -> Option<&mut QueryThread> {
        self.running.as_mut().map(|running| &mut running.queries)
    }

    /// Whether the machine has an ending.
    #[must_use]
    pub(super) fn is_ending(&self) -> bool {
        self.pending_end.is_some()
    }

    /// Stores a built machine and resumes its vCPUs.
    pub(super) fn start(&mut self, machine: Machine, queries: QueryThread) {
        machine.vcpus.resume();
        self.running = Some(Running { machine, queries });
        self.state = MachineState::Running;
    }

    /// Requests a pause. Returns whether it is complete already; otherwise
    /// [`Self::complete_pause`] reports when it is.
    pub(super) fn pause(&mut self) -> bool {
        if let Some(running) = &self.running
            && self.state == MachineState::Running
            && !self.pausing
        {
            running.machine.vcpus.request_pause();
            self.pausing = true;
        }
        !self.pausing
    }

    /// Returns whether a pause completed since the last call.
    pub(super) fn complete_pause(&mut self) -> bool {
        let complete = self.pausing && self.is_idle();
        if complete {
            self.pausing = false;
            self.state = MachineState::Paused;
        }
        complete
    }

    /// Resumes the vCPUs; withdraws a pause that is not complete.
    pub(super) fn resume(&mut self) {
        self.pausing = false;
        if let Some(running) = &self.running {
            running.machine.vcpus.resume();
            self.state = MachineState::Running;
        }
    }

    /// Starts the end of the machine. Of several calls the first ending and the
    /// earliest deadline count.
    pub(super) fn end(&mut self, ending: Ending) {
        let end = PendingEnd::new(ending);
        if let Some(first) = &mut self.pending_end {
            first.deadline = first.deadline.min(end.deadline);
            return;
        }
        self.pausing = false;
        if let Some(running) = &self.running {
            running.machine.vcpus.request_stop();
        }
        self.pending_end = Some(end);
    }

    /// Returns the ending, once the vCPUs have ended or the deadline has
    /// passed.
    pub(super) fn take_pending_end(&mut self) -> Option<PendingEnd> {
        let idle = self.is_idle();
        let due = |pending_end: &mut PendingEnd| idle || pending_end.deadline <= Instant::now();
        self.pending_end.take_if(due)
    }

    /// Time that the event loop may wait for events; `None` without a limit.
    #[must_use]
    pub(super) fn timeout(&self) -> Option<Duration> {
        let pending_end = self.pending_end.as_ref()?;
        Some(
            pending_end
                .deadline
                .saturating_duration_since(Instant::now()),
        )
    }

    /// Takes the machine out, to be dropped by the caller.
    pub(super) fn take(&mut self) -> Option<Running> {
        self.running.take()
    }

    fn is_idle(&self) -> bool {
        let running = self.running.as_ref();
        running.is_none_or(|running| running.machine.vcpus.is_idle())
    }
}
