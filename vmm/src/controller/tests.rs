use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use ::iommu::virtio::{FaultReport, FaultSink, VirtioIommu, VirtioIommuConfig};
use ::iommu::{GuestRam, IommuRegion, IovaRange, StreamId};
use devices::virtio::iommu::EventQueue;
use vm_memory::GuestAddress;
use vmm_sys_util::tempdir::TempDir;

use super::*;
use crate::action::{MachineState, Outcome};
use crate::config;
use crate::console::Output;
use crate::kvm::Vcpus;
use crate::kvm::fake::{FakeVcpu, Sleeper, TIMEOUT, sleeping_buses};
use crate::pci::{IommuDevice, PciBus};
use crate::signals;

/// A controller on its own thread, with a machine whose one vCPU is inside a
/// device that sleeps.
struct TestController {
    client: Client,
    sleeper: Sleeper,
    thread: JoinHandle<Ending>,
    _alone: MutexGuard<'static, ()>,
}

impl TestController {
    fn new() -> Self {
        Self::with_bus(None)
    }

    fn with_bus(pci: Option<PciBus>) -> Self {
        Self::prepared(pci, |_| {})
    }

    /// `prepare` is called on the controller's thread.
    fn prepared(
        pci: Option<PciBus>,
        prepare: impl FnOnce(&mut Controller) + Send + 'static,
    ) -> Self {
        // Signals are the process's.
        let alone = signals::alone();
        let mut controller = Controller::new().unwrap();
        let client = controller.client();
        let (buses, sleeper) = sleeping_buses();
        let thread = thread::spawn(move || {
            let waker = controller.reporter.try_clone().unwrap();
            let guests = vec![FakeVcpu::that_writes_once(0)];
            let vcpus = Vcpus::spawn(guests, &buses, |_| {}, move || waker.wake());
            let (_, output) = io::pipe().unwrap();
            let output = std::fs::File::from(std::os::fd::OwnedFd::from(output));
            let output = Output::start(output, None).unwrap();
            let machine = Machine::of(vcpus.unwrap(), pci, output);
            // What a test needs of the process stays permitted.
            controller.config.sandbox = Sandbox::Off;
            controller.run_machine(machine).unwrap();
            prepare(&mut controller);
            controller.run()
        });
        let served = Self {
            client,
            sleeper,
            thread,
            _alone: alone,
        };
        served.sleeper.wait_until_entered();
        served
    }

    /// Sends an action without waiting for the outcome.
    fn ask(&self, action: Action) -> Receiver<Outcome> {
        let (deliver, outcome) = channel();
        let sent = self.client.send(action, move |outcome| {
            let _ = deliver.send(outcome);
        });
        sent.unwrap();
        outcome
    }

    fn step(&self, step: Lifecycle) -> Receiver<Outcome> {
        self.ask(Action::Lifecycle(step))
    }

    /// Sends `GET /`, which is answered in any state of the vCPU.
    #[track_caller]
    fn state(&self) -> MachineState {
        match wait(&self.ask(Action::Query(Query::InstanceInfo))) {
            Ok(Reply::InstanceInfo(info)) => info.state,
            other => panic!("{other:?}"),
        }
    }

    /// Stops the machine, while the device may still sleep.
    fn stop(self) {
        let stopped = self.step(Lifecycle::Stop);
        assert_eq!(wait(&stopped), Ok(Reply::Done));
        assert_eq!(self.thread.join().unwrap(), Ending::Stopped);
        self.sleeper.release();
    }
}

#[track_caller]
fn wait(outcome: &Receiver<Outcome>) -> Outcome {
    outcome.recv_timeout(TIMEOUT).expect("no outcome came")
}

/// Checks that an action is not answered. Actions are handled in order: the
/// caller has waited for a later query.
#[track_caller]
fn assert_open(outcome: &Receiver<Outcome>) {
    let none = outcome.recv_timeout(Duration::ZERO);
    assert_eq!(none, Err(RecvTimeoutError::Timeout));
}

