//! The machine: configuration, actions, controller, KVM.

pub mod action;
pub mod config;
pub mod kvm;
