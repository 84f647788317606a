use super::*;
use ::iommu::smmuv3::Stages;

fn refusal(json: &str) -> String {
    VmConfig::from_json(json).unwrap_err().to_string()
}

#[test]
fn firecrackers_sample_is_accepted_unchanged() {
    let config = VmConfig::from_json(
        r#"{
        "boot-source": {
            "kernel_image_path": "vmlinux.bin",
            "boot_args": "console=ttyS0 reboot=k panic=1",
            "initrd_path": null
        },
        "cpu-config": null,
        "drives": [{
            "drive_id": "rootfs", "partuuid": null, "is_root_device": true,
            "cache_type": "Unsafe", "is_read_only": false, "path_on_host": "debian.ext4",
            "io_engine": "Sync", "rate_limiter": null, "socket": null
        }],
        "machine-config": {
            "vcpu_count": 2, "mem_size_mib": 1024, "smt": false,
            "track_dirty_pages": false, "huge_pages": "None"
        },
        "balloon": null, "network-interfaces": [], "vsock": null, "logger": null,
        "metrics": null, "mmds-config": null, "entropy": null, "pmem": [], "memory-hotplug": null
    }"#,
    )
    .unwrap();
    assert_eq!(config.machine_config.mem_size_mib, 1024);
    assert!(config.drives[0].is_root_device && config.drives[0].iommu);
}

