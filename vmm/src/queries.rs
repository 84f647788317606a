//! The thread `queries`, which may wait for devices.
//!
//! A vCPU inside a device holds locks of that device and of its IOMMU for as
//! long as the host's kernel takes. The event loop takes none of them: queries
//! that read the devices' state, and dropping the machine at its end, are jobs
//! of this thread.

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Weak};
use std::thread;
use std::time::Instant;

use crate::action::{IommuInfo, Outcome, Query, Reply};
use crate::assemble::Machine;
use crate::config::IommuModel;
use crate::pci::PciBus;
use crate::reports::Reporter;

/// The thread. It is never joined: it ends after its last job, when this is
/// dropped.
pub struct QueryThread {
    jobs: Sender<Job>,
    results: Receiver<Answered>,
}

enum Job {
    Query {
        number: u64,
        query: Query,
        model: IommuModel,
    },
    TearDown {
        machine: Box<Machine>,
        done: Sender<()>,
    },
}

/// The answer to a query.
pub struct Answered {
    /// The number it was asked with.
    pub number: u64,
    /// The answer. [`Reply::Metrics`] has the devices' metrics only.
    pub outcome: Outcome,
}

impl QueryThread {
    /// Starts the thread for a machine with this bus. `reporter` wakes the
    /// event loop for each answer.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(pci: Option<&Arc<PciBus>>, reporter: Reporter) -> io::Result<Self> {
        let (jobs, received) = mpsc::channel();
        let (sender, results) = mpsc::channel();
        // Weak: the machine decides when its devices end.
        let pci = pci.map(Arc::downgrade);
        let thread = thread::Builder::new().name("queries".into());
        thread.spawn(move || {
            for job in received {
                match job {
                    Job::Query {
                        number,
                        query,
                        model,
                    } => {
                        let pci = pci.as_ref().and_then(Weak::upgrade);
                        let outcome = answer(pci.as_deref(), model, &query);
                        // A loop that has left waits for no answer.
                        let _ = sender.send(Answered { number, outcome });
                        reporter.wake();
                    }
                    Job::TearDown { machine, done } => {
                        drop(machine);
                        let _ = done.send(());
                    }
                }
            }
        })?;
        Ok(Self { jobs, results })
    }

    /// Asks for the answer to `query`, which reads the devices' state. The
    /// caller bounds how many are asked at a time.
    pub fn ask(&self, number: u64, query: Query, model: IommuModel) {
        // The thread ends only after this object.
        let _ = self.jobs.send(Job::Query {
            number,
            query,
            model,
        });
    }

    /// The next answer; never waits.
    pub fn next_answer(&self) -> Option<Answered> {
        self.results.try_recv().ok()
    }

    /// The next answer that comes until `deadline`.
    pub fn answer_until(&self, deadline: Instant) -> Option<Answered> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.results.recv_timeout(left).ok()
    }

    /// Drops the machine. A message comes when it is dropped, which may be
    /// never: a vCPU or a device's thread may be inside the host's kernel.
    pub fn tear_down(self, machine: Machine) -> Receiver<()> {
        let (done, is_done) = mpsc::channel();
        let machine = Box::new(machine);
        let _ = self.jobs.send(Job::TearDown { machine, done });
        is_done
    }
}

/// Whether only devices know the answer to `query`.
#[must_use]
pub fn concerns_devices(query: &Query) -> bool {
    match query {
        Query::Metrics | Query::Iommu | Query::Endpoint(_) | Query::Mappings { .. } => true,
        Query::InstanceInfo | Query::Version | Query::VmConfig => false,
    }
}

/// Answers a query that concerns devices; without a bus there are none. Takes
/// the devices' locks.
pub fn answer(pci: Option<&PciBus>, model: IommuModel, query: &Query) -> Outcome {
    let info = || match pci {
        Some(pci) => pci.iommu_info(model),
        None => IommuInfo {
            model,
            ..IommuInfo::default()
        },
    };
    Ok(match query {
        Query::Metrics => Reply::Metrics(pci.map(PciBus::families).unwrap_or_default()),
        Query::Endpoint(name) => Reply::Endpoint(Box::new(info().find(name)?.clone())),
        Query::Mappings {
            endpoint,
            after,
            limit,
        } => {
            let stream = info().find(endpoint)?.stream_id;
            let page = pci.map(|pci| pci.mappings(stream, *after, *limit));
            Reply::Mappings(page.unwrap_or_default())
        }
        _ => Reply::Iommu(info()),
    })
}
