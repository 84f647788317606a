//! KVM: VM, vCPUs, guest RAM, interrupt routes.
//!
//! The only module that opens `/dev/kvm`. [`Vm::new`] creates the VM with its
//! interrupt controller and all vCPUs; [`Vcpus`] runs them. Lock order: the
//! interrupt routes' lock is a leaf, no other lock is taken under it.

mod config_pages;
mod error;
#[cfg(test)]
pub(crate) mod fake;
mod interrupts;
mod memory;
mod open;
mod routes;
mod vcpu;
mod vcpus;
mod vm;

#[cfg(target_arch = "aarch64")]
#[path = "aarch64.rs"]
mod native;
#[cfg(target_arch = "x86_64")]
#[path = "x86_64.rs"]
mod native;

pub(crate) use config_pages::ConfigPages;
pub(crate) use error::Error;
pub(crate) use memory::allocate;
pub(crate) use vcpu::{Exit, Vcpu};
pub(crate) use vcpus::{Buses, Vcpus};
pub(crate) use vm::Vm;
