//! Owns the machine: one event loop, on the thread that calls
//! [`Controller::run`].
//!
//! Every change of the machine passes through `Controller::handle`: from the
//! command line, the API or a signal. Only the machine's own end does not.
//! After each round of device events the loop polls signals, endings and
//! actions, so that a guest that floods a device delays them by one round at
//! most.
//!
//! The loop never waits for a vCPU, nor for a lock that a vCPU holds inside a
//! device. A pause and the end of the machine are requests to the vCPU threads.
//! The action is answered when the last of them has stopped. Queries that read
//! the devices' state run on the query thread.

mod life;
mod recorder;
mod shut_down;
#[cfg(test)]
mod tests;
mod waiting;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;

use self::life::{Life, PendingEnd, Running, STOP_TIMEOUT};
use self::recorder::Recorder;
use self::waiting::{Event, Pending, WaitingActions};
use crate::action::{
    self, Action, ActionError, Call, Client, Configure, Inbox, InstanceInfo, Lifecycle,
    MetricFamily, Outcome, Query, Reply,
};
use crate::assemble::{self, Assembled, Machine};
use crate::build_error::BuildError;
use crate::config::{ConfigError, Sandbox, VmConfig};
use crate::console::Input;
use crate::ending::Ending;
use crate::error::Chain;
use crate::inspect;
use crate::logger;
use crate::metrics::Metrics;
use crate::plan::MachinePlan;
use crate::queries::{self, Answered, QueryThread};
use crate::reports::{self, Reporter, Reports};
use crate::resources::HostResources;
use crate::sandbox::directories::{Directories, Purpose};
use crate::sandbox::{self, SandboxError};
use crate::signals::{self, Signal, Signals};

