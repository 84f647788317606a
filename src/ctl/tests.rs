use super::*;
use clap::Parser;
use vmm::action::{
    DeviceKind, EndpointCounters, EndpointState, Feature, Hex, Permissions, Registration,
    RegistrationKind,
};
use vmm::config::IommuModel;

#[derive(Parser)]
struct Line {
    #[command(flatten)]
    ctl: CtlArgs,
}

fn parse(line: &str) -> Result<CtlArgs, clap::Error> {
    let words = ["ctl", "--api-socket", "s"].into_iter();
    Line::try_parse_from(words.chain(line.split(' '))).map(|line| line.ctl)
}

fn endpoint(id: &str, updates: u64) -> EndpointInfo {
    EndpointInfo {
        id: id.to_owned(),
        device: DeviceKind::Net,
        pci_address: "00:03.0".to_owned(),
        stream_id: 0x18,
        state: EndpointState::Translated,
        domain: Some(2),
        asid: None,
        vmid: None,
        ats: None,
        registration: Some(Registration {
            kind: RegistrationKind::Unmap,
            reason: "virtio-iommu has no device IOTLB".to_owned(),
        }),
        counters: EndpointCounters {
            updates,
            faults: [("F_TRANSLATION".to_owned(), 3)].into(),
            ..EndpointCounters::default()
        },
    }
}

fn iommu(updates: u64) -> IommuInfo {
    IommuInfo {
        model: IommuModel::VirtioIommu,
        enabled: true,
        features: vec![Feature {
            name: "MMIO".to_owned(),
            negotiated: Some(false),
        }],
        endpoints: vec![endpoint("net0", updates)],
    }
}

#[test]
fn the_words_of_the_command_line_are_parsed() {
    assert!(matches!(parse("info").unwrap().word, Word::Info));
    assert!(parse("iommu --json").unwrap().json);
    let map = parse("iommu map net0").unwrap().word;
    let Word::Iommu(IommuArgs {
        view: Some(IommuView::Map { endpoint }),
        ..
    }) = map
    else {
        panic!("{map:?}");
    };
    assert_eq!(endpoint, "net0");
    let watch = parse("iommu --watch --interval 5").unwrap().word;
    assert!(matches!(
        watch,
        Word::Iommu(IommuArgs {
            watch: true,
            interval: 5,
            ..
        })
    ));
    assert!(parse("iommu --watch --interval 0").is_err());
    let request = parse("PUT /vsock {}").unwrap().word;
    assert!(matches!(request, Word::Request(words) if words == ["PUT", "/vsock", "{}"]));
}

#[test]
fn invalid_requests_reach_no_machine() {
    let refused = |words: &[&'static str]| {
        let session = Session {
            socket: Path::new("/nonexistent/socket"),
            json: false,
            words: words.to_vec(),
        };
        session.request(&mut Vec::new())
    };
    for words in [
        &["inof"][..],
        &["GET"],
        &["get", "/x"],
        &["GET", "x"],
        &["GET", "/a b"],
        &["GET", "/a\r\nX:"],
        &["PUT", "/x", "{}", "more"],
    ] {
        assert!(
            matches!(refused(words), Err(Failure::Usage(_))),
            "{words:?}"
        );
    }
    let honest = refused(&["GET", "/x"]);
    assert!(matches!(
        honest,
        Err(Failure::Unreachable(ClientError::NoSocket(_)))
    ));
}

#[test]
fn options_count_before_and_after_the_word() {
    let socket = |line: &str| {
        let words = std::iter::once("ctl").chain(line.split(' '));
        let ctl = Line::try_parse_from(words).unwrap().ctl;
        let session = Session::new(&ctl).ok().unwrap();
        let words = session.words.join(" ");
        (session.socket.to_owned(), session.json, words)
    };
    let expected = |words: &str| (PathBuf::from("a"), false, words.to_owned());
    assert_eq!(socket("info --api-socket a"), expected(""));
    assert_eq!(socket("iommu --api-socket a map net0"), expected(""));
    assert_eq!(socket("iommu map net0 --api-socket=a"), expected(""));
    assert_eq!(socket("GET /vm --api-socket a"), expected("GET /vm"));
    assert_eq!(socket("PUT --api-socket=a /vm {}"), expected("PUT /vm {}"));
    assert_eq!(
        socket("--api-socket b GET / --api-socket a"),
        expected("GET /")
    );
    assert!(socket("GET / --json --api-socket a").1);
}

#[test]
fn unknown_words_are_refused_with_the_fix() {
    let message = |words: &[&str]| match unknown_word(words) {
        Failure::Usage(message) => message,
        _ => String::new(),
    };
    for (words, fix) in [
        (&["inof"][..], "did you mean info?"),
        (&["resumee"], "did you mean resume?"),
        (&["frobnicate"], "use info, start"),
        (&["GET"], "write GET PATH"),
        (&["GET", "vm"], "a PATH begins with /"),
        (&["get", "/vm"], "write the method as GET"),
        (&["PUT", "/vm", "{\"a\":", "1}"], "as one word, in quotes"),
    ] {
        let message = message(words);
        assert!(message.ends_with(fix) || message.contains(fix), "{message}");
        assert_eq!(message.lines().count(), 1);
    }
    assert!(!message(&["a\u{1b}[2J"]).contains('\u{1b}'));
}

