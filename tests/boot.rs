//! Distribution kernels boot, detect the devices of the machine, and end with the documented exit
//! status.

mod support;

use support::{Guest, Machine, READY, TempDir};

/// Boots a kernel to its shell, checks its release, and powers off.
#[track_caller]
fn boots(image: &str, release: &str) {
    let mut guest = Machine::new().kernel(image).boot();
    let running = guest.run("uname -r");
    assert!(running.starts_with(release), "{image} is {running}");
    guest.type_line("poweroff -f").expect_exit(0);
}

#[test]
fn the_distributions_6_12_kernel_boots_as_it_ships() {
    boots("vmlinuz-6.12", "6.12.");
}

#[test]
fn the_distributions_6_1_kernel_boots_as_it_ships() {
    boots("vmlinuz-6.1", "6.1.");
}

#[cfg(target_arch = "x86_64")]
mod formats {
    use super::boots;

    #[test]
    fn an_uncompressed_6_12_vmlinux_boots_by_pvh() {
        boots("vmlinux-6.12", "6.12.");
    }

    #[test]
    fn an_uncompressed_6_1_vmlinux_boots_by_pvh() {
        boots("vmlinux-6.1", "6.1.");
    }
}

#[cfg(target_arch = "aarch64")]
mod formats {
    use super::boots;
    use super::support::{TempDir, image};

    /// `bytes` as a zstd frame (RFC 8878 §3.1.1) of uncompressed blocks, with a window
    /// as large as the highest compression level's.
    fn zstd(bytes: &[u8]) -> Vec<u8> {
        const WINDOW_2_TO_27: u8 = (27 - 10) << 3;
        let mut frame = vec![0x28, 0xB5, 0x2F, 0xFD, 0, WINDOW_2_TO_27];
        let header = |last: u32, len: usize| last | u32::try_from(len << 3).unwrap();
        for block in bytes.chunks(128 << 10) {
            frame.extend(&header(0, block.len()).to_le_bytes()[..3]);
            frame.extend(block);
        }
        frame.extend(&header(1, 0).to_le_bytes()[..3]);
        frame
    }

    #[test]
    fn an_efi_zboot_image_with_a_zstd_payload_boots() {
        let payload = zstd(&std::fs::read(image("Image-6.12")).unwrap());
        let mut file = vec![0; 64];
        file[..8].copy_from_slice(b"MZ\0\0zimg");
        file[8..12].copy_from_slice(&64u32.to_le_bytes());
        file[12..16].copy_from_slice(&u32::try_from(payload.len()).unwrap().to_le_bytes());
        file[24..30].copy_from_slice(b"zstd22");
        file.extend(payload);
        let files = TempDir::new("zboot");
        let kernel = files.file("vmlinuz", &file);
        // An absolute path, which is not looked up among the images.
        boots(&kernel, "6.12.");
    }

    #[test]
    #[ignore = "long: cargo xtask test --long"]
    fn a_bare_image_boots() {
        boots("Image-6.12", "6.12.");
    }

    #[test]
    fn a_gzipped_image_boots() {
        boots("Image-6.12.gz", "6.12.");
    }

    #[test]
    fn an_efi_zboot_image_boots() {
        boots("Image-6.12.zboot", "6.12.");
    }

    #[test]
    #[ignore = "long: cargo xtask test --long"]
    fn a_gzipped_6_1_image_boots() {
        boots("Image-6.1.gz", "6.1.");
    }
}

#[track_caller]
fn has_all_processors(count: u32) {
    let mut guest = Machine::new().with("--cpus", count).boot();
    assert_eq!(guest.run("nproc"), count.to_string());
    let online = guest.run("cat /sys/devices/system/cpu/online");
    assert_eq!(online, format!("0-{}", count - 1));
    // Each processor runs a command.
    for cpu in 0..count {
        guest.run(&format!("taskset -c {cpu} true"));
    }
    guest.type_line("poweroff -f").expect_exit(0);
}

#[test]
fn two_processors_are_online() {
    has_all_processors(2);
}

#[test]
fn four_processors_are_online() {
    has_all_processors(4);
}

