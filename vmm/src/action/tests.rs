use super::*;
use crate::config::{BootSource, Logger, MachineConfig, MachineConfigUpdate, VmConfig};
use std::sync::mpsc;
use std::thread;

fn apply(config: &mut VmConfig, change: Configure) -> Result<(), String> {
    change.apply_to(config).map_err(|error| error.to_string())
}

fn drive(id: &str, path: &str) -> Configure {
    Configure::Drive(format!("path={path},id={id}").parse().unwrap())
}

#[test]
fn a_device_with_a_known_identifier_is_replaced_in_place() {
    let mut config = VmConfig::default();
    apply(&mut config, drive("a", "1.img")).unwrap();
    apply(&mut config, drive("b", "2.img")).unwrap();
    apply(&mut config, drive("a", "3.img")).unwrap();
    let paths: Vec<_> = config.drives.iter().map(|d| &d.path_on_host).collect();
    assert_eq!(paths, ["3.img", "2.img"]);
}

#[test]
fn a_refused_change_leaves_the_configuration_unchanged() {
    let mut config = VmConfig::default();
    apply(
        &mut config,
        Configure::NetworkInterface("tap=t,id=a".parse().unwrap()),
    )
    .unwrap();
    let before = config.clone();
    let same_tap = Configure::NetworkInterface("tap=t,id=b".parse().unwrap());
    let error = apply(&mut config, same_tap).unwrap_err();
    assert!(error.contains("host_dev_name"), "{error}");
    let update = MachineConfigUpdate {
        vcpu_count: Some(0),
        ..MachineConfigUpdate::default()
    };
    assert!(apply(&mut config, Configure::MachineConfigUpdate(update)).is_err());
    assert_eq!(config, before);
}

