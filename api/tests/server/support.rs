//! A simulated machine: a controller on a channel, with a real socket.

use api::{Limits, Server, Socket};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use vmm::action::{
    Action, DeviceKind, EndpointCounters, EndpointInfo, EndpointState, Feature, Hex, Inbox,
    InstanceInfo, IommuInfo, Lifecycle, MachineState, Mapping, MappingsPage, MetricFamily, Outcome,
    Permissions, Query, Registration, RegistrationKind, Reply, channel,
};
use vmm::config::VmConfig;

/// Upper bound on every wait of a test.
const TIMEOUT: Duration = Duration::from_secs(20);

/// A served machine in its own directory.
pub struct Machine {
    directory: PathBuf,
    server: Option<Server>,
    controller: Option<JoinHandle<Vec<Action>>>,
}

impl Machine {
    /// Creates a machine that answers as a real one does.
    pub fn new(limits: Limits) -> Self {
        Self::with_controller(limits, |inbox| {
            let mut machine = Model::default();
            let mut seen = Vec::new();
            while let Some(call) = inbox.wait() {
                let (action, answer) = call.split();
                seen.push(action.clone());
                answer(machine.handle(action));
            }
            seen
        })
    }

    /// Creates a machine whose controller is `control`, which returns the actions that it received.
    pub fn with_controller(
        limits: Limits,
        control: impl FnOnce(Inbox) -> Vec<Action> + Send + 'static,
    ) -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("portcullis-serve-{}-{number}", std::process::id());
        let directory = std::env::temp_dir().join(name);
        std::fs::create_dir(&directory).unwrap();
        let (client, inbox) = channel().unwrap();
        let controller = thread::spawn(move || control(inbox));
        let socket = Socket::bind(&directory.join("api.sock")).unwrap();
        let server = Server::start(socket, client, limits).unwrap();
        Self {
            directory,
            server: Some(server),
            controller: Some(controller),
        }
    }

    /// Path of the socket.
    pub fn path(&self) -> PathBuf {
        self.directory.join("api.sock")
    }

    /// Opens a connection to the server.
    pub fn connect(&self) -> Connection {
        Connection::new(&self.path())
    }

    /// Sends one request on a new connection; returns status and body.
    pub fn request(&self, method: &str, target: &str, body: &str) -> (u16, String) {
        let mut connection = self.connect();
        connection.send_request(method, target, body);
        connection.response()
    }

    /// Ends the server, then the controller, which returns the actions that it received.
    pub fn stop(&mut self) -> Vec<Action> {
        self.server = None;
        self.controller
            .take()
            .map_or(Vec::new(), |thread| thread.join().unwrap())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.server = None;
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// A client's connection.
pub struct Connection {
    pub stream: UnixStream,
    received: Vec<u8>,
}

impl Connection {
    fn new(path: &Path) -> Self {
        let stream = UnixStream::connect(path).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        let received = Vec::new();
        Self { stream, received }
    }

    /// Sends bytes.
    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    /// Sends a request.
    pub fn send_request(&mut self, method: &str, target: &str, body: &str) {
        let length = body.len();
        let head = format!("{method} {target} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
        self.send(head.as_bytes());
        self.send(body.as_bytes());
    }

    /// Reads one response; returns status and body.
    pub fn response(&mut self) -> (u16, String) {
        let head = loop {
            let end = self.received.windows(4).position(|w| w == b"\r\n\r\n");
            if let Some(end) = end {
                let head: Vec<u8> = self.received.drain(..end + 4).collect();
                break String::from_utf8(head).unwrap();
            }
            assert!(self.read_more(), "closed before a response: {self:?}");
        };
        let status = head[9..12].parse().unwrap();
        let length = head
            .lines()
            .find_map(|line| line.strip_prefix("Content-Length: "))
            .map_or(0, |length| length.parse().unwrap());
        while self.received.len() < length {
            assert!(self.read_more(), "closed within a response: {self:?}");
        }
        let body = self.received.drain(..length).collect();
        (status, String::from_utf8(body).unwrap())
    }

    /// Reads to the end of the connection, which the server must close.
    pub fn rest(&mut self) -> Vec<u8> {
        while self.read_more() {}
        std::mem::take(&mut self.received)
    }

    fn read_more(&mut self) -> bool {
        let mut chunk = [0; 4096];
        let count = match self.stream.read(&mut chunk) {
            Ok(count) => count,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => 0,
            Err(error) => panic!("no bytes came: {error}"),
        };
        self.received.extend_from_slice(&chunk[..count]);
        count > 0
    }
}

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&String::from_utf8_lossy(&self.received))
    }
}

/// The states and the configuration of a machine, without the machine.
#[derive(Default)]
pub struct Model {
    config: VmConfig,
    state: MachineState,
}