#[track_caller]
fn assert_fails(outcome: &Receiver<Outcome>, word: &str) {
    match wait(outcome) {
        Err(ActionError::Failed(text)) => assert!(text.contains(word), "{text}"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn queries_are_answered_while_a_pause_waits_for_a_device() {
    let served = TestController::new();
    let pause = served.step(Lifecycle::Pause);
    assert_eq!(served.state(), MachineState::Running);
    // A client that is gone does not affect the other pauses.
    drop(served.step(Lifecycle::Pause));
    let second = served.step(Lifecycle::Pause);
    let config = wait(&served.ask(Action::Query(Query::VmConfig)));
    assert!(matches!(config, Ok(Reply::VmConfig(_))));
    let metrics = wait(&served.ask(Action::Query(Query::Metrics)));
    assert!(matches!(metrics, Ok(Reply::Metrics(_))));
    for pause in [&pause, &second] {
        assert_open(pause);
    }
    served.sleeper.release();
    for pause in [&pause, &second] {
        assert_eq!(wait(pause), Ok(Reply::Done));
    }
    assert_eq!(served.state(), MachineState::Paused);
    assert_eq!(wait(&served.step(Lifecycle::Pause)), Ok(Reply::Done));
    assert_eq!(wait(&served.step(Lifecycle::Resume)), Ok(Reply::Done));
    assert_eq!(served.state(), MachineState::Running);
    served.stop();
}

#[test]
fn a_resume_withdraws_a_pause_that_waits() {
    let served = TestController::new();
    let pause = served.step(Lifecycle::Pause);
    assert_eq!(wait(&served.step(Lifecycle::Resume)), Ok(Reply::Done));
    assert_fails(&pause, "resumed while it was being paused");
    served.sleeper.release();
    assert_eq!(served.state(), MachineState::Running);
    assert_eq!(wait(&served.step(Lifecycle::Pause)), Ok(Reply::Done));
    served.stop();
}

#[test]
fn a_stop_waits_for_a_stuck_vcpu_for_a_while_only() {
    let served = TestController::new();
    let pause = served.step(Lifecycle::Pause);
    let stops = [served.step(Lifecycle::Stop), served.step(Lifecycle::Stop)];
    // Until then the machine exists and accepts no change.
    assert_fails(&pause, "ended while it was being paused");
    for step in [Lifecycle::Pause, Lifecycle::Resume] {
        assert_fails(&served.step(step), "is being stopped");
    }
    assert_eq!(served.state(), MachineState::Running);
    for stop in &stops {
        assert_eq!(wait(stop), Ok(Reply::Done));
    }
    // The device sleeps, and the process can end.
    assert_eq!(served.thread.join().unwrap(), Ending::Stopped);
    served.sleeper.release();
}

#[test]
fn a_stop_of_a_machine_that_can_stop_is_complete_when_it_is_answered() {
    let served = TestController::new();
    served.sleeper.release();
    assert_eq!(wait(&served.step(Lifecycle::Pause)), Ok(Reply::Done));
    served.stop();
}

#[test]
fn actions_that_wait_are_bounded() {
    let served = TestController::new();
    let pauses: Vec<_> = (0..40).map(|_| served.step(Lifecycle::Pause)).collect();
    assert_eq!(served.state(), MachineState::Running);
    let refused = pauses.iter().filter(|pause| {
        matches!(pause.try_recv(), Ok(Err(ActionError::Failed(text))) if text.contains("too many"))
    });
    assert_eq!(refused.count(), 8);
    served.sleeper.release();
    served.stop();
}

struct NoFaults;

impl FaultSink for NoFaults {
    fn report(&self, _: &FaultReport) {}
}

/// A virtio-iommu with one endpoint.
fn virtio_iommu() -> (Arc<VirtioIommu>, Arc<IommuRegion>) {
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x1000)]).unwrap();
    let config = VirtioIommuConfig {
        input_range: IovaRange::ALL,
        msi_window: None,
        boot_bypass: true,
        max_mappings: 16,
    };
    let model = VirtioIommu::new(config, Arc::new(ram), Arc::new(NoFaults));
    let model = Arc::new(model);
    let dynamic = Arc::clone(&model) as Arc<dyn ::iommu::Iommu>;
    (Arc::clone(&model), IommuRegion::new(dynamic, StreamId(8)))
}

#[test]
fn a_query_that_waits_for_a_model_delays_no_other_action() {
    let (model, _region) = virtio_iommu();
    let events = Arc::<EventQueue>::default();
    let device = IommuDevice::Virtio {
        model: Arc::clone(&model),
        events,
    };
    let bus = PciBus::of(device);
    let busy = Arc::clone(&bus.busy);
    let served = TestController::with_bus(Some(bus));
    let held = busy.lock().unwrap();
    let query = served.ask(Action::Query(Query::Iommu));
    assert_eq!(served.state(), MachineState::Running);
    let pause = served.step(Lifecycle::Pause);
    served.sleeper.release();
    assert_eq!(wait(&pause), Ok(Reply::Done));
    drop(held);
    assert!(matches!(wait(&query), Ok(Reply::Iommu(_))));
    let metrics = wait(&served.ask(Action::Query(Query::Metrics)));
    assert!(matches!(metrics, Ok(Reply::Metrics(_))));
    served.stop();
}