#[test]
fn a_machine_is_unchanged_after_a_round_trip_through_json() {
    let mut config = VmConfig {
        boot_source: Some(BootSource {
            kernel_image_path: "vmlinuz".into(),
            ..BootSource::default()
        }),
        iommu: "virtio-iommu".parse().unwrap(),
        drives: vec!["path=a.img,readonly=on".parse().unwrap()],
        network_interfaces: vec!["tap=tap0,mac=06:00:AC:10:00:02,mtu=9000".parse().unwrap()],
        vsock: Some("cid=3,iommu=off".parse().unwrap()),
        entropy: Some(Entropy::default()),
        ..VmConfig::default()
    };
    config.name_devices();
    let json = serde_json::to_string(&config).unwrap();
    assert_eq!(VmConfig::from_json(&json).unwrap(), config);
    assert!(json.contains(r#""boot-source""#) && json.contains(r#""network-interfaces""#));
    assert!(!json.contains("balloon") && !json.contains("socket"));
}

#[test]
fn an_empty_document_is_the_default_machine_but_cannot_start() {
    let config = VmConfig::from_json("{}").unwrap();
    assert_eq!(config, VmConfig::default());
    assert_eq!(config.machine_config.vcpu_count, 1);
    let error = config.validate_for_start().unwrap_err();
    assert_eq!(error.field, "boot-source");
}

#[test]
fn unknown_fields_are_refused_by_name_at_every_level() {
    assert!(refusal(r#"{"bootsource": null}"#).contains("bootsource"));
    assert!(refusal(r#"{"iommu": {"models": "none"}}"#).contains("models"));
    let drive = r#"{"drives": [{"drive_id": "a", "path_on_host": "b", "readonly": true}]}"#;
    assert!(refusal(drive).contains("readonly"));
}

#[test]
fn wrong_types_are_refused_by_path() {
    let drive = r#"{"drives": [{"drive_id": "a", "path_on_host": "b", "iommu": 1}]}"#;
    assert!(refusal(drive).starts_with("drives[0].iommu: invalid type"));
    assert!(refusal("{} {}").contains("trailing"));
    assert!(refusal("[").starts_with("JSON: "));
    assert!(refusal(r#"{"vsock": {}}"#).contains("guest_cid"));
}

#[test]
fn refusals_stay_on_one_line_with_any_field_name() {
    let error = refusal(r#"{"a\nb\u001b[2J": 1}"#);
    assert!(
        !error.contains(char::is_control) && error.contains("a\\nb"),
        "{error}"
    );
    let error = refusal(r#"{"logger": {"log_path": "a\nb"}}"#);
    assert!(
        error.starts_with("logger.log_path: contains a control"),
        "{error}"
    );
}

#[test]
fn lists_in_the_place_of_objects_are_refused() {
    assert!(refusal(r#"[{"kernel_image_path": "k"}]"#).starts_with("JSON: is a list"));
    assert!(refusal(r#"{"logger": [null, null]}"#).starts_with("logger: is a list"));
    let drive = r#"{"drives": [["a", "b"]]}"#;
    assert!(refusal(drive).starts_with("drives[0]: is a list"));
    let limiter = r#"{"entropy": {"rate_limiter": [null, null]}}"#;
    assert!(refusal(limiter).starts_with("entropy.rate_limiter: is a list"));
    assert!(refusal(r#"{"balloon": {}}"#).starts_with("balloon: "));
}

#[test]
fn unsupported_fields_are_refused_by_name_unless_at_their_default() {
    let refused = [
        (r#"{"balloon": {"amount_mib": 1}}"#, "balloon"),
        (r#"{"pmem": [1]}"#, "pmem"),
        (r#"{"cpu-config": "T2"}"#, "cpu-config"),
        (
            r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "smt": true}}"#,
            "machine-config.smt",
        ),
        (
            r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "T2"}}"#,
            "machine-config.cpu_template",
        ),
        (
            r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "huge_pages": "Transparent"}}"#,
            "machine-config.huge_pages",
        ),
        (
            r#"{"drives": [{"drive_id": "a", "path_on_host": "b", "io_engine": "Async"}]}"#,
            "drives[a].io_engine",
        ),
        (
            r#"{"drives": [{"drive_id": "a", "path_on_host": "b", "socket": "/s"}]}"#,
            "drives[a].socket",
        ),
        (
            r#"{"drives": [{"drive_id": "a", "path_on_host": "b",
                "rate_limiter": {"ops": {"size": 1, "refill_time": 1}}}]}"#,
            "drives[a].rate_limiter",
        ),
        (
            r#"{"vsock": {"guest_cid": 3, "uds_path": "/v.sock"}}"#,
            "AF_VSOCK",
        ),
        (
            r#"{"metrics": {"metrics_path": "m", "emit_id": true}}"#,
            "metrics.emit_id",
        ),
    ];
    for (json, name) in refused {
        let error = refusal(json);
        assert!(error.contains(name), "{json} said: {error}");
        assert!(!error.contains('\n'), "{error}");
    }
    let unlimited = r#"{"drives": [{"drive_id": "a", "path_on_host": "b", "rate_limiter":
        {"bandwidth": {"size": 0, "one_time_burst": 5, "refill_time": 0}}, "io_engine": "Sync"}],
        "machine-config": {"vcpu_count": 1, "mem_size_mib": 64, "cpu_template": "None"}}"#;
    VmConfig::from_json(unlimited).unwrap();
}

#[test]
fn words_that_are_always_refused_are_not_offered() {
    for word in ["1G", "Transparent"] {
        let json = format!(
            r#"{{"machine-config": {{"vcpu_count": 1, "mem_size_mib": 64, "huge_pages": "{word}"}}}}"#
        );
        let fix = "machine-config.huge_pages: use \"None\" or \"2M\"";
        assert_eq!(refusal(&json), fix);
    }
    for word in ["fast", "Async"] {
        let json = format!(
            r#"{{"drives": [{{"drive_id": "a", "path_on_host": "b", "io_engine": "{word}"}}]}}"#
        );
        let fix = "drives[a].io_engine: only \"Sync\" is supported";
        assert_eq!(refusal(&json), fix);
    }
}

#[test]
fn values_out_of_range_are_refused_by_name() {
    let refused = [
        (
            r#"{"serial": {"serial_out_path": "c", "serial_out_max_mib": 0}}"#,
            "serial.serial_out_max_mib: use 1 to",
        ),
        (
            r#"{"serial": {"serial_out_path": "c", "serial_out_max_mib": 1048577}}"#,
            "serial.serial_out_max_mib: use 1 to 1048576",
        ),
        (
            r#"{"machine-config": {"vcpu_count": 0, "mem_size_mib": 64}}"#,
            "vcpu_count",
        ),
        (
            r#"{"machine-config": {"vcpu_count": 33, "mem_size_mib": 64}}"#,
            "vcpu_count",
        ),
        (
            r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 0}}"#,
            "mem_size_mib",
        ),
        (
            r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 63}}"#,
            "mem_size_mib: use 64 to 261120 MiB",
        ),
        (
            r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 261121}}"#,
            "mem_size_mib: use 64 to 261120 MiB",
        ),
        (
            r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 500000}}"#,
            "mem_size_mib: use 64 to 261120 MiB",
        ),
        (
            r#"{"machine-config": {"vcpu_count": 1, "mem_size_mib": 18446744073709551615}}"#,
            "mem_size_mib: use 64 to 261120 MiB",
        ),
        (
            r#"{"boot-source": {"kernel_image_path": ""}}"#,
            "kernel_image_path",
        ),
        (
            r#"{"boot-source": {"kernel_image_path": "k", "boot_args": "a\u0000"}}"#,
            "boot_args",
        ),
        (
            r#"{"drives": [{"drive_id": "a\nb", "path_on_host": "b"}]}"#,
            "drives[0].drive_id",
        ),
        (
            r#"{"drives": [{"drive_id": "a", "path_on_host": "b", "num_queues": 0}]}"#,
            "num_queues",
        ),
        (
            r#"{"drives": [{"drive_id": "a", "path_on_host": "b", "partuuid": "x y"}]}"#,
            "partuuid",
        ),
        (
            r#"{"network-interfaces": [{"iface_id": "n", "host_dev_name": "tap0123456789abc"}]}"#,
            "host_dev_name",
        ),
        (
            r#"{"network-interfaces": [{"iface_id": "n", "host_dev_name": "tap%d"}]}"#,
            "host_dev_name: is a template",
        ),
        (
            r#"{"network-interfaces": [{"iface_id": "n", "host_dev_name": "a:b"}]}"#,
            "host_dev_name",
        ),
        (
            r#"{"network-interfaces": [{"iface_id": "n", "host_dev_name": "t", "mtu": 67}]}"#,
            "mtu",
        ),
        (
            r#"{"network-interfaces": [{"iface_id": "n", "host_dev_name": "t",
                "guest_mac": "01:00:00:00:00:00"}]}"#,
            "guest_mac",
        ),
        (r#"{"vsock": {"guest_cid": 2}}"#, "guest_cid"),
        (r#"{"vsock": {"guest_cid": 4294967295}}"#, "guest_cid"),
        (
            r#"{"iommu": {"model": "virtio-iommu", "ats": true}}"#,
            "iommu.ats",
        ),
        (r#"{"iommu": {"stage": "nested"}}"#, "iommu.stage"),
        (r#"{"logger": {"level": "loud"}}"#, "level"),
    ];
    for (json, name) in refused {
        let error = refusal(json);
        assert!(error.contains(name), "{json} said: {error}");
    }
}

#[test]
fn only_the_word_that_hides_the_devices_is_left_out_of_the_command_line() {
    let command_line = |boot_args: &str| {
        let boot_source = BootSource {
            boot_args: Some(boot_args.to_owned()),
            ..BootSource::default()
        };
        boot_source.command_line().unwrap()
    };
    let kept = command_line("console=ttyS0 reboot=k panic=1 pci=off ip=dhcp");
    assert_eq!(kept, "console=ttyS0 reboot=k panic=1 ip=dhcp");
    let other = "pci=offset  x=pci=off";
    assert_eq!(command_line(other), other);
    assert_eq!(BootSource::default().command_line(), None);
}

#[test]
fn a_command_line_that_was_typed_is_passed_on_whole() {
    let boot_args = "console=ttyS0 pci=off nomodule";
    let boot_source = BootSource {
        boot_args: Some(boot_args.to_owned()),
        typed: true,
        ..BootSource::default()
    };
    assert_eq!(boot_source.command_line().unwrap(), boot_args);
    // A client's change replaces it.
    let shown = serde_json::to_string(&boot_source).unwrap();
    let again: BootSource = serde_json::from_str(&shown).unwrap();
    assert_eq!(again.command_line().unwrap(), "console=ttyS0");
}

#[test]
fn sections_are_checked_against_each_other() {
    let drives = r#"{"drives": [{"drive_id": "a", "path_on_host": "x", "is_root_device": true},
        {"drive_id": "ID", "path_on_host": "y", "is_root_device": ROOT}]}"#;
    let with = |id, root| drives.replace("ID", id).replace("ROOT", root);
    VmConfig::from_json(&with("b", "false")).unwrap();
    assert!(refusal(&with("a", "false")).contains("drive_id"));
    assert!(refusal(&with("b", "true")).contains("drives[b].is_root_device"));

    let interfaces = r#"{"network-interfaces": [{"iface_id": "n", "host_dev_name": "t"},
        {"iface_id": "ID", "host_dev_name": "TAP"}]}"#;
    let with = |id, tap| interfaces.replace("ID", id).replace("TAP", tap);
    VmConfig::from_json(&with("m", "u")).unwrap();
    assert!(refusal(&with("n", "u")).contains("iface_id"));
    assert!(refusal(&with("m", "t")).contains("host_dev_name"));

    let drive = |index| Drive {
        drive_id: format!("d{index}"),
        path_on_host: "x".into(),
        ..Drive::default()
    };
    let mut config = VmConfig {
        drives: (1..::devices::pci::SLOTS).map(drive).collect(),
        ..VmConfig::default()
    };
    config.validate().unwrap();
    config.entropy = Some(Entropy::default());
    assert!(config.validate().unwrap_err().to_string().contains("31"));
}

