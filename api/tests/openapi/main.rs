//! `resources/openapi.yaml` against the server. Permitted bodies are accepted, others are refused
//! by name, and the server's answers conform to the document.

mod document;

use api::http::{Request, Response};
use api::route::{View, respond, route};
use document::{Document, object};
use serde_json::{Value, json};
use vmm::action::{
    Action, ActionError, Ats, DeviceKind, EndpointCounters, EndpointInfo, EndpointState, Feature,
    Hex, InstanceInfo, IommuInfo, MachineState, Mapping, MappingsPage, Permissions, Registration,
    RegistrationKind, Reply,
};
use vmm::config::{IommuModel, Sandbox, VmConfig};

/// Replaces the path parameters of `path` by the document's example values.
fn filled(path: &str) -> String {
    path.replace("{drive_id}", "rootfs")
        .replace("{iface_id}", "rootfs")
        .replace("{endpoint}", "net0")
}

fn request(method: &str, target: &str, body: Option<&Value>) -> Request {
    Request {
        method: method.to_uppercase(),
        target: target.to_owned(),
        body: body.map_or(Vec::new(), |body| body.to_string().into_bytes()),
        keep_alive: true,
    }
}

fn fault(response: &Response) -> String {
    let body: Value = serde_json::from_slice(&response.body).unwrap();
    body["fault_message"].as_str().unwrap().to_owned()
}

/// Outcome of a change to a new machine.
fn outcome(method: &str, target: &str, body: &Value) -> Result<(), String> {
    let route = route(&request(method, target, Some(body))).map_err(|error| fault(&error))?;
    match route.action {
        Action::Configure(change) => change
            .apply_to(&mut VmConfig::default())
            .map_err(|error| error.to_string()),
        _ => Ok(()),
    }
}

/// [`outcome`], but a refusal for this architecture or a missing IOMMU model counts as accepted:
/// the document covers both.
fn accepts(method: &str, target: &str, body: &Value) -> Result<(), String> {
    match outcome(method, target, body) {
        Err(message) if target == "/iommu" && message.contains("smmuv3") => Ok(()),
        outcome => outcome,
    }
}

#[test]
fn paths_and_methods_are_those_of_the_document() {
    let document = Document::read();
    for (path, operations) in document.paths() {
        let target = filled(path);
        for method in ["get", "put", "patch", "delete", "post", "head"] {
            let served = operations.contains_key(method);
            let status = route(&request(method, &target, None)).map_or_else(|r| r.status, |_| 200);
            let expected = match (served, method) {
                (true, "get") => 200,
                // Without a body, which every change requires.
                (true, _) => 400,
                (false, _) => 405,
            };
            assert_eq!(status, expected, "{method} {target}");
        }
    }
}

#[test]
fn permitted_bodies_are_accepted() {
    let document = Document::read();
    let mut bodies = 0;
    for (method, path, schema) in document.changes() {
        let target = filled(&path);
        for body in document.permitted(&schema) {
            bodies += 1;
            let accepted = accepts(&method, &target, &body);
            assert_eq!(accepted, Ok(()), "{method} {target} {body}");
        }
    }
    assert!(bodies > 100, "only {bodies} bodies were tried");
}

#[test]
fn forbidden_bodies_are_refused_by_name() {
    let document = Document::read();
    let mut bodies = 0;
    for (method, path, schema) in document.changes() {
        let target = filled(&path);
        for (name, body) in document.forbidden(&schema) {
            bodies += 1;
            let message =
                outcome(&method, &target, &body).expect_err(&format!("{method} {target} {body}"));
            assert!(
                message.contains(&name),
                "{method} {target} {body}: {message}"
            );
        }
    }
    assert!(bodies > 300, "only {bodies} bodies were tried");
}

#[test]
fn the_document_names_every_field_that_is_read() {
    let document = Document::read();
    for (method, path, schema) in document.changes() {
        let body = json!({ "__unknown": 0 });
        let message = outcome(&method, &filled(&path), &body).unwrap_err();
        let (_, expected) = message.split_once("unknown field; use ").expect(&message);
        // Each name is between backticks.
        let mut read: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
        read.sort_unstable();
        let mut named: Vec<String> = object(&document.resolve(&schema)["properties"])
            .map(|(name, _)| name.clone())
            .collect();
        named.sort_unstable();
        assert_eq!(read, named, "{path}");
    }
}

