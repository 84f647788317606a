//! Converts requests into actions, and replies into responses.

use crate::http::{Request, Response};
use crate::prometheus;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use vmm::action::{
    Action, ActionError, Configure, Hex, Lifecycle, MAX_MAPPINGS_PAGE, Outcome, Query, Reply,
};
use vmm::config::{Drive, NetworkInterface, VmConfig, closest, parse_json};
use vmm::error::Chain;

/// Mappings on a page if the request has no `limit`.
const DEFAULT_MAPPINGS_PAGE: u32 = 256;

/// Resources of Firecracker's without a counterpart, by the first segment of their path.
const UNSUPPORTED: [&str; 6] = [
    "balloon",
    "cpu-config",
    "hotplug",
    "mmds",
    "pmem",
    "snapshot",
];

/// Action and response format of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// The action of the machine.
    pub action: Action,
    /// The part of the reply that is returned.
    pub view: View,
}

/// Part of a reply that answers the request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum View {
    /// The whole reply.
    Whole,
    /// One section of a [`Reply::VmConfig`].
    Section(Section),
}

/// A section of the configuration with its own path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Section {
    /// `/machine-config`
    MachineConfig,
    /// `/boot-source`
    BootSource,
    /// `/drives`
    Drives,
    /// `/drives/{drive_id}`
    Drive(String),
    /// `/network-interfaces`
    NetworkInterfaces,
    /// `/network-interfaces/{iface_id}`
    NetworkInterface(String),
    /// `/vsock`
    Vsock,
    /// `/entropy`
    Entropy,
    /// `/serial`
    Serial,
    /// `/logger`
    Logger,
}

/// Resource that a path names.
enum Resource {
    Instance,
    Version,
    Actions,
    Vm,
    VmConfig,
    Metrics,
    Iommu,
    Endpoint(String),
    Mappings(String),
    Section(Section),
}

impl Resource {
    fn find(path: &str) -> Result<Self, Response> {
        let segments = path_segments(path)?;
        let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
        let section = |section| Ok(Self::Section(section));
        match segments.as_slice() {
            [] => Ok(Self::Instance),
            ["version"] => Ok(Self::Version),
            ["actions"] => Ok(Self::Actions),
            ["vm"] => Ok(Self::Vm),
            ["vm", "config"] => Ok(Self::VmConfig),
            ["metrics"] => Ok(Self::Metrics),
            ["iommu"] => Ok(Self::Iommu),
            ["iommu", "endpoints", id] => Ok(Self::Endpoint((*id).to_owned())),
            ["iommu", "endpoints", id, "mappings"] => Ok(Self::Mappings((*id).to_owned())),
            ["machine-config"] => section(Section::MachineConfig),
            ["boot-source"] => section(Section::BootSource),
            ["drives"] => section(Section::Drives),
            ["drives", id] => section(Section::Drive((*id).to_owned())),
            ["network-interfaces"] => section(Section::NetworkInterfaces),
            ["network-interfaces", id] => section(Section::NetworkInterface((*id).to_owned())),
            ["vsock"] => section(Section::Vsock),
            ["entropy"] => section(Section::Entropy),
            ["serial"] => section(Section::Serial),
            ["logger"] => section(Section::Logger),
            [first, ..] if UNSUPPORTED.contains(first) => Err(Response::fault(
                404,
                &format!("/{first} is not supported by this monitor"),
            )),
            _ => Err(nothing_at(path)),
        }
    }

    /// Methods of the resource, as an `Allow` field lists them.
    fn methods(&self) -> &'static str {
        match self {
            Self::Instance
            | Self::Version
            | Self::VmConfig
            | Self::Endpoint(_)
            | Self::Mappings(_)
            | Self::Section(Section::Drives | Section::NetworkInterfaces) => "GET",
            Self::Actions => "PUT",
            Self::Vm => "PATCH",
            Self::Section(Section::MachineConfig) => "GET, PATCH, PUT",
            Self::Metrics | Self::Iommu | Self::Section(_) => "GET, PUT",
        }
    }
}