#[test]
fn the_table_shows_counters_or_their_rates() {
    let text = show::iommu(&iommu(1000), None);
    let row = text
        .lines()
        .find(|line| line.starts_with("net0  "))
        .unwrap();
    for cell in [
        "net 00:03.0",
        "0x18",
        "translated",
        "domain 2",
        "unmap",
        " 1000 ",
    ] {
        assert!(row.contains(cell), "{cell} in {row}");
    }
    assert!(
        text.contains("(MMIO)"),
        "what is not negotiated is in brackets: {text}"
    );
    assert!(text.contains("no device IOTLB") && text.contains("3 x F_TRANSLATION"));

    let before = iommu(1000);
    let text = show::iommu(&iommu(1500), Some((&before, Duration::from_millis(500))));
    assert!(
        text.contains("UPDATES/s") && text.contains(" 1000 "),
        "{text}"
    );
    let nothing = IommuInfo::default();
    let text = show::iommu(&iommu(1500), Some((&nothing, Duration::ZERO)));
    assert!(
        !text.contains("1500"),
        "an endpoint without a past has no rate: {text}"
    );
}

#[test]
fn control_characters_do_not_reach_the_terminal() {
    let mut info = iommu(1);
    info.endpoints[0].id = "a\x1b[2J".to_owned();
    assert!(
        show::iommu(&info, None)
            .lines()
            .any(|line| line.starts_with("a?[2J"))
    );
}

fn mapping(start: u64, end: u64, target: u64, write: bool) -> Mapping {
    Mapping {
        start: Hex(start),
        end: Hex(end),
        target: Hex(target),
        permissions: Permissions { read: true, write },
        mmio: false,
    }
}

#[test]
fn the_map_joins_neighbours_and_shows_holes() {
    let mappings = [
        mapping(0x1000, 0x1fff, 0x5000, true),
        mapping(0x2000, 0x2fff, 0x6000, true),
        mapping(0x3000, 0x3fff, 0x9000, false),
        mapping(0x8000_0000, 0x8000_0fff, 0x1000, false),
    ];
    let text = map::draw(&endpoint("net0", 0), &mappings, None);
    assert!(text.contains("4 mappings, 16 KiB mapped, 3 runs"), "{text}");
    let line = |start: &str| text.lines().find(|line| line.contains(start)).unwrap();
    let first = line("0x0000000000001000");
    assert!(first.contains("8 KiB rw → 0x5000"), "{first}");
    assert!(line("0x0000000000003000").contains("4 KiB r- → 0x9000"));
    assert!(text.contains("· 4 KiB") && text.contains("2^32"), "{text}");
}

#[test]
fn the_map_draws_any_range_a_machine_could_report() {
    let whole = [mapping(0, u64::MAX, 0, true)];
    let text = map::draw(&endpoint("n", 0), &whole, Some(Hex(u64::MAX)));
    assert!(
        text.contains(&"█".repeat(64)) && text.contains("2^64"),
        "{text}"
    );
    let odd = [
        mapping(5, 4, 0, true),
        mapping(0, 0, 0, true),
        mapping(u64::MAX, u64::MAX, u64::MAX, true),
    ];
    assert!(map::draw(&endpoint("n", 0), &odd, None).contains("2 runs"));
    let scattered: Vec<_> = (0..200)
        .map(|i| mapping(i << 40, i << 40 | 0xfff, 0, true))
        .collect();
    let text = map::draw(&endpoint("n", 0), &scattered, None);
    assert!(text.contains("and 152 more runs"));
    let mut bypassed = endpoint("n", 0);
    bypassed.state = EndpointState::Bypass;
    assert!(map::draw(&bypassed, &[], None).contains("not translated"));
}

#[test]
fn the_map_says_where_the_listing_stopped() {
    let mappings = [mapping(0x1000, 0x1fff, 0x5000, true)];
    let text = map::draw(&endpoint("n", 0), &mappings, Some(Hex(0x1fff)));
    assert!(text.contains("at least 1 mappings"), "{text}");
    let end = "mappings above 0x1fff are not listed\n";
    assert!(text.ends_with(end), "{text}");
    // Pages without mappings do not prove that there are none.
    let text = map::draw(&endpoint("n", 0), &[], Some(Hex(0x3ff_ffff)));
    assert!(!text.contains("every access faults"), "{text}");
    assert!(text.contains("nothing is mapped up to 0x3ffffff"), "{text}");
    let text = map::draw(&endpoint("n", 0), &mappings, None);
    assert!(!text.contains("not listed"), "{text}");
}

#[test]
fn sizes_are_rounded_down_to_a_tenth() {
    let sizes = [
        (0, "0 B"),
        (1023, "1023 B"),
        (4096, "4 KiB"),
        (1536, "1.5 KiB"),
        (512 << 20, "512 MiB"),
        (u64::MAX, "15.9 EiB"),
    ];
    for (bytes, text) in sizes {
        assert_eq!(show::size(bytes), text);
    }
}

#[test]
fn names_are_safe_in_a_path() {
    assert_eq!(encode_segment("00:03.0"), "00:03.0");
    assert_eq!(encode_segment("a/b ?%\n"), "a%2Fb%20%3F%25%0A");
}