/// Every reply of a machine, in all its variants.
fn replies() -> Vec<(&'static str, Reply)> {
    let states = [
        MachineState::NotStarted,
        MachineState::Running,
        MachineState::Paused,
    ];
    let instance = |state| {
        Reply::InstanceInfo(InstanceInfo {
            app_name: "portcullis".to_owned(),
            id: "a".to_owned(),
            state,
            vmm_version: "1".to_owned(),
            sandbox: Sandbox::On,
        })
    };
    let mut replies: Vec<_> = states
        .into_iter()
        .map(|state| ("/", instance(state)))
        .collect();
    replies.push(("/version", Reply::Version("1".to_owned())));
    let machine = r#"{"boot-source": {"kernel_image_path": "k"}, "entropy": {},
        "drives": [{"drive_id": "a", "path_on_host": "b"}], "vsock": {"guest_cid": 3},
        "network-interfaces": [{"iface_id": "a", "host_dev_name": "b", "mtu": 1500}],
        "serial": {}, "logger": {"level": "warn"}, "metrics": {"metrics_path": "m"}}"#;
    for machine in ["{}", machine] {
        let config = VmConfig::from_json(machine).unwrap();
        replies.push(("/vm/config", Reply::VmConfig(Box::new(config))));
    }
    for endpoint in endpoints() {
        let path = "/iommu/endpoints/{endpoint}";
        replies.push((path, Reply::Endpoint(Box::new(endpoint))));
    }
    for model in [
        IommuModel::None,
        IommuModel::VirtioIommu,
        IommuModel::Smmuv3,
    ] {
        let feature = |negotiated| Feature {
            name: "f".to_owned(),
            negotiated,
        };
        let info = IommuInfo {
            model,
            enabled: true,
            features: vec![feature(None), feature(Some(true))],
            endpoints: endpoints(),
        };
        replies.push(("/iommu", Reply::Iommu(info)));
    }
    let mapping = Mapping {
        start: Hex(0),
        end: Hex(u64::MAX),
        target: Hex(1 << 40),
        permissions: Permissions::default(),
        mmio: true,
    };
    for next in [None, Some(Hex(4096))] {
        let mappings = vec![mapping.clone()];
        let path = "/iommu/endpoints/{endpoint}/mappings";
        replies.push((path, Reply::Mappings(MappingsPage { mappings, next })));
    }
    replies
}

fn endpoints() -> Vec<EndpointInfo> {
    let bare = EndpointInfo {
        id: "net0".to_owned(),
        device: DeviceKind::Net,
        pci_address: "00:03.0".to_owned(),
        stream_id: u32::MAX,
        state: EndpointState::Direct,
        domain: None,
        asid: None,
        vmid: None,
        ats: None,
        registration: None,
        counters: EndpointCounters::default(),
    };
    let full = |device, state, kind| EndpointInfo {
        device,
        state,
        domain: Some(u32::MAX),
        asid: Some(u16::MAX),
        vmid: Some(0),
        ats: Some(Ats::default()),
        registration: Some(Registration {
            kind,
            reason: "r".to_owned(),
        }),
        counters: EndpointCounters {
            faults: [("C_BAD_STE".to_owned(), 1)].into(),
            ..EndpointCounters::default()
        },
        ..bare.clone()
    };
    vec![
        bare.clone(),
        full(
            DeviceKind::Block,
            EndpointState::Bypass,
            RegistrationKind::DevIotlb,
        ),
        full(
            DeviceKind::Vsock,
            EndpointState::Translated,
            RegistrationKind::Unmap,
        ),
        full(
            DeviceKind::Entropy,
            EndpointState::Blocked,
            RegistrationKind::MapUnmap,
        ),
    ]
}

#[test]
fn answers_conform_to_the_document() {
    let document = Document::read();
    for (path, reply) in replies() {
        let text = format!("{reply:?}");
        let response = respond(&View::Whole, Ok(reply));
        let body: Value = serde_json::from_slice(&response.body).unwrap();
        let schema = document.answer(path, "get", "200");
        assert_eq!(document.conforms(&schema, &body), Ok(()), "{path} {text}");
    }
    let response = respond(&View::Whole, Err(ActionError::Unanswered));
    let body: Value = serde_json::from_slice(&response.body).unwrap();
    let schema = document.answer("/", "get", "default");
    assert_eq!(document.conforms(&schema, &body), Ok(()));
}

#[test]
fn sections_of_a_configuration_conform_to_the_document() {
    let document = Document::read();
    let machine = r#"{"boot-source": {"kernel_image_path": "k"}, "entropy": {},
        "drives": [{"drive_id": "rootfs", "path_on_host": "b"}], "vsock": {"guest_cid": 3},
        "network-interfaces": [{"iface_id": "rootfs", "host_dev_name": "b"}],
        "serial": {}, "logger": {}}"#;
    let config = VmConfig::from_json(machine).unwrap();
    let mut shown = 0;
    for (path, _) in document.paths() {
        let Ok(route) = route(&request("get", &filled(path), None)) else {
            continue;
        };
        if !matches!(route.view, View::Section(_)) {
            continue;
        }
        shown += 1;
        let reply = Reply::VmConfig(Box::new(config.clone()));
        let response = respond(&route.view, Ok(reply));
        let body: Value = serde_json::from_slice(&response.body).unwrap();
        let schema = document.answer(path, "get", "200");
        assert_eq!(document.conforms(&schema, &body), Ok(()), "{path} {body}");
    }
    assert_eq!(shown, 10);
}