/// Paths without a variable segment.
const PATHS: [&str; 15] = [
    "/version",
    "/actions",
    "/vm",
    "/vm/config",
    "/metrics",
    "/iommu",
    "/machine-config",
    "/boot-source",
    "/drives",
    "/network-interfaces",
    "/vsock",
    "/entropy",
    "/serial",
    "/logger",
    "/iommu/endpoints",
];

fn nothing_at(path: &str) -> Response {
    let fix = match closest(path, PATHS) {
        Some("/iommu/endpoints") => "; name an endpoint: /iommu/endpoints/ENDPOINT".to_owned(),
        Some(near) => format!("; did you mean {near}?"),
        None => String::new(),
    };
    Response::fault(404, &format!("there is nothing at {path}{fix}"))
}

/// Converts a request into an action.
///
/// # Errors
/// The request is not valid; the response explains the fault.
pub fn route(request: &Request) -> Result<Route, Response> {
    let (path, query) = split_target(&request.target)?;
    let resource = Resource::find(path)?;
    let methods = resource.methods();
    let method = request.method.as_str();
    if !methods.split(", ").any(|served| served == method) {
        let one = match resource {
            Resource::Section(Section::Drives) => ", or /drives/DRIVE_ID",
            Resource::Section(Section::NetworkInterfaces) => ", or /network-interfaces/IFACE_ID",
            _ => "",
        };
        let message = format!("{method} is not served at {path}; use {methods}{one}");
        return Err(Response::method_not_allowed(&message, methods));
    }
    if let Resource::Mappings(endpoint) = resource {
        refuse_body(request)?;
        return mappings(endpoint, query);
    }
    if let Some((name, _)) = parameters(query).next() {
        return Err(bad_request(format!("{path} takes no parameter {name}")));
    }
    if method == "GET" {
        refuse_body(request)?;
        return Ok(get(resource));
    }
    let action = change(resource, method == "PATCH", &request.body)?;
    let view = View::Whole;
    Ok(Route { action, view })
}

fn get(resource: Resource) -> Route {
    let (query, view) = match resource {
        Resource::Section(section) => (Query::VmConfig, View::Section(section)),
        Resource::Version => (Query::Version, View::Whole),
        Resource::VmConfig => (Query::VmConfig, View::Whole),
        Resource::Metrics => (Query::Metrics, View::Whole),
        Resource::Iommu => (Query::Iommu, View::Whole),
        Resource::Endpoint(id) => (Query::Endpoint(id), View::Whole),
        // `route` permits GET on no other resource.
        Resource::Instance | Resource::Actions | Resource::Vm | Resource::Mappings(_) => {
            (Query::InstanceInfo, View::Whole)
        }
    };
    let action = Action::Query(query);
    Route { action, view }
}

fn change(resource: Resource, patch: bool, body: &[u8]) -> Result<Action, Response> {
    let change = match resource {
        Resource::Actions => {
            return read::<ActionRequest>("actions", body).map(ActionRequest::action);
        }
        Resource::Vm => return read::<StateRequest>("vm", body).map(StateRequest::action),
        Resource::Metrics => Configure::Metrics(read("metrics", body)?),
        Resource::Iommu => Configure::Iommu(read("iommu", body)?),
        Resource::Section(section) => match section {
            Section::MachineConfig if patch => {
                Configure::MachineConfigUpdate(read("machine-config", body)?)
            }
            Section::MachineConfig => Configure::MachineConfig(read("machine-config", body)?),
            Section::BootSource => Configure::BootSource(read("boot-source", body)?),
            Section::Drive(id) => {
                let drive: Drive = read("drives", body)?;
                same_id("drives.drive_id", &id, &drive.drive_id)?;
                Configure::Drive(drive)
            }
            Section::NetworkInterface(id) => {
                let interface: NetworkInterface = read("network-interfaces", body)?;
                same_id("network-interfaces.iface_id", &id, &interface.iface_id)?;
                Configure::NetworkInterface(interface)
            }
            Section::Vsock => Configure::Vsock(read("vsock", body)?),
            Section::Entropy => Configure::Entropy(read("entropy", body)?),
            Section::Serial => Configure::Serial(read("serial", body)?),
            Section::Logger => Configure::Logger(read("logger", body)?),
            Section::Drives | Section::NetworkInterfaces => {
                return Err(bad_request("name the device in the path".to_owned()));
            }
        },
        // `route` permits PUT and PATCH on no other resource.
        _ => return Err(bad_request("only GET is served here".to_owned())),
    };
    Ok(Action::configure(change))
}