/// The device tree describes a cache for each level of CLIDR_EL1.
#[cfg(target_arch = "aarch64")]
#[track_caller]
fn finds_its_caches(image: &str) {
    let mut guest = Machine::new().kernel(image).with("--cpus", 2).boot();
    let log = guest.run("dmesg -r");
    assert!(!log.contains("Unable to detect cache hierarchy"), "{log}");
    for cpu in 0..2 {
        let caches = format!("/sys/devices/system/cpu/cpu{cpu}/cache");
        guest.run(&format!("grep . {caches}/index0/*"));
    }
    guest.type_line("poweroff -f").expect_exit(0);
}

#[cfg(target_arch = "aarch64")]
#[test]
fn the_6_12_kernel_finds_its_caches_in_the_device_tree() {
    finds_its_caches("vmlinuz-6.12");
}

#[cfg(target_arch = "aarch64")]
#[test]
fn the_6_1_kernel_finds_its_caches_in_the_device_tree() {
    finds_its_caches("vmlinuz-6.1");
}

/// Parses the number in a line such as `MemTotal:  123 kB`.
fn number(line: &str) -> u64 {
    let mut words = line.split_whitespace();
    let number = words.find_map(|word| word.parse().ok());
    number.unwrap_or_else(|| panic!("no number in {line:?}"))
}

#[test]
fn a_guest_of_128_mib_has_it() {
    let mut guest = Machine::new().with("--memory", "128M").boot();
    let kib = number(&guest.run("grep MemTotal /proc/meminfo"));
    assert!((64 << 10..=128 << 10).contains(&kib), "{kib} KiB");
    guest.type_line("poweroff -f").expect_exit(0);
}

#[test]
fn memory_beyond_4_gib_exists_and_holds_written_data() {
    let mut guest = Machine::new().with("--memory", "5G").boot();
    let kib = number(&guest.run("grep MemTotal /proc/meminfo"));
    assert!(kib > 4_700 << 10, "{kib} KiB");
    // The zone above 4 GiB, in pages of 4 KiB.
    let free = "awk '/zone +Normal/ { in_zone = 1 } in_zone && /nr_free_pages/ \
                { print $2; exit }' /proc/zoneinfo";
    let before = number(&guest.run(free));
    guest.run("mount -t tmpfs -o size=90% none /mnt");
    guest.run("dd if=/dev/urandom of=/mnt/seed bs=1M count=8 2>/dev/null");
    guest.run("for i in $(seq 8); do cat /mnt/seed; done > /mnt/data");
    let after = number(&guest.run(free));
    assert!(before - after > (50 << 20) / 4096, "{before}, then {after}");
    let expected = guest.run("for i in $(seq 8); do cat /mnt/seed; done | md5sum");
    assert_eq!(guest.run("md5sum < /mnt/data"), expected);
    guest.type_line("poweroff -f").expect_exit(0);
}

#[test]
fn the_default_command_line_gives_a_console_and_the_kernels_messages() {
    let mut guest = Machine::new().default_cmdline().boot();
    assert!(
        guest.console_output().contains("Linux version"),
        "{}",
        guest.console_output()
    );
    guest.type_line("poweroff -f").expect_exit(0);
}

#[test]
fn the_guests_clock_is_the_hosts_without_being_set() {
    let mut guest = Machine::new().boot();
    let before = now();
    let guests = number(&guest.run("hwclock -u -r > /dev/null && date +%s"));
    let after = now();
    assert!(
        (before - 5..=after + 5).contains(&guests),
        "{guests}, not {before}"
    );
    guest.type_line("poweroff -f").expect_exit(0);
}

fn now() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.expect("it is after 1970").as_secs()
}

#[test]
fn a_reset_is_status_3() {
    let mut guest = Machine::new().boot();
    guest.type_line("reboot -f").expect_exit(3);
}

#[test]
fn a_panic_resets_by_default() {
    let mut guest = Machine::new().default_cmdline().boot();
    guest
        .type_line("echo c > /proc/sysrq-trigger")
        .expect_exit(3);
    assert!(
        guest.console_output().contains("Kernel panic"),
        "{}",
        guest.console_output()
    );
}

