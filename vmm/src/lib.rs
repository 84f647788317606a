//! The machine: configuration, actions, controller, KVM. It contains no HTTP.
//!
//! A [`config::VmConfig`] is the user's configuration, a [`plan::MachinePlan`]
//! the machine that is built from it. `resources` acquires the host's
//! resources, [`sandbox`] confines the process, `assemble` connects the
//! resources, and a [`controller::Controller`] owns the machine and answers
//! every [`action::Action`].
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))] // They panic.
#![cfg_attr(not(test), warn(unreachable_pub, clippy::missing_errors_doc))]

pub mod action;
mod assemble;
mod build_error;
pub mod config;
pub mod console;
pub mod controller;
pub mod ending;
#[cfg(any(test, target_arch = "aarch64"))]
mod host_caches;
pub mod inspect;
mod kvm;
pub mod logger;
mod metrics;
mod pci;
pub mod plan;
mod queries;
mod reports;
mod resources;
pub mod sandbox;
pub mod signals;

pub use devices::{error, host_file, thread};
