//! The machine's owner: one event loop, on the thread that calls
//! [`Controller::run`].
//!
//! Everything that changes the machine passes through [`Controller::handle`],
//! whoever asks: the command line, the API, a signal. After each round of
//! device events the loop looks at signals, endings and actions, so a guest
//! that floods a device delays them by one round at most.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

use devices::error::Chain;
use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::timerfd::TimerFd;

use crate::action::{
    self, Action, ActionError, Client, Configure, Inbox, InstanceInfo, IommuInfo, Lifecycle,
    MachineState, Outcome, Query, Reply,
};
use crate::builder::{self, BuildError, Built, Machine};
use crate::config::{ConfigError, VmConfig};
use crate::console::terminal;
use crate::ending::Ending;
use crate::inspect;
use crate::logger;
use crate::metrics::{Metrics, MetricsFile};
use crate::pci::PciBus;
use crate::plan::MachinePlan;
use crate::reports::{self, Reporter, Reports};
use crate::signals::{Signal, Signals};

/// What the event loop serves: the console and the devices.
pub type Subscriber = Box<dyn MutEventSubscriber + Send>;

/// Actions answered before device events get their turn again.
const ACTIONS_A_ROUND: usize = 16;
/// How often metrics are written to their file.
const METRICS_PERIOD: Duration = Duration::from_secs(60);
/// How long the end of the console output may stand still before it is given
/// up on, when the machine has ended.
const OUTPUT_PATIENCE: Duration = Duration::from_secs(5);

/// Why there is no controller.
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
    state: MachineState,
    machine: Option<Machine>,
    events: EventManager<Subscriber>,
    signals: Signals,
    reports: Reports,
    reporter: Reporter,
    client: Client,
    inbox: Inbox,
    metrics: Metrics,
    metrics_file: Option<MetricsFile>,
    metrics_timer: TimerFd,
    /// Tells the console that the process was continued.
    attention: Option<EventFd>,
    /// There may be more actions than were answered in the last round.
    more_actions: bool,
}

impl Controller {
    /// A controller of a machine that is not started.
    ///
    /// # Errors
    /// The process's signals or file descriptors are not to be had.
    pub fn new() -> Result<Self, ControllerError> {
        let signals = Signals::install().map_err(ControllerError::Signals)?;
        let (reporter, reports) = reports::channel().map_err(ControllerError::Events)?;
        let (client, inbox) = action::channel().map_err(ControllerError::Events)?;
        let metrics_timer = TimerFd::new().map_err(|e| ControllerError::Events(e.into()))?;
        let mut events: EventManager<Subscriber> =
            EventManager::new().map_err(ControllerError::Manager)?;
        events.add_subscriber(Box::new(Wakes(vec![
            signals.as_raw_fd(),
            reports.as_raw_fd(),
            inbox.as_raw_fd(),
            metrics_timer.as_raw_fd(),
        ])));
        Ok(Self {
            config: VmConfig::default(),
            state: MachineState::NotStarted,
            machine: None,
            events,
            signals,
            reports,
            reporter,
            client,
            inbox,
            metrics: Metrics::default(),
            metrics_file: None,
            metrics_timer,
            attention: None,
            more_actions: false,
        })
    }

    /// Where other threads ask for actions.
    pub fn client(&self) -> Client {
        self.client.clone()
    }

    /// Takes a whole configuration, as a series of changes would.
    ///
    /// # Errors
    /// The first value that cannot be accepted.
    pub fn configure(&mut self, config: VmConfig) -> Result<(), ConfigError> {
        config.validate()?;
        inspect::config(&config)?;
        if let Some(settings) = &config.logger {
            logger::configure(settings).map_err(|error| error.within("logger"))?;
        }
        if let Some(settings) = &config.metrics {
            self.open_metrics(&settings.metrics_path)
                .map_err(|error| error.within("metrics"))?;
        }
        self.config = config;
        Ok(())
    }

    /// Builds the machine and runs it.
    ///
    /// # Errors
    /// It cannot be built; nothing has changed then.
    pub fn start(&mut self) -> Result<(), BuildError> {
        let plan = MachinePlan::resolve(&self.config)?;
        let Built { machine, input } = builder::build(&plan, &self.metrics, &self.reporter)?;
        if let Some(input) = input {
            self.attention = Some(input.attention()?);
            self.events.add_subscriber(Box::new(input));
        }
        machine.vcpus.resume();
        self.machine = Some(machine);
        self.state = MachineState::Running;
        log::info!("the guest runs");
        Ok(())
    }