#[test]
fn a_reset_on_another_processor_than_the_first_is_a_reset_too() {
    let mut guest = Machine::new().with("--cpus", 2).boot();
    guest.type_line("taskset -c 1 reboot -f").expect_exit(3);
}

/// A crash is status 4, with the registers in the log.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_triple_fault_is_status_4_and_its_registers_are_logged() {
    let mut guest = Machine::new().cmdline("reboot=t").boot();
    guest.type_line("reboot -f").expect_exit(4);
    assert!(guest.log().contains("triple fault"), "{}", guest.log());
    assert!(guest.log().contains("rip "), "{}", guest.log());
}

/// A crash is status 4, with the registers in the log.
#[cfg(target_arch = "aarch64")]
#[test]
fn an_access_kvm_cannot_emulate_is_status_4_and_its_registers_are_logged() {
    // An Image that loads a pair of registers from an address without memory. The processor does
    // not describe that access well enough to emulate it.
    let instructions: [u32; 3] = [
        0x1400_0010, // b 64, over the header
        0,
        0,
    ];
    let mut kernel: Vec<u8> = instructions.iter().flat_map(|i| i.to_le_bytes()).collect();
    kernel.resize(56, 0);
    kernel[16..24].copy_from_slice(&4096_u64.to_le_bytes());
    kernel.extend(b"ARM\x64\0\0\0\0");
    for instruction in [
        0xd2a1_2002_u32, // mov x2, #0x09000000
        0xa940_0440,     // ldp x0, x1, [x2]
        0x1400_0000,     // b .
    ] {
        kernel.extend(instruction.to_le_bytes());
    }
    kernel.resize(4096, 0);
    let files = TempDir::new("crash");
    let kernel = files.file("Image", &kernel);
    let mut guest = Guest::launch(&["run", "--kernel", &kernel]);
    guest.expect_exit(4);
    assert!(
        guest.log().to_lowercase().contains("pc "),
        "{}",
        guest.log()
    );
}

#[test]
fn a_machine_comes_from_a_file_and_check_prints_its_plan() {
    let files = TempDir::new("config");
    let config = format!(
        r#"{{"boot-source": {{"kernel_image_path": "{}", "initrd_path": "{}",
             "boot_args": "console=ttyS0 quiet panic=-1"}},
             "machine-config": {{"vcpu_count": 2, "mem_size_mib": 256}}}}"#,
        support::kernel(),
        support::image("initramfs.cpio")
    );
    let config = files.file("machine.json", config.as_bytes());
    let mut check = std::process::Command::new(support::portcullis());
    let output = support::run_to_end(check.args(["check", "--config", &config]));
    assert_eq!(output.status, Some(0), "{output:?}");
    assert!(output.stdout.contains(r#""vcpus": 2"#), "{output:?}");

    // Options replace the values of the file.
    let mut guest = Guest::launch(&["run", "--config", &config, "--cpus", "1"]);
    guest.wait_for(READY).wait_for(support::PROMPT);
    assert_eq!(guest.run("nproc"), "1");
    guest.type_line("poweroff -f").expect_exit(0);
}

#[test]
fn a_jailed_and_confined_guest_boots_and_leaves_nothing() {
    const OWNER: &str = "64321";
    let files = TempDir::new("jailed");
    let root = files.path("root");
    std::fs::create_dir(&root).unwrap();
    let disk = files.file("disk", &[0; 4096]);
    for file in [&disk, &files.path("")] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(file, mode).unwrap();
    }
    let machine = Machine::new()
        .with("--sandbox", "on")
        .with("--iommu", "virtio-iommu")
        .with("--disk", format!("path={disk},readonly=on"))
        .flag("--rng");
    let jail = [
        "jail", "--root", &root, "--uid", OWNER, "--gid", OWNER, "--",
    ];
    let mut arguments: Vec<_> = jail.map(str::to_owned).into();
    arguments.extend(machine.arguments());
    let mut guest = machine.boot_by(|| Guest::launch(&arguments));
    guest.quieten();
    assert_eq!(guest.run("cat /sys/block/vda/size"), "8");
    guest.type_line("poweroff -f").expect_exit(0);
    assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
}
