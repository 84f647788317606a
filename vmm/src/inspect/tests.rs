use std::fs::{self, File};

use vmm_sys_util::tempfile::TempFile;

use super::*;

fn image(start: &[u8], len: u64) -> TempFile {
    let file = TempFile::new().unwrap();
    std::io::Write::write_all(&mut file.as_file(), start).unwrap();
    file.as_file().set_len(len).unwrap();
    file
}

fn path(file: &TempFile) -> String {
    file.as_path().to_str().unwrap().to_owned()
}

fn machine_of(files: [&TempFile; 2]) -> VmConfig {
    let drive = |id: &str, file| format!("path={},id={id}", path(file)).parse().unwrap();
    let [kernel, disk] = files;
    VmConfig {
        boot_source: Some(BootSource {
            kernel_image_path: path(kernel),
            ..BootSource::default()
        }),
        drives: vec![drive("a", disk)],
        ..VmConfig::default()
    }
}

fn findings(config: &VmConfig) -> Result<Findings, BuildError> {
    machine(&MachinePlan::resolve(config).unwrap(), config)
}

#[test]
fn a_missing_file_is_refused_when_it_is_configured() {
    let boot = |kernel: &str, initrd: Option<&str>| {
        Configure::BootSource(BootSource {
            kernel_image_path: kernel.into(),
            initrd_path: initrd.map(str::to_owned),
            ..BootSource::default()
        })
    };
    let kernel = TempFile::new().unwrap();
    let drive: Drive = "path=/nowhere,id=a".parse().unwrap();
    let serial = Serial {
        serial_out_path: Some("/dev/ptmx".into()),
        ..Serial::default()
    };
    for (wrong, text) in [
        (
            boot("/nowhere", None),
            "boot-source.kernel_image_path: /nowhere cannot be opened for reading: No such file",
        ),
        (
            boot(&path(&kernel), Some("/dev")),
            "boot-source.initrd_path: /dev is not a regular file",
        ),
        (
            Configure::Drive(drive),
            "drives[a].path_on_host: /nowhere cannot be opened for reading and writing",
        ),
        (
            Configure::Serial(serial),
            "serial.serial_out_path: /dev/ptmx is not a regular file or a FIFO",
        ),
    ] {
        let error = change(&wrong).unwrap_err().to_string();
        assert!(error.starts_with(text), "{error}");
    }
    change(&boot(&path(&kernel), None)).unwrap();
}

#[test]
fn console_file_is_not_created_before_the_machine() {
    let guard = TempFile::new().unwrap();
    let file = format!("{}-console", path(&guard));
    let serial = Serial {
        serial_out_path: Some(file.clone()),
        ..Serial::default()
    };
    change(&Configure::Serial(serial.clone())).unwrap();
    assert!(!Path::new(&file).exists());
    let (kernel, disk) = (TempFile::new().unwrap(), image(b"", 512));
    let mut config = machine_of([&kernel, &disk]);
    config.serial = Some(serial);
    let found = findings(&config).unwrap();
    let line = format!("serial.serial_out_path: {file} does not exist and is not made");
    assert!(found.not_examined.contains(&line), "{found:?}");
    assert!(!Path::new(&file).exists());
}

#[test]
fn check_acquires_the_images_and_names_what_it_does_not_examine() {
    let (kernel, disk) = (TempFile::new().unwrap(), image(b"QFI\xfb", 1000));
    let mut config = machine_of([&kernel, &disk]);
    let found = findings(&config).unwrap();
    assert_eq!(found.warnings.len(), 2, "{found:?}");
    assert!(found.warnings[0].starts_with("drives[a]: /"), "{found:?}");
    let rest = found.not_examined.last().unwrap();
    assert!(rest.starts_with("KVM, guest memory"), "{rest}");
    // The first check released the images.
    findings(&config).unwrap();
    let other = format!("path={},id=b", path(&disk)).parse().unwrap();
    config.drives.push(other);
    let error = findings(&config).unwrap_err().to_string();
    assert!(error.starts_with("drives[b].path_on_host: ") && error.contains("is in use"));
    config.drives.truncate(1);
    fs::remove_file(disk.as_path()).unwrap();
    let error = findings(&config).unwrap_err().to_string();
    assert!(error.contains("No such file"), "{error}");
    File::create(disk.as_path()).unwrap();
}

#[test]
fn devices_that_the_host_lacks_are_not_examined() {
    let (kernel, disk) = (TempFile::new().unwrap(), image(b"", 512));
    let mut config = machine_of([&kernel, &disk]);
    config.vsock = Some("cid=3".parse().unwrap());
    let found = findings(&config).unwrap();
    let listed = found
        .not_examined
        .iter()
        .any(|line| line.contains("/dev/vhost-vsock"));
    assert_eq!(listed, !Path::new("/dev/vhost-vsock").exists(), "{found:?}");
}