#[test]
fn an_update_changes_only_the_fields_it_gives() {
    let mut config = VmConfig::default();
    let update: MachineConfigUpdate = serde_json::from_str(r#"{"vcpu_count": 4}"#).unwrap();
    apply(&mut config, Configure::MachineConfigUpdate(update)).unwrap();
    assert_eq!(config.machine_config.vcpu_count, 4);
    assert_eq!(
        config.machine_config.mem_size_mib,
        MachineConfig::default().mem_size_mib
    );
}

#[test]
fn each_state_permits_its_actions() {
    use MachineState::{NotStarted, Paused, Running};
    let boot = Action::configure(Configure::BootSource(BootSource::default()));
    let logger = Action::configure(Configure::Logger(Logger::default()));
    let step = Action::Lifecycle;
    let permitted = [
        (boot, vec![NotStarted]),
        (logger, vec![NotStarted, Running, Paused]),
        (step(Lifecycle::Start), vec![NotStarted]),
        (step(Lifecycle::Pause), vec![Running, Paused]),
        (step(Lifecycle::Resume), vec![Running, Paused]),
        (step(Lifecycle::Stop), vec![NotStarted, Running, Paused]),
        (step(Lifecycle::SendCtrlAltDel), vec![Running]),
        (
            Action::Query(Query::Iommu),
            vec![NotStarted, Running, Paused],
        ),
    ];
    for (action, states) in permitted {
        for state in [NotStarted, Running, Paused] {
            let allowed = action.check_state(state).is_ok();
            assert_eq!(allowed, states.contains(&state), "{action:?} while {state}");
        }
    }
    let error = step(Lifecycle::Start).check_state(Running).unwrap_err();
    assert_eq!(
        error.to_string(),
        "starting is not possible: the machine is running"
    );
}

#[test]
fn calls_arrive_in_order_and_each_is_answered() {
    let (client, inbox) = channel().unwrap();
    let controller = thread::spawn(move || {
        let mut seen = Vec::new();
        while let Some(call) = inbox.wait() {
            let (action, answer) = call.split();
            answer(Ok(Reply::Version(action.name().to_owned())));
            seen.push(action);
        }
        seen
    });
    let start = Action::Lifecycle(Lifecycle::Start);
    let version = Reply::Version("starting".to_owned());
    assert_eq!(client.call(start.clone()), Ok(version));
    let stop = Action::Lifecycle(Lifecycle::Stop);
    client.call(stop.clone()).unwrap();
    drop(client);
    assert_eq!(controller.join().unwrap(), [start, stop]);
}

#[test]
fn a_call_that_the_controller_drops_is_answered_as_unanswered() {
    let (client, inbox) = channel().unwrap();
    let (outcomes, outcome) = mpsc::channel();
    let action = Action::Query(Query::Version);
    client
        .send(action.clone(), move |outcome| {
            outcomes.send(outcome).unwrap();
        })
        .unwrap();
    inbox.acknowledge();
    drop(inbox.next_call().unwrap());
    assert!(inbox.next_call().is_none());
    assert_eq!(outcome.recv().unwrap(), Err(ActionError::Unanswered));
    drop(inbox);
    let delivered = |_| panic!("a refused call is not delivered");
    assert_eq!(client.send(action, delivered), Err(SendError::Gone));
}

#[test]
fn calls_beyond_the_bound_are_refused_and_not_delivered() {
    let (client, inbox) = channel().unwrap();
    let (outcomes, outcome) = mpsc::channel();
    let mut accepted = 0;
    let refusal = loop {
        let outcomes = outcomes.clone();
        let deliver = move |outcome| drop(outcomes.send(outcome));
        match client.send(Action::Query(Query::Version), deliver) {
            Ok(()) => accepted += 1,
            Err(error) => break error,
        }
        assert!(accepted < 10_000, "the queue has no bound");
    };
    assert_eq!(refusal, SendError::Full);
    drop((inbox, outcomes));
    assert_eq!(outcome.iter().count(), accepted);
}

fn endpoint(id: &str, device: DeviceKind, slot: u32) -> EndpointInfo {
    EndpointInfo {
        id: id.to_owned(),
        device,
        pci_address: format!("00:{slot:02x}.0"),
        stream_id: slot << 3,
        state: EndpointState::Translated,
        domain: Some(1),
        asid: None,
        vmid: None,
        ats: None,
        registration: None,
        counters: EndpointCounters::default(),
    }
}

#[test]
fn endpoints_are_found_by_name_address_or_stream() {
    let info = IommuInfo {
        endpoints: vec![
            endpoint("1", DeviceKind::Block, 1),
            endpoint("1", DeviceKind::Net, 2),
            endpoint("net0", DeviceKind::Net, 3),
        ],
        ..IommuInfo::default()
    };
    let stream = |name| info.find(name).map(|endpoint| endpoint.stream_id);
    assert_eq!(stream("net0"), Ok(0x18));
    assert_eq!(stream("00:02.0"), Ok(0x10));
    assert_eq!(stream("0x8"), Ok(8));
    let ambiguous = stream("1").unwrap_err().to_string();
    assert!(ambiguous.contains("00:01.0 or 00:02.0"), "{ambiguous}");
    let unknown = stream("net9").unwrap_err().to_string();
    assert!(unknown.contains("1, 1, net0"), "{unknown}");
    let none = IommuInfo::default().find("x").unwrap_err().to_string();
    assert!(none.contains("none yet"), "{none}");
}

#[test]
fn addresses_keep_all_their_bits_in_json() {
    let json = serde_json::to_string(&Hex(u64::MAX)).unwrap();
    assert_eq!(json, r#""0xffffffffffffffff""#);
    assert_eq!(serde_json::from_str::<Hex>(&json).unwrap(), Hex(u64::MAX));
    assert_eq!("4096".parse(), Ok(Hex(4096)));
    for text in ["", "0x", "+1", "0x+1", "-1", "0x1g", "18446744073709551616"] {
        assert!(text.parse::<Hex>().is_err(), "{text}");
    }
}

#[test]
fn metrics_become_one_json_line_nested_by_label() {
    let faults = |device: &str, reason: &str, value| Sample {
        labels: vec![("device", device.to_owned()), ("type", reason.to_owned())],
        value,
    };
    let families = [
        MetricFamily::single("up", "Up.", 1),
        MetricFamily {
            name: "faults_total",
            help: "Faults.",
            kind: MetricKind::Counter,
            samples: vec![faults("a", "x", 1), faults("a", "y\n", 2)],
        },
    ];
    let line = metrics_json(&families, 7);
    assert!(!line.contains('\n'));
    let expected = serde_json::json!({
        "utc_timestamp_ms": 7, "up": 1, "faults_total": {"a": {"x": 1, "y\n": 2}}
    });
    assert_eq!(
        serde_json::from_str::<serde_json::Value>(&line).unwrap(),
        expected
    );
}