#[test]
fn smmuv3_belongs_to_aarch64() {
    let iommu = Iommu {
        model: IommuModel::Smmuv3,
        ats: true,
        stage: Stages::Nested,
        ..Iommu::default()
    };
    iommu.validate_on("aarch64").unwrap();
    let error = iommu.validate_on("x86_64").unwrap_err();
    assert!(error.to_string().contains("virtio-iommu"));
}

#[test]
fn arguments_read_every_key_and_refuse_the_rest() {
    let drive: Drive = "path=/a,,b.img,id=root,readonly=on,root=on,cache=writeback,queues=4"
        .parse()
        .unwrap();
    assert_eq!(drive.path_on_host, "/a,b.img");
    assert_eq!((drive.drive_id.as_str(), drive.num_queues), ("root", 4));
    assert!(drive.is_read_only && drive.is_root_device && drive.iommu);
    assert_eq!(drive.cache_type, CacheType::Writeback);

    let net: NetworkInterface = "tap=t0,id=n,iommu=off,queues=2".parse().unwrap();
    assert!(!net.iommu && net.num_queues == 2 && net.mac().unwrap().is_none());

    let refused = [
        ("", "key=value"),
        ("id=a", "path= is missing"),
        ("path=a,path=b", "path is given twice"),
        ("path=a,readonly=yes", "readonly=on or readonly=off"),
        ("path=a,size=3", "unknown key size"),
        ("path=a,queues=many", "queues=many"),
        ("path=a,cache=full", "cache=unsafe"),
        ("path=a,", "key=value"),
    ];
    for (text, expected) in refused {
        let error = text.parse::<Drive>().unwrap_err().to_string();
        assert!(error.contains(expected), "{text} said: {error}");
    }
    let error = "tap=t,mac=1:2".parse::<NetworkInterface>().unwrap_err();
    assert!(error.to_string().contains("mac=1:2: use six"), "{error}");
    assert!("cid=2".parse::<Vsock>().is_err());
    assert!("iommu=on".parse::<Vsock>().is_err());
    assert!("smmu".parse::<Iommu>().is_err());
    assert!("none,ats=on".parse::<Iommu>().is_err());
    assert_eq!("none".parse::<Iommu>().unwrap(), Iommu::default());
    for stage in [Stages::One, Stages::Two, Stages::Nested] {
        let mut iommu = Iommu::default();
        keys::parse(&format!("stage={stage}"), Iommu::KEYS, &mut iommu).unwrap();
        assert_eq!(iommu.stage, stage);
    }
}

