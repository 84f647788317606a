//! Boots a whole distribution from a disk: `cargo xtask test` runs it.

mod support;

use std::time::Duration;

use support::checks::{self, part};
use support::{Machine, PROMPT, READY, TempDir, host, image};

/// Time from the kernel's start to the end of systemd's, in an emulated host on a quiet machine.
const BOOT_LIMIT: Duration = Duration::from_secs(150);

#[test]
fn a_debian_root_file_system_boots_with_systemd_to_a_login_prompt() {
    let scratch = TempDir::new("debian");
    let disk = scratch.path("root");
    let machine = Machine::new()
        .with("--memory", "512M")
        .with("--disk", format!("path={disk},id=root"))
        .flag("--rng")
        .cmdline("guest.root=/dev/vda");
    // Each attempt to boot starts with the original disk.
    let mut guest = machine.boot_until(&[READY, "debian login: "], BOOT_LIMIT, || {
        host::sparse_copy(&image("debian.ext4"), &disk);
        machine.launch()
    });

    part("login");
    guest.type_line("root").wait_for("root@debian:~# ");
    // A shell without line editing, with the prompt that ends each command's output; the echo of
    // this line has the prompt in two parts.
    guest.type_line("PS1='guest''# ' exec sh").wait_for(PROMPT);
    guest.quieten();

    part("systemd");
    assert_eq!(guest.run("cat /proc/1/comm"), "systemd");
    let state = guest.run_within(BOOT_LIMIT, "systemctl is-system-running --wait");
    assert_eq!(state, "running");
    assert_eq!(guest.run("systemctl --failed --no-legend --plain"), "");
    assert_eq!(
        guest.run("systemctl is-active serial-getty@ttyS0"),
        "active"
    );
    assert_eq!(guest.run("findmnt -no SOURCE,FSTYPE /"), "/dev/vda ext4");

    part("power off");
    guest.type_line("poweroff").expect_exit(0);
    checks::check_image(&disk);
}