    /// Serves the machine until it ends, then takes it apart.
    pub fn run(mut self) -> Ending {
        let ending = loop {
            let patience = if self.more_actions { 0 } else { -1 };
            if let Err(error) = self.events.run_with_timeout(patience) {
                break Ending::Failed(format!("waiting for events: {}", Chain(&error)));
            }
            if let Some(ending) = self.look_round() {
                break ending;
            }
        };
        log::info!("{ending}");
        self.take_apart();
        ending
    }

    /// What came in besides device events. Returns how the machine ended, if
    /// it did.
    fn look_round(&mut self) -> Option<Ending> {
        for signal in self.signals.take() {
            match signal {
                Signal::Terminate => return Some(Ending::Stopped),
                Signal::Suspend => terminal::restore_and_stop(),
                Signal::Continue => {}
            }
            if let Some(attention) = &self.attention {
                // A full counter has its reader's attention.
                let _ = attention.write(1);
            }
        }
        if let Some(ending) = self.reports.take() {
            return Some(ending);
        }
        if self.metrics_file.is_some() && self.metrics_timer_expired() {
            let _ = self.flush_metrics();
        }
        self.answer_actions()
    }

    fn answer_actions(&mut self) -> Option<Ending> {
        self.more_actions = false;
        self.inbox.acknowledge();
        for _ in 0..ACTIONS_A_ROUND {
            let call = self.inbox.next_call()?;
            let (action, answer) = call.split();
            let stops = action == Action::Lifecycle(Lifecycle::Stop);
            let outcome = self.handle(action);
            let stopped = stops && outcome.is_ok();
            answer(outcome);
            if stopped {
                return Some(Ending::Stopped);
            }
        }
        self.more_actions = true;
        None
    }

    /// Does what is asked. The one place where actions are logged and counted.
    pub fn handle(&mut self, action: Action) -> Outcome {
        let name = action.name();
        let asks = matches!(action, Action::Query(_));
        let outcome = action
            .check_state(self.state)
            .and_then(|()| self.perform(action));
        match &outcome {
            Ok(_) => {
                self.metrics.actions_done.fetch_add(1, Ordering::Relaxed);
                if !asks {
                    log::info!("{name}: done");
                }
            }
            Err(error) => {
                self.metrics.actions_failed.fetch_add(1, Ordering::Relaxed);
                match error {
                    // Its text has the name.
                    ActionError::WrongState { .. } => log::warn!("{}", Chain(error)),
                    _ => log::warn!("{name}: {}", Chain(error)),
                }
            }
        }
        outcome
    }

    fn perform(&mut self, action: Action) -> Outcome {
        match action {
            Action::Configure(change) => self.change(*change)?,
            Action::Lifecycle(step) => self.step(step)?,
            Action::Query(query) => return self.answer(&query),
        }
        Ok(Reply::Done)
    }

    fn change(&mut self, change: Configure) -> Result<(), ActionError> {
        let mut config = self.config.clone();
        change.clone().apply_to(&mut config)?;
        match &change {
            Configure::Logger(settings) => logger::configure(settings)?,
            Configure::Metrics(settings) => self.open_metrics(&settings.metrics_path)?,
            other => inspect::change(other)?,
        }
        self.config = config;
        Ok(())
    }

    fn step(&mut self, step: Lifecycle) -> Result<(), ActionError> {
        match (step, &self.machine) {
            (Lifecycle::Start, _) => self.start().map_err(|error| match error {
                BuildError::Config(error) => ActionError::Invalid(error),
                other => ActionError::Failed(Chain(&other).to_string()),
            })?,
            (Lifecycle::Pause, Some(machine)) => {
                machine.vcpus.pause();
                self.state = MachineState::Paused;
            }
            (Lifecycle::Resume, Some(machine)) => {
                machine.vcpus.resume();
                self.state = MachineState::Running;
            }
            (Lifecycle::SendCtrlAltDel, _) => {
                return Err(ActionError::Failed(
                    "the machine has neither keyboard nor power button; \
                     shut it down from inside or stop it"
                        .into(),
                ));
            }
            (Lifecycle::FlushMetrics, _) => self.flush_metrics()?,
            // Stopping is the event loop's; without a machine, the action's
            // own check has refused the rest.
            (Lifecycle::Stop | Lifecycle::Pause | Lifecycle::Resume, _) => {}
        }
        Ok(())
    }