#[test]
fn memory_sizes_are_whole_mebibytes_within_range() {
    let mib = |text: &str| text.parse::<MemorySize>().map(MemorySize::mib).ok();
    assert_eq!(mib("512M"), Some(512));
    assert_eq!(mib("512"), Some(512));
    assert_eq!(mib("2g"), Some(2048));
    for text in ["1G", "1g", "1GB", "1GiB", "1024MB", "1024MiB", "1024"] {
        assert_eq!(mib(text), Some(1024), "{text}");
    }
    for text in [
        "1T",
        "63M",
        "",
        "M",
        "0",
        "1.5G",
        "-1M",
        "2T",
        "18446744073709551615G",
        "1K",
        "M512",
    ] {
        assert_eq!(mib(text), None, "{text}");
    }
}

#[test]
fn amounts_of_memory_are_refused_with_the_form_or_one_range() {
    let error = |text: &str| text.parse::<MemorySize>().unwrap_err().to_string();
    for text in ["", "lots", "1.5G", "-1M", "512K"] {
        assert!(error(text).starts_with("use a number of MiB"), "{text}");
    }
    let most = arch::layout::MAX_RAM >> 20;
    for text in ["0", "63M", "500000", "1T", "99999999999999999999"] {
        assert_eq!(error(text), format!("use 64 to {most} MiB"), "{text}");
    }
}

