//! What this machine can do itself, and where a guest therefore runs.

use std::fs::{self, File};

use anyhow::{Result, ensure};

use crate::arch::Arch;

/// Where guests run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Place {
    /// On this machine, with its own KVM.
    Native,
    /// On an emulated host.
    Lab,
}

/// The user's choice of a place.
#[derive(clap::Args, Clone, Copy)]
pub struct PlaceArgs {
    /// Use the emulated host even if this machine could do it
    #[arg(long, conflicts_with = "native")]
    lab: bool,
    /// Use this machine's own KVM even if it does not look usable
    #[arg(long)]
    native: bool,
}

impl PlaceArgs {
    /// Decides where guests of `arch` run, and says why if it is not on this machine.
    pub fn decide(self, arch: Arch) -> Result<Place> {
        if self.native {
            ensure!(
                arch == Arch::native(),
                "--native: this machine is {}, no {arch} guest can run on it",
                Arch::native()
            );
            return Ok(Place::Native);
        }
        if self.lab {
            return Ok(Place::Lab);
        }
        match obstacle(arch) {
            None => Ok(Place::Native),
            Some(reason) => {
                eprintln!("guests run in the lab: {reason}");
                Ok(Place::Lab)
            }
        }
    }
}

/// What keeps guests of `arch` from running on this machine.
fn obstacle(arch: Arch) -> Option<String> {
    if arch != Arch::native() {
        return Some(format!("this machine is {}", Arch::native()));
    }
    for device in [
        "/dev/kvm",
        "/dev/net/tun",
        "/dev/vhost-net",
        "/dev/vhost-vsock",
    ] {
        if let Err(error) = File::options().read(true).write(true).open(device) {
            return Some(format!("{device}: {error}"));
        }
    }
    // There are KVMs in software that run only kernels made for them.
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let capable = cpuinfo
        .split_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm");
    (arch == Arch::X86_64 && !capable)
        .then(|| "the processor has no virtualization extension (vmx, svm)".to_owned())
}
