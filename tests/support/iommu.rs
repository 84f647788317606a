//! What portcullis itself says of its IOMMU and the devices behind it.

use std::process::Command;

use vmm::action::{EndpointInfo, IommuInfo};

use super::{Machine, TempDir, portcullis, run_to_end};

/// The API socket of a machine under test.
pub struct Api {
    dir: TempDir,
}

impl Api {
    /// A place for the socket of one machine at a time.
    pub fn new(name: &str) -> Self {
        Self {
            dir: TempDir::new(&format!("api-{name}")),
        }
    }

    /// Gives `machine` this socket.
    pub fn serve(&self, machine: Machine) -> Machine {
        machine.with("--api-socket", self.socket())
    }

    fn socket(&self) -> String {
        self.dir.path("socket")
    }

    /// What `GET` of a resource answers now.
    pub fn get(&self, resource: &str) -> String {
        let mut ctl = Command::new(portcullis());
        ctl.args(["ctl", "--api-socket", &self.socket(), "GET", resource]);
        let said = run_to_end(&mut ctl);
        assert_eq!(said.status, Some(0), "GET {resource}: {}", said.stderr);
        said.stdout
    }

    /// `GET /iommu`.
    pub fn iommu(&self) -> IommuInfo {
        let text = self.get("/iommu");
        serde_json::from_str(&text).unwrap_or_else(|error| {
            panic!("GET /iommu is not what its type says: {error}:\n{text}")
        })
    }

    /// What `GET /iommu` says of one device.
    pub fn endpoint(&self, id: &str) -> EndpointInfo {
        match self.iommu().find(id) {
            Ok(endpoint) => endpoint.clone(),
            Err(error) => panic!("{error}"),
        }
    }
}