#[test]
fn numbers_of_processors_are_refused_with_the_range() {
    let count = |text: &str| text.parse::<CpuCount>().map(CpuCount::get);
    assert_eq!(count("32"), Ok(32));
    for text in ["0", "33", "300", "-1", "two", "", "1.5"] {
        assert_eq!(count(text).unwrap_err().to_string(), "use 1 to 32");
    }
}

#[test]
fn mistyped_arguments_are_refused_with_the_fix() {
    fn error<T: std::str::FromStr<Err = ArgumentError>>(text: &str) -> String {
        text.parse::<T>().err().unwrap().to_string()
    }
    let drive = error::<Drive>;
    for (text, fix) in [
        ("", "use path=FILE"),
        ("disk.img", "use path=disk.img"),
        ("path=a,readonly", "use readonly=on|off"),
        (
            "path=a,b.img",
            "write a comma that belongs to a value twice",
        ),
        ("path=a,redonly=on", "did you mean readonly?"),
        ("path=a,read-only=on", "did you mean readonly?"),
        ("path=a,size=3", "use path, id, readonly"),
        ("path=a,queues=17", "queues=17: use 1 to 16"),
        ("path=a,queues=-1", "queues=-1: use 1 to 16"),
        ("path=a,id=a b", "id=a b: use 1 to 64"),
        ("path=,id=a", "path=: is empty; give a path"),
        ("readonly=on", "path= is missing; give path=FILE"),
    ] {
        assert!(drive(text).contains(fix), "{text}: {}", drive(text));
    }
    let net = error::<NetworkInterface>;
    assert!(net("tap0").contains("use tap=tap0"));
    assert!(net("tap=t,mtu=70000").contains("mtu=70000: use 68 to 65535"));
    assert!(net("tap=t,mca=06:00:00:00:00:01").contains("did you mean mac?"));
    let vsock = error::<Vsock>;
    assert!(vsock("5").contains("use cid=5"));
    assert!(vsock("cid=2").contains("cid=2: use 3 to 4294967294"));
    let iommu = error::<Iommu>;
    assert!(iommu("virtio").contains("use none, virtio-iommu or smmuv3"));
    assert!(iommu("virtio_iommu").contains("did you mean virtio-iommu?"));
    assert!(iommu("smmu-v3").contains("did you mean smmuv3?"));
    assert!(iommu("ats=on").contains("begin with none, virtio-iommu or smmuv3"));
    assert!(iommu("none,prefil=on").contains("did you mean prefill?"));
}

