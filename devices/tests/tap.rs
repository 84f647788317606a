//! Taps of the host's kernel, without a guest: in the network namespace of the
//! process, and while they are deleted and created again.
//!
//! Needs root and `/dev/net/tun`, and fails without them.

use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use devices::tap::{Link, Offloads, Tap, TapError};

/// Variable that is set when the test program runs in the test's namespace.
const INSIDE: &str = "PORTCULLIS_TEST_INSIDE";

fn run(command: &str) {
    let mut words = command.split(' ');
    let program = words.next().unwrap();
    let status = Command::new(program).args(words).status();
    assert!(status.unwrap().success(), "{command}");
}

/// Waits for notifications of the tap's socket until the link is as expected.
#[track_caller]
fn wait_for_link(tap: &Tap, link: Link) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut told = true;
    while !(told && tap.link() == link) {
        assert!(Instant::now() < deadline, "it is {:?}", tap.link());
        sleep(Duration::from_millis(10));
        told |= tap.links().take_changes();
    }
}

#[test]
fn tap_of_a_namespace_is_found_whatever_sys_shows() {
    const TAP: &str = "pctns";
    if std::env::var_os(INSIDE).is_some() {
        assert!(!std::fs::exists(format!("/sys/class/net/{TAP}")).unwrap());
        let tap = Tap::open(TAP, 1, None).unwrap();
        wait_for_link(&tap, Link::Up);
        return;
    }
    let namespace = "pctest";
    let _ = Command::new("ip")
        .args(["netns", "del", namespace])
        .output();
    run(&format!("ip netns add {namespace}"));
    run(&format!(
        "ip -n {namespace} tuntap add {TAP} mode tap multi_queue"
    ));
    run(&format!("ip -n {namespace} link set {TAP} up"));
    let inside = Command::new("nsenter")
        .arg(format!("--net=/run/netns/{namespace}"))
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "tap_of_a_namespace_is_found_whatever_sys_shows"])
        .env(INSIDE, "1")
        .output()
        .unwrap();
    run(&format!("ip netns del {namespace}"));
    assert!(
        inside.status.success(),
        "{}{}",
        String::from_utf8_lossy(&inside.stdout),
        String::from_utf8_lossy(&inside.stderr)
    );
}

#[test]
fn link_is_followed_down_and_up() {
    run("ip tuntap add pctlink mode tap");
    let tap = Tap::open("pctlink", 1, None).unwrap();
    assert_eq!(tap.link(), Link::Down);
    for _ in 0..3 {
        run("ip link set pctlink up");
        wait_for_link(&tap, Link::Up);
        run("ip link set pctlink down");
        wait_for_link(&tap, Link::Down);
    }
    run("ip link del pctlink");
}

/// Deletes the tap of that name and creates it again, as each of `kinds`.
fn recreate(name: &str, pairs: usize, kinds: [&str; 2]) {
    run(&format!("ip tuntap add {name} mode tap{}", kinds[0]));
    run(&format!("ip link set {name} up"));
    let mut tap = Tap::open(name, pairs, None).unwrap();
    wait_for_link(&tap, Link::Up);
    run(&format!("ip link del {name}"));
    wait_for_link(&tap, Link::Gone);
    assert!(!tap.reattach().unwrap(), "there is none");
    // A driver that starts in between gets no error.
    tap.set_offloads(Offloads::CSUM).unwrap();
    for pair in 0..pairs {
        tap.set_attached(pair, pair < 2).unwrap();
    }
    run(&format!("ip tuntap add {name} mode tap{}", kinds[1]));
    assert!(tap.reattach().unwrap());
    assert_eq!(tap.link(), Link::Down);
    run(&format!("ip link set {name} up"));
    wait_for_link(&tap, Link::Up);
    run(&format!("ip link del {name}"));
}

#[test]
fn tap_that_is_deleted_and_made_again_is_used_again() {
    recreate("pctone", 1, ["", ""]);
    recreate("pctkind", 1, ["", " multi_queue"]);
    recreate("pctmany", 4, [" multi_queue", " multi_queue"]);
}

#[test]
fn recreated_tap_with_one_queue_is_refused_until_it_has_several() {
    run("ip tuntap add pctless mode tap multi_queue");
    let mut tap = Tap::open("pctless", 2, None).unwrap();
    run("ip link del pctless");
    run("ip tuntap add pctless mode tap");
    let error = tap.reattach().unwrap_err();
    assert!(matches!(error, TapError::OneQueue { .. }), "{error}");
    assert_eq!(tap.link(), Link::Gone);
    run("ip link del pctless");
    run("ip tuntap add pctless mode tap multi_queue");
    assert!(tap.reattach().unwrap());
    run("ip link del pctless");
}

#[test]
fn new_tap_that_another_process_has_is_refused_once_it_is_up() {
    run("ip tuntap add pctbusy mode tap");
    let mut tap = Tap::open("pctbusy", 1, None).unwrap();
    run("ip link del pctbusy");
    run("ip tuntap add pctbusy mode tap");
    let other = Tap::open("pctbusy", 1, None).unwrap();
    assert!(!tap.reattach().unwrap(), "it is down");
    run("ip link set pctbusy up");
    let error = tap.reattach().unwrap_err();
    assert!(matches!(error, TapError::Busy(_)), "{error}");
    drop(other);
    assert!(tap.reattach().unwrap());
    run("ip link del pctbusy");
}

#[test]
fn kinds_of_taps_are_distinguished() {
    run("ip tuntap add pctsingle mode tap");
    run("ip tuntap add pcttun mode tun");
    let error = Tap::open("pctsingle", 2, None).unwrap_err();
    assert!(matches!(error, TapError::OneQueue { .. }), "{error}");
    let error = Tap::open("pcttun", 1, None).unwrap_err();
    assert!(matches!(error, TapError::NotATap(_)), "{error}");
    let first = Tap::open("pctsingle", 1, None).unwrap();
    let error = Tap::open("pctsingle", 1, None).unwrap_err();
    assert!(matches!(error, TapError::Busy(_)), "{error}");
    drop(first);
    Tap::open("pctsingle", 1, None).unwrap();
    run("ip link del pctsingle");
    run("ip link del pcttun");
}

#[test]
fn created_tap_is_up_and_is_removed() {
    let tap = Tap::open("pctmade", 2, Some(9000)).unwrap();
    wait_for_link(&tap, Link::Up);
    let mtu = std::fs::read_to_string("/sys/class/net/pctmade/mtu").unwrap();
    assert_eq!(mtu.trim(), "9000");
    drop(tap);
    assert!(!std::fs::exists("/sys/class/net/pctmade").unwrap());
}