    fn answer(&self, query: &Query) -> Outcome {
        Ok(match query {
            Query::InstanceInfo => Reply::InstanceInfo(InstanceInfo {
                app_name: "portcullis".into(),
                id: "portcullis".into(),
                state: self.state,
                vmm_version: env!("CARGO_PKG_VERSION").into(),
            }),
            Query::Version => Reply::Version(env!("CARGO_PKG_VERSION").into()),
            Query::VmConfig => Reply::VmConfig(Box::new(self.config.clone())),
            Query::Metrics => Reply::Metrics(self.families()),
            Query::Iommu => Reply::Iommu(self.iommu_info()),
            Query::Endpoint(name) => {
                Reply::Endpoint(Box::new(self.iommu_info().find(name)?.clone()))
            }
            Query::Mappings {
                endpoint,
                after,
                limit,
            } => {
                let info = self.iommu_info();
                let stream = info.find(endpoint)?.stream_id;
                let pci = self.machine.as_ref().and_then(|m| m.pci.as_ref());
                let page = pci.map(|pci| pci.mappings(stream, *after, *limit));
                Reply::Mappings(page.unwrap_or_default())
            }
        })
    }

    fn families(&self) -> Vec<action::MetricFamily> {
        let mut families = self.metrics.families(self.state);
        let pci = self.machine.as_ref().and_then(|m| m.pci.as_ref());
        families.extend(pci.into_iter().flat_map(PciBus::families));
        families
    }

    fn iommu_info(&self) -> IommuInfo {
        let pci = self.machine.as_ref().and_then(|m| m.pci.as_ref());
        let model = self.config.iommu.model;
        let unborn = || IommuInfo {
            model,
            ..IommuInfo::default()
        };
        pci.map_or_else(unborn, |pci| pci.iommu_info(model))
    }

    fn open_metrics(&mut self, path: &str) -> Result<(), ConfigError> {
        let path = Path::new(path);
        let file = MetricsFile::open(path)
            .map_err(|error| ConfigError::of_file("metrics_path", path, &error))?;
        self.metrics_file = Some(file);
        self.rearm_metrics_timer();
        Ok(())
    }

    fn flush_metrics(&mut self) -> Result<(), ActionError> {
        let families = self.families();
        match &mut self.metrics_file {
            Some(file) => file
                .append(&families)
                .map_err(|error| ActionError::Failed(format!("writing metrics: {error}"))),
            None => Err(ActionError::Failed(
                "there is no file for metrics; PUT /metrics first".into(),
            )),
        }
    }

    /// Whether it is time to write metrics. The timer is one-shot and read only
    /// when it says so: reading it before would wait for it.
    fn metrics_timer_expired(&mut self) -> bool {
        if self.metrics_timer.is_armed().unwrap_or(true) {
            return false;
        }
        self.rearm_metrics_timer();
        true
    }

    fn rearm_metrics_timer(&mut self) {
        if let Err(error) = self.metrics_timer.reset(METRICS_PERIOD, None) {
            log::warn!("metrics are written on request only: {error}");
        }
    }

    /// Ends the guest, and lets its last words out.
    fn take_apart(&mut self) {
        if self.metrics_file.is_some()
            && let Err(error) = self.flush_metrics()
        {
            log::warn!("{}", Chain(&error));
        }
        let Some(machine) = self.machine.take() else {
            return;
        };
        let output = machine.stop();
        let left = output.flush(OUTPUT_PATIENCE);
        if left != 0 {
            log::warn!("console: nobody reads the last {left} bytes");
        }
        terminal::restore();
    }
}

/// Makes the loop return when there is something for the controller to look
/// at; the controller itself takes it.
struct Wakes(Vec<RawFd>);

impl MutEventSubscriber for Wakes {
    fn init(&mut self, ops: &mut EventOps) {
        for &fd in &self.0 {
            let added = ops.add(Events::new_raw(fd, EventSet::IN));
            added.expect("an event fd can be watched");
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {}
}