impl Model {
    /// Performs an action as a controller does, without KVM.
    pub fn handle(&mut self, action: Action) -> Outcome {
        action.check_state(self.state)?;
        match action {
            Action::Configure(change) => {
                change.apply_to(&mut self.config)?;
                Ok(Reply::Done)
            }
            Action::Lifecycle(step) => {
                match step {
                    Lifecycle::Start => {
                        self.config.validate_for_start()?;
                        self.state = MachineState::Running;
                    }
                    Lifecycle::Pause => self.state = MachineState::Paused,
                    Lifecycle::Resume => self.state = MachineState::Running,
                    _ => {}
                }
                Ok(Reply::Done)
            }
            Action::Query(query) => self.answer(query),
        }
    }

    fn answer(&self, query: Query) -> Outcome {
        let iommu = self.iommu();
        Ok(match query {
            Query::InstanceInfo => Reply::InstanceInfo(InstanceInfo {
                app_name: "portcullis".to_owned(),
                id: "portcullis".to_owned(),
                state: self.state,
                vmm_version: "0.1.0".to_owned(),
                sandbox: self.config.sandbox,
            }),
            Query::Version => Reply::Version("0.1.0".to_owned()),
            Query::VmConfig => Reply::VmConfig(Box::new(self.config.clone())),
            Query::Metrics => Reply::Metrics(vec![MetricFamily::single(
                "portcullis_up",
                "The machine exists.",
                1,
            )]),
            Query::Iommu => Reply::Iommu(iommu),
            Query::Endpoint(name) => Reply::Endpoint(Box::new(iommu.find(&name)?.clone())),
            Query::Mappings {
                endpoint,
                after,
                limit,
            } => {
                iommu.find(&endpoint)?;
                Reply::Mappings(mappings(after, limit))
            }
        })
    }

    /// The IOMMU of a started machine whose guest has booted and used its interfaces.
    fn iommu(&self) -> IommuInfo {
        let started = self.state != MachineState::NotStarted;
        let names = self.config.network_interfaces.iter();
        let endpoint = |(slot, id): (u32, &String)| EndpointInfo {
            id: id.clone(),
            device: DeviceKind::Net,
            pci_address: format!("00:{slot:02x}.0"),
            stream_id: slot << 3,
            state: EndpointState::Translated,
            domain: Some(slot),
            asid: None,
            vmid: None,
            ats: None,
            registration: Some(Registration {
                kind: RegistrationKind::MapUnmap,
                reason: "dev-iotlb refused: a virtio-iommu has no device IOTLB".to_owned(),
            }),
            counters: EndpointCounters {
                translations: 81_230,
                hits: 80_914,
                misses: 12,
                updates: 316,
                prefills: 304,
                invalidations_sent: 301,
                invalidations_saved: 77,
                faults: [("VIRTIO_IOMMU_FAULT_R_MAPPING".to_owned(), 2)].into(),
                stalled_queues: 0,
            },
        };
        let endpoints = (2..).zip(names.map(|interface| &interface.iface_id));
        let feature = |name: &str, negotiated| Feature {
            name: name.to_owned(),
            negotiated: Some(negotiated),
        };
        IommuInfo {
            model: self.config.iommu.model,
            enabled: started,
            features: vec![
                feature("VIRTIO_IOMMU_F_MAP_UNMAP", true),
                feature("VIRTIO_IOMMU_F_BYPASS_CONFIG", true),
                feature("VIRTIO_IOMMU_F_MMIO", false),
            ],
            endpoints: if started {
                endpoints.map(endpoint).collect()
            } else {
                Vec::new()
            },
        }
    }
}

/// An IOVA space as Linux lays it out: rings and buffers from the top of 32 bits down, and the MSI
/// window.
fn mappings(after: Option<u64>, limit: u32) -> MappingsPage {
    let mapping = |start: u64, bytes: u64, target: u64, write, mmio| Mapping {
        start: Hex(start),
        end: Hex(start + bytes - 1),
        target: Hex(target),
        permissions: Permissions { read: true, write },
        mmio,
    };
    let all = [
        mapping(0x0800_0000, 0x1000, 0xfee0_0000, true, true),
        mapping(0xfde0_0000, 0x10_0000, 0x0420_0000, true, false),
        mapping(0xfdf0_0000, 0x4000, 0x0231_0000, false, false),
        mapping(0xffff_8000, 0x2000, 0x0104_a000, true, false),
        mapping(0xffff_a000, 0x2000, 0x0107_0000, true, false),
        mapping(0xffff_e000, 0x2000, 0x0104_c000, true, false),
    ];
    let mut rest = all
        .into_iter()
        .filter(|mapping| after.is_none_or(|after| mapping.start.0 > after));
    let mappings: Vec<_> = rest.by_ref().take(limit as usize).collect();
    let next = rest
        .next()
        .and_then(|_| mappings.last().map(|last| last.start));
    MappingsPage { mappings, next }
}
