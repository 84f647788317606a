//! Bodies of every resource, applied to a machine's configuration: an accepted configuration is
//! valid, and equals itself after serialization.
#![no_main]

use api::http::Request;
use api::route::route;
use libfuzzer_sys::fuzz_target;
use vmm::action::Action;
use vmm::config::VmConfig;

const TARGETS: [(&str, &str); 13] = [
    ("PUT", "/machine-config"),
    ("PATCH", "/machine-config"),
    ("PUT", "/boot-source"),
    ("PUT", "/drives/a"),
    ("PUT", "/network-interfaces/a"),
    ("PUT", "/vsock"),
    ("PUT", "/entropy"),
    ("PUT", "/serial"),
    ("PUT", "/logger"),
    ("PUT", "/metrics"),
    ("PUT", "/iommu"),
    ("PUT", "/actions"),
    ("PATCH", "/vm"),
];

fuzz_target!(|bodies: Vec<(u8, &[u8])>| {
    let mut config = VmConfig::default();
    for (target, body) in bodies {
        if let Ok(text) = std::str::from_utf8(body)
            && let Ok(whole) = VmConfig::from_json(text)
        {
            reads_back(&whole);
        }
        let (method, path) = TARGETS[usize::from(target) % TARGETS.len()];
        let request = Request {
            method: method.to_owned(),
            target: path.to_owned(),
            body: body.to_vec(),
            keep_alive: true,
        };
        let Ok(route) = route(&request) else { continue };
        let Action::Configure(change) = route.action else {
            continue;
        };
        let before = config.clone();
        match change.apply_to(&mut config) {
            Ok(()) => reads_back(&config),
            Err(error) => {
                assert_eq!(config, before);
                assert!(!error.to_string().contains('\n'), "{error}");
            }
        }
    }
});

fn reads_back(config: &VmConfig) {
    let json = serde_json::to_string(config).expect("a configuration is JSON");
    let again = VmConfig::from_json(&json).expect("a configuration is valid as input");
    assert_eq!(&again, config);
}