/// The body of `PUT /actions`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActionRequest {
    /// `InstanceStart`, and the other names of [`ActionType`].
    pub action_type: ActionType,
}

/// Actions of `PUT /actions`. The names are Firecracker's, with `InstanceStop` added.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum ActionType {
    /// Builds the machine and runs it.
    InstanceStart,
    /// Ends the machine and the monitor.
    InstanceStop,
    /// Asks the guest to shut down.
    SendCtrlAltDel,
    /// Writes the metrics to their file.
    FlushMetrics,
}

impl ActionRequest {
    fn action(self) -> Action {
        Action::Lifecycle(match self.action_type {
            ActionType::InstanceStart => Lifecycle::Start,
            ActionType::InstanceStop => Lifecycle::Stop,
            ActionType::SendCtrlAltDel => Lifecycle::SendCtrlAltDel,
            ActionType::FlushMetrics => Lifecycle::FlushMetrics,
        })
    }
}

/// The body of `PATCH /vm`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StateRequest {
    /// The requested state.
    pub state: RequestedState,
}

/// States that `PATCH /vm` can request.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub enum RequestedState {
    /// vCPUs paused.
    Paused,
    /// vCPUs running.
    Resumed,
}

impl StateRequest {
    fn action(self) -> Action {
        Action::Lifecycle(match self.state {
            RequestedState::Paused => Lifecycle::Pause,
            RequestedState::Resumed => Lifecycle::Resume,
        })
    }
}

/// The answer to `GET /version`. Firecracker's clients read this field's name.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Version {
    /// This monitor's version.
    pub firecracker_version: String,
}

fn mappings(endpoint: String, query: &str) -> Result<Route, Response> {
    let mut after = None;
    let mut limit = DEFAULT_MAPPINGS_PAGE;
    for (name, value) in parameters(query) {
        let wrong = |problem: String| bad_request(format!("{name}: {problem}"));
        match name {
            "after" => {
                let Hex(address) = value
                    .parse()
                    .map_err(|problem: &str| wrong(problem.to_owned()))?;
                after = Some(address);
            }
            "limit" => {
                limit = value
                    .parse()
                    .ok()
                    .filter(|limit| (1..=MAX_MAPPINGS_PAGE).contains(limit))
                    .ok_or_else(|| wrong(format!("use 1 to {MAX_MAPPINGS_PAGE}")))?;
            }
            _ => {
                return Err(wrong(
                    "unknown parameter; there are after and limit".to_owned(),
                ));
            }
        }
    }
    let action = Action::Query(Query::Mappings {
        endpoint,
        after,
        limit,
    });
    let view = View::Whole;
    Ok(Route { action, view })
}

/// Converts the outcome of an action into the response to its request.
#[must_use]
pub fn respond(view: &View, outcome: Outcome) -> Response {
    match outcome {
        Ok(reply) => show(view, reply),
        Err(error) => Response::fault(status_of(&error), &Chain(&error).to_string()),
    }
}

fn status_of(error: &ActionError) -> u16 {
    match error {
        // Firecracker answers 400 to every valid request that cannot be performed.
        ActionError::Invalid(_) | ActionError::WrongState { .. } | ActionError::Failed(_) => 400,
        ActionError::NotFound(_) => 404,
        ActionError::Unanswered => 503,
    }
}

fn show(view: &View, reply: Reply) -> Response {
    match (view, reply) {
        (_, Reply::Done) => Response::no_content(),
        (View::Section(section), Reply::VmConfig(config)) => show_section(section, &config),
        (_, Reply::VmConfig(config)) => Response::json(&config),
        (_, Reply::InstanceInfo(info)) => Response::json(&info),
        (_, Reply::Version(firecracker_version)) => Response::json(&Version {
            firecracker_version,
        }),
        (_, Reply::Metrics(families)) => {
            Response::text(prometheus::CONTENT_TYPE, prometheus::render(&families))
        }
        (_, Reply::Iommu(info)) => Response::json(&info),
        (_, Reply::Endpoint(endpoint)) => Response::json(&endpoint),
        (_, Reply::Mappings(page)) => Response::json(&page),
    }
}

