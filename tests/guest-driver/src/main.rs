//! Checks, from inside a guest, that the IOMMU isolates a network device.
//!
//! `isolation ADDRESS OWN PEER [STEP]…` takes the virtio-net function at PCI address ADDRESS from
//! the kernel's driver by VFIO and drives its rings. PEER is an IPv4 address for which the host
//! answers ARP; OWN and the addresses after it, in the same /24, are the senders. Each step prints
//! one line, and the exit status is 0 if all are `ok`. Linux only, as root, with the modules
//! `vfio-pci` and `vfio_iommu_type1` loaded.

mod conversation;
mod frame;
mod memory;
mod ring;
mod steps;
mod vfio;
mod virtio_net;

use std::net::Ipv4Addr;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::steps::{STEPS, Stage, Step};

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match run(&arguments) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            println!("isolation: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the steps; true if all succeeded.
fn run(arguments: &[String]) -> Result<bool> {
    let [address, own, peer, names @ ..] = arguments else {
        let names: Vec<_> = STEPS.iter().map(|step| step.name).collect();
        bail!(
            "usage: isolation ADDRESS OWN PEER [STEP]…, steps: {}",
            names.join(" ")
        );
    };
    let ipv4 = |text: &String| -> Result<Ipv4Addr> {
        text.parse()
            .with_context(|| format!("{text} is no IPv4 address"))
    };
    let (own, peer, chosen) = (ipv4(own)?, ipv4(peer)?, choose(names)?);
    let binding = vfio::Binding::to_vfio(address)?;
    let function = virtio_net::Function::new(vfio::Device::open(&binding)?)?;
    let stage = Stage::new(&function, own, peer);
    let mut all_succeeded = true;
    for step in chosen {
        match (step.run)(&stage) {
            Ok(detail) => println!("isolation: {}: ok ({detail})", step.name),
            Err(error) => {
                all_succeeded = false;
                println!("isolation: {}: FAILED: {error:#}", step.name);
            }
        }
    }
    Ok(all_succeeded)
}

/// The steps of these names, or all of them.
fn choose(names: &[String]) -> Result<Vec<&'static Step>> {
    if names.is_empty() {
        return Ok(STEPS.iter().collect());
    }
    let find = |name: &String| {
        STEPS
            .iter()
            .find(|step| step.name == name)
            .with_context(|| format!("there is no step {name}"))
    };
    names.iter().map(find).collect()
}
