//! The API's reports of the IOMMU and the devices behind it.

use std::process::Command;

use vmm::action::{EndpointInfo, IommuInfo};

use super::{Machine, TempDir, portcullis, run_to_end};

/// The API socket of a machine under test.
pub struct Api {
    dir: TempDir,
}

impl Api {
    /// Chooses a path for the socket of one machine at a time.
    pub fn new(name: &str) -> Self {
        Self {
            dir: TempDir::new(&format!("api-{name}")),
        }
    }

    /// Adds the socket to the options of `machine`.
    pub fn serve(&self, machine: Machine) -> Machine {
        machine.with("--api-socket", self.socket())
    }

    fn socket(&self) -> String {
        self.dir.path("socket")
    }

    /// Body of `GET` for a resource.
    pub fn get(&self, resource: &str) -> String {
        let mut ctl = Command::new(portcullis());
        ctl.args(["ctl", "--api-socket", &self.socket(), "GET", resource]);
        let output = run_to_end(&mut ctl);
        assert_eq!(output.status, Some(0), "GET {resource}: {}", output.stderr);
        output.stdout
    }

    /// `GET /iommu`.
    pub fn iommu(&self) -> IommuInfo {
        let text = self.get("/iommu");
        serde_json::from_str(&text).unwrap_or_else(|error| {
            panic!("GET /iommu is not what its type says: {error}:\n{text}")
        })
    }

    /// Report of one device in `GET /iommu`.
    pub fn endpoint(&self, id: &str) -> EndpointInfo {
        match self.iommu().find(id) {
            Ok(endpoint) => endpoint.clone(),
            Err(error) => panic!("{error}"),
        }
    }
}
