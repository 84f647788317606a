//! The thread `queries`, which may block on devices.
//!
//! A vCPU inside a device holds locks of that device and of its IOMMU for as
//! long as the host's kernel takes. The event loop takes none of them. This
//! thread performs the queries that read the devices' state, and drops the
//! machine at its end.

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Weak};
use std::time::Instant;

use devices::thread::{ThreadKind, spawn};

use crate::action::{IommuInfo, Outcome, Query, Reply};
use crate::assemble::Machine;
use crate::config::IommuModel;
use crate::pci::PciBus;
use crate::reports::Reporter;

/// Handle of the thread. It is never joined: the thread ends after its last
/// job, once this is dropped.
pub(crate) struct QueryThread {
    jobs: Sender<Job>,
    results: Receiver<Answered>,
    /// Queries so far.
    asked: u64,
}

enum Job {
    Query {
        number: u64,
        query: Query,
    },
    TearDown {
        machine: Box<Machine>,
        done: Sender<()>,
    },
}

/// Answer to a query.
pub(crate) struct Answered {
    /// Number of the query.
    pub number: u64,
    /// Result. [`Reply::Metrics`] has the devices' metrics only.
    pub outcome: Outcome,
}

impl QueryThread {
    /// Starts the thread for a machine with this bus and IOMMU. `reporter` wakes
    /// the event loop for each answer.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub(crate) fn start(
        pci: Option<&Arc<PciBus>>,
        model: IommuModel,
        reporter: Reporter,
    ) -> io::Result<Self> {
        let (jobs, received) = mpsc::channel();
        let (sender, results) = mpsc::channel();
        // Weak: the machine decides when its devices end.
        let pci = pci.map(Arc::downgrade);
        spawn(ThreadKind::Queries, "queries", move || {
            for job in received {
                match job {
                    Job::Query { number, query } => {
                        let pci = pci.as_ref().and_then(Weak::upgrade);
                        let outcome = answer(pci.as_deref(), model, &query);
                        // An event loop that has ended waits for no answer.
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
        Ok(Self {
            jobs,
            results,
            asked: 0,
        })
    }

    /// Queues `query`, which reads the devices' state, and returns its number.
    /// The caller bounds the number of queued queries.
    pub(crate) fn ask(&mut self, query: Query) -> u64 {
        self.asked += 1;
        let number = self.asked;
        // The thread ends only after this object.
        let _ = self.jobs.send(Job::Query { number, query });
        number
    }

    /// Returns the next answer, or `None`. Never blocks.
    pub(crate) fn next_answer(&self) -> Option<Answered> {
        self.results.try_recv().ok()
    }

    /// Returns the next answer that comes before `deadline`.
    pub(crate) fn answer_until(&self, deadline: Instant) -> Option<Answered> {
        let left = deadline.saturating_duration_since(Instant::now());
        self.results.recv_timeout(left).ok()
    }

    /// Drops the machine. The receiver gets a message when it is dropped, which
    /// may be never: a vCPU or a device's thread may be inside the host's
    /// kernel.
    pub(crate) fn tear_down(self, machine: Machine) -> Receiver<()> {
        let (done, is_done) = mpsc::channel();
        let machine = Box::new(machine);
        let _ = self.jobs.send(Job::TearDown { machine, done });
        is_done
    }
}

/// Whether the answer to `query` depends on the devices' state.
#[must_use]
pub(crate) fn concerns_devices(query: &Query) -> bool {
    match query {
        Query::Metrics | Query::Iommu | Query::Endpoint(_) | Query::Mappings { .. } => true,
        Query::InstanceInfo | Query::Version | Query::VmConfig => false,
    }
}

/// Answers a query about devices; without a bus there are none. Takes the
/// devices' locks.
pub(crate) fn answer(pci: Option<&PciBus>, model: IommuModel, query: &Query) -> Outcome {
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
