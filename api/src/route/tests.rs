use super::*;
use vmm::action::{MachineState, MappingsPage, MetricFamily};
use vmm::config::ConfigError;

fn request(method: &str, target: &str, body: &str) -> Request {
    Request {
        method: method.to_owned(),
        target: target.to_owned(),
        body: body.as_bytes().to_vec(),
        keep_alive: true,
    }
}

fn action(method: &str, target: &str, body: &str) -> Action {
    route(&request(method, target, body)).unwrap().action
}

fn refused(method: &str, target: &str, body: &str) -> (u16, String) {
    let response = route(&request(method, target, body)).unwrap_err();
    (response.status, String::from_utf8(response.body).unwrap())
}

#[test]
fn firecrackers_getting_started_is_accepted() {
    let logger = r#"{"log_path": "./firecracker.log", "level": "Debug",
        "show_level": true, "show_log_origin": true}"#;
    assert_eq!(action("PUT", "/logger", logger).name(), "changing logger");
    let boot =
        r#"{"kernel_image_path": "./vmlinux", "boot_args": "console=ttyS0 reboot=k panic=1"}"#;
    let Action::Configure(change) = action("PUT", "/boot-source", boot) else {
        panic!("not a configuration");
    };
    assert!(matches!(*change, Configure::BootSource(_)));
    let drive = r#"{"drive_id": "rootfs", "path_on_host": "./x.ext4",
        "is_root_device": true, "is_read_only": false}"#;
    assert_eq!(
        action("PUT", "/drives/rootfs", drive).name(),
        "changing drives"
    );
    let net = r#"{"iface_id": "net1", "guest_mac": "06:00:AC:10:00:02", "host_dev_name": "tap0"}"#;
    let net = action("PUT", "/network-interfaces/net1", net);
    assert_eq!(net.name(), "changing network-interfaces");
    let start = action("PUT", "/actions", r#"{"action_type": "InstanceStart"}"#);
    assert_eq!(start, Action::Lifecycle(Lifecycle::Start));
}

