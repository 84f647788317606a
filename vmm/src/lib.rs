//! The machine: configuration, actions, controller, KVM.

pub mod config;