#[test]
fn the_help_has_every_key_with_the_default_that_holds() {
    fn check<T>(without: &str)
    where
        T: Argument + std::str::FromStr<Err = ArgumentError> + PartialEq + std::fmt::Debug,
    {
        let help = T::help();
        assert_eq!(help.trim_start().lines().count(), T::KEYS.len());
        for (key, line) in T::KEYS.iter().zip(help.trim_start().lines()) {
            assert!(line.trim_start().starts_with(&format!("{}=", key.name)));
            if let Omitted::Is(value) = key.omitted {
                assert!(line.ends_with(&format!("[default: {value}]")), "{line}");
                let with = format!("{without},{}={value}", key.name);
                let parsed = with.parse::<T>().unwrap();
                assert_eq!(parsed, without.parse::<T>().unwrap(), "{with}");
            }
        }
    }
    check::<Drive>("path=a");
    check::<NetworkInterface>("tap=t");
    check::<Vsock>("cid=3");
    check::<Serial>("path=c");
    check::<Serial>("path=console");
    check::<Iommu>("virtio-iommu");
    assert!(Drive::help().contains("queues=N") && Drive::help().contains("1 to 16 [default: 1]"));
}

#[test]
fn json_errors_name_the_field_once_and_the_fix() {
    let machine = |fields: &str| refusal(&format!(r#"{{"machine-config": {{{fields}}}}}"#));
    for (error, expected) in [
        (
            refusal(r#"{"boot-source": {"kernle_image_path": "k"}}"#),
            "boot-source.kernle_image_path: unknown field; \
             did you mean `kernel_image_path`?",
        ),
        (
            refusal(r#"{"boot_source": {}}"#),
            "boot_source: unknown field; did you mean `boot-source`?",
        ),
        (
            refusal(r#"{"logger": {"level": "loud"}}"#),
            "logger.level: use Off, Error, Warning, Info, Debug or Trace",
        ),
        (
            refusal(r#"{"iommu": {"model": "virtio"}}"#),
            "iommu.model: unknown value `virtio`; use `none`, `virtio-iommu` or `smmuv3`",
        ),
        (
            refusal(r#"{"iommu": {"model": "smmu-v3"}}"#),
            "iommu.model: unknown value `smmu-v3`; did you mean `smmuv3`?",
        ),
        (
            refusal(r#"{"boot-source": 5}"#),
            "boot-source: invalid type: integer `5`, expected an object",
        ),
        (
            refusal(r#"{"drives": {}}"#),
            "drives: invalid type: map, expected a list",
        ),
        (
            machine(r#""vcpu_count": 300, "mem_size_mib": 128"#),
            "machine-config.vcpu_count: use 1 to 32",
        ),
        (
            machine(r#""vcpu_count": -1, "mem_size_mib": 128"#),
            "machine-config.vcpu_count: use 1 to 32",
        ),
        (
            machine(r#""vcpu_count": "two", "mem_size_mib": 128"#),
            "machine-config.vcpu_count: invalid type: string \"two\", expected a whole number",
        ),
        (
            machine(r#""vcpu_count": 1.5, "mem_size_mib": 128"#),
            "machine-config.vcpu_count: invalid type: floating point `1.5`, \
             expected a whole number",
        ),
        (
            refusal(r#"{"vsock": {"guest_cid": 5000000000}}"#),
            "vsock.guest_cid: use 3 to 4294967294; 0 to 2 and the last are reserved",
        ),
        (
            refusal(r#"{"iommu": {"model": null}}"#),
            "iommu.model: invalid type, expected a string",
        ),
        (refusal(r#"{"vsock": {}}"#), "vsock.guest_cid: is missing"),
        (
            refusal(r#"{"vsock": {"guest_cid": 3, "guest_cid": 4}}"#),
            "vsock.guest_cid: is given twice; remove one",
        ),
        (
            refusal(r#"{"drives": [{"drive_id": "a"}]}"#),
            "drives[0].path_on_host: is missing",
        ),
        (
            refusal(r#"{"drives": [{"drive_id": "a", "path_on_host": "b", "read_only": true}]}"#),
            "drives[0].read_only: unknown field; did you mean `is_read_only`?",
        ),
        (refusal("[]"), "JSON: is a list; give an object"),
        (
            refusal("{} x"),
            "JSON: trailing characters at line 1 column 4",
        ),
        (
            refusal("{"),
            "JSON: EOF while parsing an object at line 1 column 1",
        ),
        (
            refusal(""),
            "JSON: EOF while parsing a value at line 1 column 0",
        ),
    ] {
        assert_eq!(error, expected);
    }
    let field = "\"iface_id\": \"n\", \"host_dev_name\": \"t\"";
    let net = |more| {
        refusal(&format!(
            r#"{{"network-interfaces": [{{{field}, {more}}}]}}"#
        ))
    };
    assert!(net(r#""mtu": 70000"#).ends_with(".mtu: use 68 to 65535"));
    assert!(net(r#""num_queues": 99999"#).ends_with(".num_queues: use 1 to 16"));
}

#[test]
fn nameless_devices_get_free_names() {
    let mut config = VmConfig {
        drives: ["path=a", "path=b,id=disk0", "path=c"]
            .map(|text| text.parse().unwrap())
            .into(),
        network_interfaces: vec!["tap=t".parse().unwrap()],
        ..VmConfig::default()
    };
    config.name_devices();
    let ids: Vec<_> = config.drives.iter().map(|d| d.drive_id.as_str()).collect();
    assert_eq!(ids, ["disk1", "disk0", "disk2"]);
    assert_eq!(config.network_interfaces[0].iface_id, "net0");
    config.validate().unwrap();
}

#[test]
fn mac_addresses_print_as_they_are_read() {
    let mac: MacAddress = "06:00:AC:10:00:02".parse().unwrap();
    assert_eq!(mac.octets(), [6, 0, 0xac, 0x10, 0, 2]);
    assert_eq!(mac.to_string(), "06:00:ac:10:00:02");
    for text in [
        "",
        "06:00:ac:10:00",
        "06:00:ac:10:00:02:03",
        "6:0:ac:10:0:2",
        "+6:00:ac:10:00:02",
        "00:00:00:00:00:00",
        "ff:ff:ff:ff:ff:ff",
    ] {
        assert!(text.parse::<MacAddress>().is_err(), "{text}");
    }
}

#[test]
fn console_file_and_its_limit_are_one_argument() {
    let serial: Serial = "path=/var/log/console,max-mib=8".parse().unwrap();
    assert_eq!(serial.serial_out_path.as_deref(), Some("/var/log/console"));
    assert_eq!(serial.serial_out_max_mib, Some(8));
    for wrong in ["max-mib=8", "path=c,max-mib=0", "path="] {
        assert!(wrong.parse::<Serial>().is_err(), "{wrong}");
    }
    let json = serde_json::to_string(&serial).unwrap();
    assert_eq!(parse_json::<Serial>(json.as_bytes()).unwrap(), serial);
}