#[test]
fn lifecycle_requests_become_their_actions() {
    let put = |kind: &str| {
        action(
            "PUT",
            "/actions",
            &format!(r#"{{"action_type": "{kind}"}}"#),
        )
    };
    assert_eq!(put("InstanceStop"), Action::Lifecycle(Lifecycle::Stop));
    assert_eq!(
        put("SendCtrlAltDel"),
        Action::Lifecycle(Lifecycle::SendCtrlAltDel)
    );
    assert_eq!(
        put("FlushMetrics"),
        Action::Lifecycle(Lifecycle::FlushMetrics)
    );
    let vm = |state: &str| action("PATCH", "/vm", &format!(r#"{{"state": "{state}"}}"#));
    assert_eq!(vm("Paused"), Action::Lifecycle(Lifecycle::Pause));
    assert_eq!(vm("Resumed"), Action::Lifecycle(Lifecycle::Resume));
}

#[test]
fn paths_take_a_final_slash_an_authority_and_percent_encoding() {
    let version = Action::Query(Query::Version);
    assert_eq!(action("GET", "/version/", ""), version);
    assert_eq!(action("GET", "http://localhost/version", ""), version);
    let instance = Action::Query(Query::InstanceInfo);
    assert_eq!(action("GET", "/", ""), instance);
    assert_eq!(action("GET", "http://localhost", ""), instance);
    let endpoint = Action::Query(Query::Endpoint("00:03.0".to_owned()));
    assert_eq!(action("GET", "/iommu/endpoints/00%3a03.0", ""), endpoint);
    for target in ["*", "version", "/iommu/endpoints/%", "/drives/%ff", "/%zz"] {
        assert_eq!(refused("GET", target, "").0, 400, "{target}");
    }
}

#[test]
fn mapping_pages_are_bounded() {
    let page = |query: &str| action("GET", &format!("/iommu/endpoints/net0/mappings{query}"), "");
    let expected = |after, limit| {
        Action::Query(Query::Mappings {
            endpoint: "net0".to_owned(),
            after,
            limit,
        })
    };
    assert_eq!(page(""), expected(None, DEFAULT_MAPPINGS_PAGE));
    assert_eq!(page("?after=0x1000&limit=7"), expected(Some(0x1000), 7));
    for query in ["limit=0", "limit=1001", "limit=x", "after=-1", "before=1"] {
        let target = format!("/iommu/endpoints/net0/mappings?{query}");
        let (status, body) = refused("GET", &target, "");
        assert_eq!(status, 400);
        assert!(body.contains(query.split('=').next().unwrap()), "{body}");
    }
    assert_eq!(refused("GET", "/version?x=1", "").0, 400);
}

#[test]
fn wrong_paths_and_methods_are_distinguished() {
    for target in [
        "/nothing",
        "/vm/other",
        "/drives/a/b",
        "//version",
        "/iommu/x",
        "/balloon",
        "/mmds/config",
    ] {
        assert_eq!(refused("GET", target, "").0, 404, "{target}");
    }
    let wrong = [
        ("PUT", "/", "GET"),
        ("HEAD", "/version", "GET"),
        ("get", "/version", "GET"),
        ("GET", "/actions", "PUT"),
        ("PATCH", "/drives/a", "GET, PUT"),
        ("DELETE", "/machine-config", "GET, PATCH, PUT"),
        ("PUT", "/drives", "GET"),
    ];
    for (method, target, allow) in wrong {
        let response = route(&request(method, target, "{}")).unwrap_err();
        assert_eq!(
            (response.status, response.allow),
            (405, Some(allow)),
            "{method} {target}"
        );
    }
}

#[test]
fn bodies_are_refused_by_the_field_at_fault() {
    let wrong = [
        (
            "/machine-config",
            r#"{"vcpu_count": "two", "mem_size_mib": 1}"#,
            "vcpu_count",
        ),
        ("/machine-config", r#"{"vcpu_count": 2}"#, "mem_size_mib"),
        (
            "/machine-config",
            r#"{"vcpu_count": 2.5, "mem_size_mib": 1}"#,
            "vcpu_count",
        ),
        ("/iommu", r#"{"model": "magic"}"#, "magic"),
        ("/iommu", r#"{"modle": "none"}"#, "did you mean `model`?"),
        ("/vsock", r#"{"guest_cid": 3, "guest_cid": 4}"#, "guest_cid"),
        ("/actions", r#"{"action_type": "Explode"}"#, "action_type"),
        (
            "/drives/a",
            r#"{"drive_id": "b", "path_on_host": "x"}"#,
            "drive_id",
        ),
        (
            "/network-interfaces/a",
            r#"{"iface_id": "b", "host_dev_name": "x"}"#,
            "iface_id",
        ),
        (
            "/vsock",
            r#"{"guest_sid": 3}"#,
            "vsock.guest_sid: unknown field; did you mean `guest_cid`?",
        ),
        ("/vsock", "{}", "vsock.guest_cid: is missing"),
        (
            "/boot-source",
            r#"{"kernel_image_path": 5}"#,
            "boot-source.kernel_image_path: invalid type",
        ),
        ("/boot-source", "{", "JSON: EOF"),
        ("/entropy", "", "needs a JSON body"),
        ("/entropy", "{} x", "trailing"),
        ("/entropy", "\u{0}", "JSON"),
    ];
    for (target, body, expected) in wrong {
        let (status, answer) = refused("PUT", target, body);
        assert_eq!(status, 400);
        assert!(answer.contains(expected), "{target} {body}: {answer}");
    }
    let deep = "[".repeat(40_000);
    assert_eq!(refused("PUT", "/vsock", &deep).0, 400);
    assert!(refused("GET", "/version", "{}").1.contains("no body"));
}

#[test]
fn replies_become_the_requested_section() {
    let show = |view: View, reply| respond(&view, Ok(reply));
    assert_eq!(show(View::Whole, Reply::Done), Response::no_content());
    let version = show(View::Whole, Reply::Version("1.2".to_owned()));
    assert_eq!(version.body, br#"{"firecracker_version":"1.2"}"#);
    let page = show(View::Whole, Reply::Mappings(MappingsPage::default()));
    assert_eq!(page.body, br#"{"mappings":[],"next":null}"#);
    let families = vec![MetricFamily::single("up", "Up.", 1)];
    let metrics = show(View::Whole, Reply::Metrics(families));
    assert!(
        metrics
            .content_type
            .starts_with("text/plain; version=0.0.4")
    );

    let config = VmConfig {
        drives: vec!["path=x,id=a".parse().unwrap()],
        ..VmConfig::default()
    };
    let section = |section| {
        let reply = Reply::VmConfig(Box::new(config.clone()));
        show(View::Section(section), reply)
    };
    let drive = section(Section::Drive("a".to_owned()));
    assert_eq!(drive, Response::json(&config.drives[0]));
    assert_eq!(section(Section::Drive("b".to_owned())).status, 404);
    assert_eq!(section(Section::Drives), Response::json(&config.drives));
    assert_eq!(section(Section::BootSource).status, 404);
    assert_eq!(section(Section::MachineConfig).status, 200);
}

#[test]
fn errors_become_firecrackers_faults() {
    let status = |error| respond(&View::Whole, Err(error)).status;
    let state = MachineState::Running;
    let action = "starting";
    assert_eq!(
        status(ActionError::Invalid(ConfigError::new("f", "p"))),
        400
    );
    assert_eq!(status(ActionError::WrongState { action, state }), 400);
    assert_eq!(status(ActionError::Failed("x".to_owned())), 400);
    assert_eq!(status(ActionError::NotFound("x".to_owned())), 404);
    assert_eq!(status(ActionError::Unanswered), 503);
    let response = respond(&View::Whole, Err(ActionError::Failed("no tap0".to_owned())));
    assert_eq!(response.body, br#"{"fault_message":"no tap0"}"#);
}

#[test]
fn mistyped_paths_are_refused_with_the_closest_one() {
    for (path, fix) in [
        ("/boot_source", "did you mean /boot-source?"),
        ("/machine-confg", "did you mean /machine-config?"),
        ("/vm/confg", "did you mean /vm/config?"),
        ("/drive", "did you mean /drives?"),
        ("/iommu/endpoints", "name an endpoint"),
    ] {
        let (status, message) = refused("GET", path, "");
        assert!(status == 404 && message.contains(fix), "{path}: {message}");
    }
    assert!(!refused("GET", "/nowhere", "").1.contains("did you mean"));
    let (status, message) = refused("PUT", "/drives", "{}");
    assert!(
        status == 405 && message.contains("or /drives/DRIVE_ID"),
        "{message}"
    );
}

#[test]
fn every_path_that_is_suggested_is_served() {
    for path in PATHS.iter().filter(|path| **path != "/iommu/endpoints") {
        assert!(Resource::find(path).is_ok(), "{path}");
    }
}
