//! The machine: configuration, actions, controller, KVM. Knows no HTTP.
//!
//! A [`config::VmConfig`] says what the user wants, [`plan::MachinePlan`] what
//! will be built, [`builder`] builds it, and a [`controller::Controller`] owns
//! it and answers every [`action::Action`].
#![cfg_attr(not(test), deny(clippy::print_stdout, clippy::print_stderr))] // They panic.

pub mod action;
pub mod builder;
pub mod config;
pub mod console;
pub mod controller;
pub mod ending;
#[cfg(any(test, target_arch = "aarch64"))]
mod host_caches;
pub mod inspect;
pub mod kvm;
pub mod logger;
pub mod metrics;
pub mod pci;
pub mod plan;
mod queries;
pub mod reports;
pub mod signals;

pub use devices::{error, host_file};