fn show_section(section: &Section, config: &VmConfig) -> Response {
    fn present(value: Option<&impl Serialize>, name: &str) -> Response {
        value.map_or_else(
            || Response::fault(404, &format!("{name} is not configured")),
            Response::json,
        )
    }
    match section {
        Section::MachineConfig => Response::json(&config.machine_config),
        Section::BootSource => present(config.boot_source.as_ref(), "boot-source"),
        Section::Drives => Response::json(&config.drives),
        Section::Drive(id) => {
            let drive = config.drives.iter().find(|drive| drive.drive_id == *id);
            present(drive, &format!("drive {id}"))
        }
        Section::NetworkInterfaces => Response::json(&config.network_interfaces),
        Section::NetworkInterface(id) => {
            let mut interfaces = config.network_interfaces.iter();
            let interface = interfaces.find(|interface| interface.iface_id == *id);
            present(interface, &format!("network interface {id}"))
        }
        Section::Vsock => present(config.vsock.as_ref(), "vsock"),
        Section::Entropy => present(config.entropy.as_ref(), "entropy"),
        Section::Serial => present(config.serial.as_ref(), "serial"),
        Section::Logger => present(config.logger.as_ref(), "logger"),
    }
}

fn bad_request(message: String) -> Response {
    Response::fault(400, &message)
}

fn refuse_body(request: &Request) -> Result<(), Response> {
    if request.body.is_empty() {
        return Ok(());
    }
    Err(bad_request("GET takes no body".to_owned()))
}

/// Parses the body of a request that changes `section`.
fn read<T: DeserializeOwned>(section: &str, body: &[u8]) -> Result<T, Response> {
    if body.is_empty() {
        return Err(bad_request("the request needs a JSON body".to_owned()));
    }
    parse_json(body).map_err(|error| bad_request(Chain(&error.in_document(section)).to_string()))
}

fn same_id(field: &str, path: &str, body: &str) -> Result<(), Response> {
    if path == body {
        return Ok(());
    }
    Err(bad_request(format!(
        "{field}: the path says {path:?} and the body says {body:?}; make them the same"
    )))
}

/// Splits a target (RFC 9112 §3.2) into path and query. The absolute form is accepted too, with any
/// authority: the socket has one server.
fn split_target(target: &str) -> Result<(&str, &str), Response> {
    let local = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |slash| &rest[slash..]),
        None => target,
    };
    if !local.starts_with('/') {
        return Err(bad_request(format!("{target} is not a path")));
    }
    let local = local.split('#').next().unwrap_or(local);
    Ok(local.split_once('?').unwrap_or((local, "")))
}

/// The decoded segments of a path; a final slash adds none.
fn path_segments(path: &str) -> Result<Vec<String>, Response> {
    let inner = path.strip_prefix('/').unwrap_or(path);
    let inner = inner.strip_suffix('/').unwrap_or(inner);
    if inner.is_empty() {
        return Ok(Vec::new());
    }
    inner
        .split('/')
        .map(|segment| {
            percent_decode(segment)
                .ok_or_else(|| bad_request(format!("{path} is not percent-encoded UTF-8")))
        })
        .collect()
}

fn percent_decode(text: &str) -> Option<String> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        if byte != b'%' {
            decoded.push(byte);
            continue;
        }
        let mut digit = || char::from(bytes.next()?).to_digit(16);
        let value = (digit()? << 4) | digit()?;
        decoded.push(u8::try_from(value).ok()?);
    }
    String::from_utf8(decoded).ok()
}

fn parameters(query: &str) -> impl Iterator<Item = (&str, &str)> {
    query
        .split('&')
        .filter(|item| !item.is_empty())
        .map(|item| item.split_once('=').unwrap_or((item, "")))
}

#[cfg(test)]
mod tests;
