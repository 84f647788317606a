//! The demonstration: build, prepare a guest, boot it.

use std::io::IsTerminal;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::arch::Arch;
use crate::guest;
use crate::lab;
use crate::machine::{Place, PlaceArgs};
use crate::product::{self, Profile};

/// Creates a tap device on the emulated host and starts portcullis with the script's arguments.
const WITH_TAP: &str = "ip tuntap add tap0 mode tap vnet_hdr && ip address add 10.9.0.1/24 dev tap0 \
                        && ip link set tap0 up && exec portcullis \"$@\"";

/// Boots a guest of `arch` on the user's terminal.
pub fn run(arch: Arch, place: PlaceArgs) -> Result<ExitCode> {
    let place = place.decide(arch)?;
    let binary = step("1/3: build portcullis", || {
        product::build(arch, Profile::Dev)
    })?;
    let images = step(
        "2/3: prepare a guest from the distribution's packages",
        || guest::prepare(arch),
    )?;
    let interactive = std::io::stdin().is_terminal() && std::io::stdout().is_terminal();
    let end = if interactive {
        "echo 'Type poweroff -f to end.'"
    } else {
        "poweroff -f"
    };
    let iommu = match arch {
        Arch::X86_64 => "virtio-iommu",
        Arch::Aarch64 => "smmuv3,ats=on",
    };
    let arguments = |directory: &str, devices: &[&str], ask: &str| -> Vec<String> {
        let kernel = format!("{directory}/vmlinuz-6.12");
        let initrd = format!("{directory}/initramfs.cpio");
        let cmdline =
            format!("console=ttyS0 quiet guest.run=\"/etc/guest/introduce {ask}; {end}\"");
        let mut words = vec![
            "run", "--cpus", "2", "--memory", "512M", "--kernel", &kernel,
        ];
        words.extend(["--initrd", &initrd, "--cmdline", &cmdline]);
        words.extend(["--iommu", iommu, "--rng"]);
        words.extend(devices);
        words.into_iter().map(str::to_owned).collect()
    };
    let status = step("3/3: boot it", || match place {
        Place::Native => {
            // Without a network: a tap device requires root.
            let words = arguments(&images.dir.display().to_string(), &[], "");
            show(&words);
            let status = Command::new(&binary).args(&words).status();
            let status = status.context("cannot start portcullis")?;
            Ok(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1))
        }
        Place::Lab => {
            let mut job = lab::Job::new(arch);
            job.programs.push(("portcullis".to_owned(), binary.clone()));
            let words = arguments("/guest", &["--net", "tap=tap0"], "10.9.0.2 10.9.0.1");
            show(&words);
            job.command = ["sh", "-c", WITH_TAP, "portcullis"]
                .map(str::to_owned)
                .to_vec();
            job.command.extend(words);
            job.interactive = interactive;
            job.timeout = Duration::from_secs(if interactive { 24 * 3600 } else { 300 });
            lab::run(&job, &mut |_| {})
        }
    })?;
    eprintln!("The guest has ended; portcullis' exit status: {status}");
    Ok(ExitCode::from(status))
}

fn show(words: &[String]) {
    eprintln!("portcullis {}", words.join(" "));
}

fn step<T>(title: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("== Step {title}");
    let started = Instant::now();
    let result = work().with_context(|| format!("step {title}"))?;
    eprintln!("== took {:.1} s", started.elapsed().as_secs_f32());
    Ok(result)
}