#[test]
fn metrics_are_flushed_with_the_devices_counters() {
    let path = std::env::temp_dir().join(format!("portcullis-metrics-{}", std::process::id()));
    let (model, _region) = virtio_iommu();
    let events = Arc::<EventQueue>::default();
    let served = TestController::with_bus(Some(PciBus::of(IommuDevice::Virtio { model, events })));
    assert_fails(&served.step(Lifecycle::FlushMetrics), "no file for metrics");
    let settings = format!(r#"{{"metrics_path": {path:?}}}"#);
    let settings = crate::config::parse_json(settings.as_bytes()).unwrap();
    let change = Action::configure(Configure::Metrics(settings));
    assert_eq!(wait(&served.ask(change)), Ok(Reply::Done));
    assert_eq!(wait(&served.step(Lifecycle::FlushMetrics)), Ok(Reply::Done));
    served.sleeper.release();
    served.stop();
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    // One line of the flush, and the last one.
    assert_eq!(text.lines().count(), 2, "{text}");
    for line in text.lines() {
        assert!(
            line.contains(r#""portcullis_actions_done_total":"#),
            "{line}"
        );
    }
}

#[test]
fn confined_machine_opens_files_in_the_named_directories_only() {
    let named = TempDir::new().unwrap();
    let other = TempDir::new().unwrap();
    let directory = named.as_path().to_str().unwrap().to_owned();
    let (sender, is_confined) = channel();
    let served = TestController::prepared(None, move |controller| {
        controller.config.sandbox = Sandbox::On;
        controller.config.allow_dirs = vec![directory];
        let directories = &mut controller.directories;
        directories.allow_configured(&controller.config).unwrap();
        // A kernel without landlock cannot confine.
        sender.send(controller.confine().is_ok()).unwrap();
    });
    if is_confined.recv().unwrap() {
        let configured = |change| served.ask(Action::configure(change));
        let metrics = |directory: &TempDir| {
            let path = directory.as_path().join("file").to_str().unwrap().into();
            configured(Configure::Metrics(config::Metrics {
                metrics_path: path,
                ..config::Metrics::default()
            }))
        };
        let log = |directory: &TempDir| {
            let path = directory.as_path().join("file").to_str().unwrap().into();
            configured(Configure::Logger(config::Logger {
                log_path: Some(path),
                ..config::Logger::default()
            }))
        };
        assert_eq!(wait(&metrics(&named)), Ok(Reply::Done));
        for (refused, field) in [
            (metrics(&other), "metrics.metrics_path"),
            (log(&other), "logger.log_path"),
        ] {
            let Err(ActionError::Invalid(error)) = wait(&refused) else {
                panic!("it is opened");
            };
            let (other, named) = (other.as_path().display(), named.as_path().display());
            let expected = format!(
                "{field}: {other}/file cannot be opened to append: Permission denied (os error \
                 13); the sandbox lets a running machine open files only in {named}: start it \
                 with --allow-dir DIR to add one"
            );
            assert_eq!(error.to_string(), expected);
        }
        assert!(!other.as_path().join("file").exists());
        let absent = configured(Configure::Metrics(config::Metrics {
            metrics_path: named.as_path().join("a/b").to_str().unwrap().into(),
            ..config::Metrics::default()
        }));
        let Err(ActionError::Invalid(error)) = wait(&absent) else {
            panic!("it is opened");
        };
        assert!(!error.to_string().contains("sandbox"), "{error}");
    }
    served.stop();
}

#[test]
fn the_command_line_gets_the_outcome_at_once() {
    let _alone = signals::alone();
    let mut controller = Controller::new().unwrap();
    let start = || Action::Lifecycle(Lifecycle::Start);
    let refused = controller.execute(start());
    assert!(matches!(refused, Err(ActionError::Invalid(error)) if error.field == "boot-source"));
    let mut config = VmConfig::default();
    config.machine_config.vcpu_count = 2;
    let change = || Action::configure(Configure::All(Box::new(config.clone())));
    assert_eq!(controller.execute(change()), Ok(Reply::Done));
    let configured = controller.execute(Action::Query(Query::VmConfig));
    assert_eq!(configured, Ok(Reply::VmConfig(Box::new(config.clone()))));
}