/// A subscriber of the event loop: the console or a device.
pub(crate) type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// Upper bound on the actions answered in one round of device events.
const ACTIONS_A_ROUND: usize = 16;
/// Error of creating a controller.
#[derive(Debug, thiserror::Error)]
pub enum ControllerError {
    /// Signals cannot be handled.
    #[error("cannot install the signal handlers")]
    Signals(#[source] io::Error),
    /// An event source cannot be made.
    #[error("cannot set up the event loop")]
    Events(#[source] io::Error),
    /// The event loop itself cannot be made.
    #[error("cannot set up the event loop")]
    Manager(#[source] event_manager::Error),
}

/// Owns the machine. See the module documentation.
pub struct Controller {
    config: VmConfig,
    life: Life,
    events: EventManager<Subscriber>,
    signals: Signals,
    reports: Reports,
    reporter: Reporter,
    client: Client,
    inbox: Inbox,
    metrics: Metrics,
    recorder: Recorder,
    /// Directories that stay accessible after the start.
    directories: Directories,
    /// Files outside of them cannot be opened.
    is_confined: bool,
    waiting: WaitingActions,
    /// Number of the query whose answer is the periodic line of the metrics file.
    minute: Option<u64>,
    /// Signalled when the process was continued; for the console.
    attention: Option<EventFd>,
    /// More actions may be queued than the last round answered.
    more_actions: bool,
}

/// Progress of an action.
enum Progress {
    Done(Reply),
    /// The action is answered at this event.
    Until(Event),
}

impl Controller {
    /// Creates a controller without a machine.
    ///
    /// # Errors
    /// Signal handlers or file descriptors are not available.
    pub fn new() -> Result<Self, ControllerError> {
        let signals = Signals::install().map_err(ControllerError::Signals)?;
        let (reporter, reports) = reports::channel().map_err(ControllerError::Events)?;
        let (client, inbox) = action::channel().map_err(ControllerError::Events)?;
        let recorder = Recorder::new().map_err(ControllerError::Events)?;
        let mut events: EventManager<Subscriber> =
            EventManager::new().map_err(ControllerError::Manager)?;
        events.add_subscriber(Box::new(ControlEvents(vec![
            signals.as_raw_fd(),
            reports.as_raw_fd(),
            inbox.as_raw_fd(),
            recorder.as_raw_fd(),
        ])));
        Ok(Self {
            config: VmConfig::default(),
            life: Life::default(),
            events,
            signals,
            reports,
            reporter,
            client,
            inbox,
            metrics: Metrics::default(),
            recorder,
            directories: Directories::default(),
            is_confined: false,
            waiting: WaitingActions::default(),
            minute: None,
            attention: None,
            more_actions: false,
        })
    }

    /// Returns a client for another thread.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Performs an action of the command line, which prints an error itself.
    ///
    /// # Errors
    /// The action was refused or failed, or is not complete at once.
    pub fn execute(&mut self, action: Action) -> Outcome {
        let (call, outcome) = Call::printed(action);
        self.handle(call);
        let outcome = outcome.try_recv();
        outcome.unwrap_or(Err(ActionError::Unanswered))
    }

    /// Builds the machine and runs it.
    ///
    /// # Errors
    /// The machine cannot be built; nothing has changed.
    fn start(&mut self) -> Result<(), BuildError> {
        let plan = MachinePlan::resolve(&self.config)?;
        let resources = HostResources::acquire(&plan)?;
        self.directories.allow_configured(&self.config)?;
        let Assembled { machine, input } =
            assemble::assemble(&plan, resources, &self.metrics, &self.reporter)?;
        let attention = input.as_ref().map(Input::attention).transpose()?;
        self.run_machine(machine)?;
        self.attention = attention;
        if let Some(input) = input {
            self.events.add_subscriber(Box::new(input));
        }
        log::info!("the guest runs");
        Ok(())
    }

    /// Makes the threads that are started from now on confine themselves, as the
    /// configuration demands.
    ///
    /// # Errors
    /// The host refuses a step.
    pub fn prepare_sandbox(&self) -> Result<(), SandboxError> {
        sandbox::prepare(self.config.sandbox, self.config.user)
    }

    fn confine(&mut self) -> Result<(), SandboxError> {
        let config = &self.config;
        sandbox::confine(config.sandbox, config.user, &self.directories)?;
        self.is_confined = config.sandbox == Sandbox::On;
        Ok(())
    }

    /// Keeps the directory of the file `path` accessible after the start.
    ///
    /// # Errors
    /// The directory cannot be opened.
    pub fn allow_beside(&mut self, path: &Path, purpose: Purpose) -> io::Result<()> {
        self.directories.allow_beside(path, purpose)
    }

    /// Starts the last thread, confines the event loop, and resumes the vCPUs.
    fn run_machine(&mut self, machine: Machine) -> Result<(), BuildError> {
        let reporter = self.reporter.try_clone()?;
        let model = self.config.iommu.model;
        let queries = QueryThread::start(machine.pci.as_ref(), model, reporter)?;
        if let Err(error) = self.confine() {
            // The event loop is partly confined: another start would not find its files.
            self.end(Ending::Failed(Chain(&error).to_string()));
            return Err(error.into());
        }
        self.life.start(machine, queries);
        Ok(())
    }

    /// Serves the machine until it ends, then shuts it down.
    pub fn run(mut self) -> Ending {
        let pending_end = loop {
            if let Err(error) = self.events.run_with_timeout(self.timeout()) {
                let failed = format!("waiting for events: {}", Chain(&error));
                break PendingEnd::new(Ending::Failed(failed));
            }
            self.poll_control();
            if let Some(pending_end) = self.life.take_pending_end() {
                break pending_end;
            }
        };
        log::info!("{}", pending_end.ending);
        self.finish_all(Event::Ended, &Ok(Reply::Done));
        self.shut_down(pending_end.deadline);
        pending_end.ending
    }

    /// Timeout of the event loop in milliseconds; -1 without a limit.
    fn timeout(&self) -> i32 {
        match self.life.timeout() {
            _ if self.more_actions => 0,
            Some(left) => i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX),
            None => -1,
        }
    }

    /// Handles signals, endings, answers of queries and actions.
    fn poll_control(&mut self) {
        for signal in self.signals.take() {
            match signal {
                Signal::Terminate => {
                    self.handle(Call::unanswered(Action::Lifecycle(Lifecycle::Stop)));
                }
                Signal::Suspend => signals::suspend(),
                Signal::Continue => {}
            }
            if let Some(attention) = &self.attention {
                // A full counter is readable already.
                let _ = attention.write(1);
            }
        }
        if let Some(ending) = self.reports.take() {
            self.end(ending);
        }
        self.complete_pause();
        while let Some(answered) = self.life.queries().and_then(|it| it.next_answer()) {
            self.deliver(answered);
        }
        if self.recorder.is_due() && self.minute.is_none() {
            self.minute = self.record_unasked();
        }
        self.answer_actions();
    }

    fn answer_actions(&mut self) {
        self.more_actions = false;
        self.inbox.acknowledge();
        for _ in 0..ACTIONS_A_ROUND {
            let Some(call) = self.inbox.next_call() else {
                return;
            };
            self.handle(call);
        }
        self.more_actions = true;
    }

    /// Performs the action, and answers it now or when it is complete.
    /// `Pending::finish` logs and counts every action.
    fn handle(&mut self, call: Call) {
        let (action, pending) = Pending::split(call);
        let progress = action
            .check_state(self.life.state())
            .and_then(|()| self.check_not_ending(&action))
            .and_then(|()| self.perform(action));
        match progress {
            Ok(Progress::Done(reply)) => pending.finish(Ok(reply), &self.metrics),
            Ok(Progress::Until(event)) => self.waiting.add(event, pending),
            Err(error) => pending.finish(Err(error), &self.metrics),
        }
    }

    /// Refuses changes while the machine ends.
    fn check_not_ending(&self, action: &Action) -> Result<(), ActionError> {
        match action {
            Action::Query(_) | Action::Lifecycle(Lifecycle::Stop) => Ok(()),
            _ if !self.life.is_ending() => Ok(()),
            _ => Err(ActionError::Failed(format!(
                "{} is not possible: the machine is being stopped",
                action.name()
            ))),
        }
    }

    fn perform(&mut self, action: Action) -> Result<Progress, ActionError> {
        match action {
            Action::Configure(change) => {
                self.change(*change)?;
                Ok(Progress::Done(Reply::Done))
            }
            Action::Lifecycle(step) => self.step(step),
            Action::Query(query) => self.answer(query),
        }
    }

    fn change(&mut self, change: Configure) -> Result<(), ActionError> {
        let mut config = self.config.clone();
        change.clone().apply_to(&mut config)?;
        inspect::change(&change)?;
        let (log, metrics) = match &change {
            Configure::All(config) => (config.logger.as_ref(), config.metrics.as_ref()),
            Configure::Logger(settings) => (Some(settings), None),
            Configure::Metrics(settings) => (None, Some(settings)),
            _ => (None, None),
        };
        if let Some(settings) = log {
            let opened = logger::configure(settings);
            opened.map_err(|error| self.refused_file(error, "logger"))?;
        }
        if let Some(settings) = metrics {
            let opened = self.recorder.open(&settings.metrics_path);
            opened.map_err(|error| self.refused_file(error, "metrics"))?;
        }
        self.config = config;
        Ok(())
    }

    /// Completes the error of a file of `section`.
    fn refused_file(&self, error: ConfigError, section: &str) -> ConfigError {
        let error = error.within(section);
        match self.is_confined {
            true => self.directories.explain(error),
            false => error,
        }
    }

    fn step(&mut self, step: Lifecycle) -> Result<Progress, ActionError> {
        match step {
            Lifecycle::Start => self.start()?,
            Lifecycle::Pause => return self.pause(),
            Lifecycle::Resume => self.resume(),
            Lifecycle::Stop => {
                self.end(Ending::Stopped);
                self.waiting.check_room(Event::Ended)?;
                return Ok(Progress::Until(Event::Ended));
            }
            Lifecycle::SendCtrlAltDel => {
                return Err(ActionError::Failed(
                    "the machine has neither keyboard nor power button; \
                     shut it down from inside or stop it"
                        .into(),
                ));
            }
            Lifecycle::FlushMetrics => return self.flush_metrics(),
        }
        Ok(Progress::Done(Reply::Done))
    }

    fn pause(&mut self) -> Result<Progress, ActionError> {
        self.waiting.check_room(Event::Paused)?;
        if self.life.pause() {
            return Ok(Progress::Done(Reply::Done));
        }
        // Without an executing vCPU, no vCPU thread wakes the loop.
        Ok(match self.complete_pause() {
            true => Progress::Done(Reply::Done),
            false => Progress::Until(Event::Paused),
        })
    }

    /// Withdraws a pause that is not complete.
    fn resume(&mut self) {
        self.life.resume();
        self.fail_pauses("the machine was resumed while it was being paused");
    }

    /// Completes a pause whose last vCPU is parked.
    fn complete_pause(&mut self) -> bool {
        let complete = self.life.complete_pause();
        if complete {
            self.finish_all(Event::Paused, &Ok(Reply::Done));
        }
        complete
    }

    /// Starts the end of the machine. Of several endings the first one counts.
    fn end(&mut self, ending: Ending) {
        self.life.end(ending);
        self.fail_pauses("the machine ended while it was being paused");
    }

    fn fail_pauses(&mut self, why: &str) {
        let error = ActionError::Failed(why.into());
        self.finish_all(Event::Paused, &Err(error));
    }

    fn answer(&mut self, query: Query) -> Result<Progress, ActionError> {
        if queries::concerns_devices(&query) {
            return self.inspect(query);
        }
        Ok(Progress::Done(match query {
            Query::Version => Reply::Version(env!("CARGO_PKG_VERSION").into()),
            Query::VmConfig => Reply::VmConfig(Box::new(self.config.clone())),
            _ => Reply::InstanceInfo(InstanceInfo {
                app_name: "portcullis".into(),
                id: "portcullis".into(),
                state: self.life.state(),
                vmm_version: env!("CARGO_PKG_VERSION").into(),
                sandbox: self.config.sandbox,
            }),
        }))
    }

    fn inspect(&mut self, query: Query) -> Result<Progress, ActionError> {
        let Some(queries) = self.life.queries() else {
            let reply = queries::answer(None, self.config.iommu.model, &query)?;
            return Ok(Progress::Done(self.complete(reply)));
        };
        self.waiting.check_room(Event::Answer(0))?;
        Ok(Progress::Until(Event::Answer(queries.ask(query))))
    }

    fn flush_metrics(&mut self) -> Result<Progress, ActionError> {
        self.recorder.check()?;
        self.waiting.check_room(Event::Metrics(0))?;
        Ok(match self.record()? {
            Some(number) => Progress::Until(Event::Metrics(number)),
            None => Progress::Done(Reply::Done),
        })
    }

    /// Writes a line of metrics. Returns the number of the query whose answer
    /// completes the line, if there are devices.
    ///
    /// # Errors
    /// The file cannot be written.
    fn record(&mut self) -> Result<Option<u64>, ActionError> {
        if let Some(queries) = self.life.queries() {
            return Ok(Some(queries.ask(Query::Metrics)));
        }
        self.append_metrics(Vec::new())?;
        Ok(None)
    }

    /// Calls [`Self::record`] where no action waits for the result, and logs an
    /// error.
    fn record_unasked(&mut self) -> Option<u64> {
        self.record().unwrap_or_else(|error| {
            log::warn!("{}", Chain(&error));
            None
        })
    }

    /// Appends a line with the controller's metrics and `devices` to the file.
    fn append_metrics(&mut self, devices: Vec<MetricFamily>) -> Result<(), ActionError> {
        let families = self.metrics.families(self.life.state(), devices);
        self.recorder.append(&families)
    }

    /// Delivers an answer of the query thread to the actions that wait for it.
    fn deliver(&mut self, answered: Answered) {
        let number = answered.number;
        let outcome = answered.outcome.map(|reply| self.complete(reply));
        let flushes = self.waiting.take(Event::Metrics(number));
        let is_minute = self.minute.take_if(|minute| *minute == number).is_some();
        if is_minute || !flushes.is_empty() {
            let written = match &outcome {
                Ok(Reply::Metrics(families)) => self.recorder.append(families),
                Ok(_) => Ok(()),
                Err(error) => Err(error.clone()),
            };
            if let (true, Err(error)) = (is_minute, &written) {
                log::warn!("{}", Chain(error));
            }
            for flush in flushes {
                flush.finish(written.clone().map(|()| Reply::Done), &self.metrics);
            }
        }
        self.finish_all(Event::Answer(number), &outcome);
    }

    /// Adds the controller's own data to a reply.
    fn complete(&self, reply: Reply) -> Reply {
        match reply {
            Reply::Metrics(devices) => {
                Reply::Metrics(self.metrics.families(self.life.state(), devices))
            }
            other => other,
        }
    }

    fn finish_all(&mut self, event: Event, outcome: &Outcome) {
        for action in self.waiting.take(event) {
            action.finish(outcome.clone(), &self.metrics);
        }
    }

    /// Stops the guest, and flushes its last output.
    fn shut_down(mut self, deadline: Instant) {
        let has_file = self.recorder.check().is_ok();
        let Some(mut running) = self.life.take() else {
            if has_file {
                self.record_unasked();
            }
            return;
        };
        if has_file {
            self.record_last(&mut running, deadline);
        }
        shut_down::shut_down(running, &self.signals, deadline);
    }

    fn record_last(&mut self, running: &mut Running, deadline: Instant) {
        // Signals are not polled here.
        let deadline = deadline.min(Instant::now() + STOP_TIMEOUT);
        let number = running.queries.ask(Query::Metrics);
        while let Some(answered) = running.queries.answer_until(deadline) {
            if let (true, Ok(Reply::Metrics(devices))) =
                (answered.number == number, answered.outcome)
            {
                if let Err(error) = self.append_metrics(devices) {
                    log::warn!("{}", Chain(&error));
                }
                return;
            }
        }
    }
}

/// Wakes the event loop when one of the controller's descriptors is readable;
/// [`Controller::poll_control`] reads it.
struct ControlEvents(Vec<RawFd>);

impl MutEventSubscriber for ControlEvents {
    fn init(&mut self, ops: &mut EventOps) {
        for &fd in &self.0 {
            let added = ops.add(Events::new_raw(fd, EventSet::IN));
            added.expect("an event fd can be watched");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {}
}
