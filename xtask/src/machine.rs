//! Capabilities of this machine, and the place where its guests run.

use std::fs::{self, File};

use anyhow::{Result, ensure};

use crate::arch::Arch;

/// Place where guests run.
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
    /// Selects the place of `arch`'s guests, and prints the reason if it is not this machine.
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

/// The reason why guests of `arch` cannot run on this machine, if there is one.
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
    // Some KVMs are software that runs only kernels made for them.
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let capable = cpuinfo
        .split_whitespace()
        .any(|flag| flag == "vmx" || flag == "svm");
    (arch == Arch::X86_64 && !capable)
        .then(|| "the processor has no virtualization extension (vmx, svm)".to_owned())
}
