//! Tests of the benchmark program's parsers.

#[path = "bench/parse.rs"]
mod parse;

use parse::{beyond_guest_ram, first_run_ms, histogram, hits, number, received, spread};

const TRACE: &str = "\
# tracer: nop
       <...>-700   [000] .....    40.000000: sched_process_exec: filename=/bin/ip pid=700 old_pid=700
       vcpu0-699   [000] d....    40.100000: kvm_entry: vcpu 0, rip 0xfff0
  portcullis-812   [000] .....    41.250000: sched_process_exec: filename=/bin/portcullis pid=812 old_pid=812
       vcpu 0-814  [001] d....    41.375500: kvm_entry: vcpu 0, rip 0x1000000
       vcpu 0-814  [001] d....    41.400000: kvm_entry: vcpu 0, rip 0x1000002
";

#[test]
fn the_first_entry_after_the_exec_counts() {
    let ms = first_run_ms(TRACE, "/bin/portcullis").unwrap();
    assert!((ms - 125.5).abs() < 1e-6, "{ms}");
}

#[test]
fn a_trace_without_the_exec_or_an_entry_says_nothing() {
    assert_eq!(first_run_ms(TRACE, "portcullis"), None);
    let (before_entry, _) = TRACE.split_once("       vcpu 0-814").unwrap();
    assert_eq!(first_run_ms(before_entry, "/bin/portcullis"), None);
}

const SMAPS: &str = "\
00400000-00500000 r-xp 00000000 fe:00 27 /bin/portcullis
Size:               1024 kB
Rss:                 800 kB
Pss:                 400 kB
Private_Clean:       300 kB
Private_Dirty:         8 kB
VmFlags: rd ex mr mw me
7f0000000000-7f0010000000 rw-p 00000000 00:00 0
Size:             262144 kB
Pss:               90000 kB
Private_Dirty:     90000 kB
7f0020000000-7f0020001000 rw-p 00000000 00:00 0 [heap]
Size:                  4 kB
Pss:                   4 kB
Private_Clean:         0 kB
Private_Dirty:         4 kB
";

#[test]
fn guest_ram_is_left_out_of_the_memory() {
    let resident = beyond_guest_ram(SMAPS, 262_144).unwrap();
    assert_eq!((resident.pss, resident.private), (404, 312));
}

#[test]
fn memory_without_guest_ram_is_no_measurement() {
    assert_eq!(beyond_guest_ram(SMAPS, 300_000), None);
    assert_eq!(beyond_guest_ram("", 1), None);
}

#[test]
fn the_median_is_in_the_middle() {
    assert_eq!(spread(vec![5.0, 1.0, 3.0]), Some([3.0, 1.0, 5.0]));
    assert_eq!(spread(vec![4.0, 1.0]), Some([2.5, 1.0, 4.0]));
    assert_eq!(spread(Vec::new()), None);
}

#[test]
fn numbers_have_no_empty_decimals() {
    assert_eq!([2.0, 2.25, 12_345.6].map(number), ["2", "2.2", "12346"]);
}

#[test]
fn the_receiver_of_a_transfer_counts() {
    let report = r#"{"end": {"sum_sent": {"bytes": 9000, "seconds": 1},
        "sum_received": {"bytes": 2800, "seconds": 0.5}}}"#;
    let received = received(report).unwrap();
    assert!((received.packets() - 2.0).abs() < 1e-9);
    assert!((received.megabits_per_second() - 0.0448).abs() < 1e-9);
    assert!((received.mebibytes() - 2800.0 / 1_048_576.0).abs() < 1e-9);
}

#[test]
fn a_transfer_without_data_is_no_measurement() {
    let nothing = r#"{"end": {"sum_received": {"bytes": 0, "seconds": 0.5}}}"#;
    assert_eq!(received(nothing), None);
    assert_eq!(received(r#"{"end": {}, "error": "idle"}"#), None);
    assert_eq!(received("iperf3: error"), None);
}

#[test]
fn a_probe_is_found_by_its_whole_name() {
    let profile = "  update_all    7    0\n  update    12    0\n";
    assert_eq!(hits(profile, "update"), Some(12.0));
    assert_eq!(hits(profile, "miss"), None);
}

#[test]
fn a_histogram_begins_with_its_greatest_entries() {
    let text = "# event histogram\n\n{ port:       80, rw:  1 } hitcount:          7\n\
                { port:      3f8, rw:  1 } hitcount:        208\n\nTotals:\n    Hits: 215\n";
    let entries = histogram(text);
    assert_eq!(entries[0], ("port: 3f8, rw: 1".to_owned(), 208.0));
    assert_eq!(entries[1].0, "port: 80, rw: 1");
    let many: String = (0..50)
        .map(|at| format!("{{ a: {at} }} hitcount: {at}\n"))
        .collect();
    let entries = histogram(&many);
    assert_eq!((entries.len(), entries[0].1), (10, 49.0));
}
