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

/// Boots a guest of `arch` before the user's eyes.
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
    let run = if interactive {
        "/etc/guest/introduce; echo 'Type poweroff -f to end.'"
    } else {
        "/etc/guest/introduce; poweroff -f"
    };
    let arguments = |program: &str, directory: &str| -> Vec<String> {
        let cmdline = format!("console=ttyS0 quiet guest.run=\"{run}\"");
        let kernel = format!("{directory}/vmlinuz-6.12");
        let initrd = format!("{directory}/initramfs.cpio");
        let words = [
            program,
            "run",
            "--cpus",
            "2",
            "--memory",
            "512M",
            "--kernel",
            &kernel,
            "--initrd",
            &initrd,
            "--cmdline",
            &cmdline,
        ];
        words.map(str::to_owned).to_vec()
    };
    let status = step("3/3: boot it", || match place {
        Place::Native => {
            let program = binary.display().to_string();
            let words = arguments(&program, &images.dir.display().to_string());
            eprintln!("{}", words.join(" "));
            let status = Command::new(&binary).args(&words[1..]).status();
            let status = status.context("cannot start portcullis")?;
            Ok(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1))
        }
        Place::Lab => {
            let mut job = lab::Job::new(arch);
            job.programs.push(("portcullis".to_owned(), binary.clone()));
            job.command = arguments("portcullis", "/guest");
            job.interactive = interactive;
            job.timeout = Duration::from_secs(if interactive { 24 * 3600 } else { 300 });
            eprintln!("{}", job.command.join(" "));
            lab::run(&job, &mut |_| {})
        }
    })?;
    eprintln!("The guest has ended; portcullis' exit status: {status}");
    Ok(ExitCode::from(status))
}

fn step<T>(title: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
    eprintln!("== Step {title}");
    let started = Instant::now();
    let result = work().with_context(|| format!("step {title}"))?;
    eprintln!("== took {:.1} s", started.elapsed().as_secs_f32());
    Ok(result)
}
