//! The serial console on a terminal and on a pipe.
//!
//! On aarch64 the tests of code that is the same on both architectures are long ones: an emulated
//! host needs a millisecond for each byte of a console.

mod support;

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use support::{Guest, Machine, PROMPT, READY, TempDir, eventually, pipe};

/// Boots on a terminal, as a user does.
fn boot_on_terminal(machine: &Machine) -> Guest {
    let arguments = machine.arguments();
    let launch = || Guest::launch_on_terminal(&support::portcullis(), &arguments);
    let mut guest = machine.boot_by(launch);
    guest.quieten();
    guest
}

#[test]
fn a_session_is_typed_on_a_terminal_and_ctrl_a_x_leaves_it() {
    let before = support::Pty::open().expect("a terminal").mode();
    let mut guest = boot_on_terminal(&Machine::new());
    assert!(guest.terminal().mode().is_raw());
    assert_eq!(guest.run("echo typed | tr a-z A-Z"), "TYPED");
    guest.type_text("\x01x").expect_exit(0);
    assert_eq!(guest.terminal().mode(), before);
}

#[test]
fn keys_that_make_signals_and_flow_control_elsewhere_reach_the_guest() {
    let mut guest = boot_on_terminal(&Machine::new());
    // Ctrl-c: the program that repeats a line runs, and ends.
    guest.type_line("echo up-$((1 + 1)); cat").wait_for("up-2");
    guest
        .type_line("repeat me")
        .wait_for("repeat me")
        .wait_for("repeat me");
    guest.type_text("\x03").wait_for("^C").wait_for(PROMPT);
    // Ctrl-a for the guest, Ctrl-s, Ctrl-q, Ctrl-v and carriage return. All on one line: at its
    // prompt the shell sets the terminal's mode itself.
    guest
        .type_line("stty raw -echo; echo raw-$((1 + 1)); head -c 7 | od -An -tx1; stty sane")
        .wait_for("raw-2");
    guest.type_text("\x01\x01\x13\x11\x16\x1a\r\n");
    guest.wait_for("01 13 11 16 1a 0d 0a");
    guest.type_text("\x01x").expect_exit(0);
}

/// The terminal's mode is restored after each kind of ending.
#[track_caller]
fn gives_the_terminal_back_on(signal: &str) {
    let mut guest = boot_on_terminal(&Machine::new());
    assert!(guest.terminal().mode().is_raw());
    guest.signal(signal).expect_exit(0);
    assert!(guest.terminal().mode().is_cooked(), "after SIG{signal}");
}

#[test]
#[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
fn the_terminal_is_given_back_on_sigterm() {
    gives_the_terminal_back_on("TERM");
}

#[test]
#[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
fn the_terminal_is_given_back_on_sighup() {
    gives_the_terminal_back_on("HUP");
}

#[test]
#[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
fn the_terminal_is_given_back_on_sigint() {
    gives_the_terminal_back_on("INT");
}

#[test]
#[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
fn the_terminal_is_given_back_when_the_guest_resets() {
    let mut guest = boot_on_terminal(&Machine::new());
    guest.type_line("reboot -f").expect_exit(3);
    assert!(guest.terminal().mode().is_cooked());
}

#[test]
#[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
fn the_terminal_is_given_back_while_stopped_and_taken_again() {
    let mut guest = boot_on_terminal(&Machine::new());
    // A terminal's Ctrl-z has the same effect; the guest receives that key.
    guest.signal("TSTP");
    eventually("cooked", || guest.terminal().mode().is_cooked());
    guest.signal("CONT");
    eventually("raw", || guest.terminal().mode().is_raw());
    assert_eq!(guest.run("echo still here"), "still here");
    guest.type_text("\x01x").expect_exit(0);
}

#[test]
#[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
fn a_job_in_the_background_runs_on_and_leaves_the_terminal_alone() {
    // A shell with job control on a terminal that stops background output, and
    // then brings the machine to the foreground.
    let script = format!(
        "set -m; stty tostop; {} {} & jobs; read word; echo \"shell read $word\"; fg",
        support::portcullis().display(),
        quoted(&Machine::new().arguments())
    );
    let machine = Machine::new();
    let launch = || Guest::launch_on_terminal(Path::new("/bin/sh"), &["-c", &script]);
    let mut guest = machine.boot_by(launch);
    assert!(guest.terminal().mode().is_cooked());
    // Keys now go to the shell.
    guest.type_line("hello").wait_for("shell read hello");
    eventually("raw", || guest.terminal().mode().is_raw());
    assert_eq!(guest.run("echo in front"), "in front");
    guest.type_text("\x01x").expect_exit(0);
    assert!(guest.terminal().mode().is_cooked());
}

/// Quotes the arguments for a shell.
fn quoted(arguments: &[String]) -> String {
    let quote = |argument: &String| format!("'{argument}'");
    arguments.iter().map(quote).collect::<Vec<_>>().join(" ")
}

#[test]
fn a_line_typed_before_the_guest_is_up_arrives_whole() {
    let machine = Machine::new();
    let mut guest = machine.boot_by(|| {
        let mut guest = machine.launch();
        guest.type_line("echo early-$((40 + 2))-bird");
        guest
    });
    guest.wait_for("early-42-bird");
    guest.type_line("poweroff -f").expect_exit(0);
}

#[test]
fn a_large_paste_arrives_whole() {
    let mut guest = Machine::new().boot();
    let lines = (0..200).map(|n| format!("{n:04} the quick brown fox jumps over the lazy dog\n"));
    let paste: String = lines.collect();
    guest.run("stty -echo");
    guest.type_line("cat > /tmp/paste; echo cat ended");
    guest
        .type_text(&paste)
        .type_text("\x04")
        .wait_for("cat ended");
    assert_eq!(guest.run("wc -c < /tmp/paste"), paste.len().to_string());
    let expected = "i=0; while [ $i -lt 200 ]; do \
                    printf '%04d the quick brown fox jumps over the lazy dog\\n' $i; \
                    i=$((i+1)); done | cmp - /tmp/paste";
    guest.run(expected);
    guest.type_line("poweroff -f").expect_exit(0);
}

#[test]
fn a_paste_out_of_step_with_the_fifo_arrives_whole() {
    let mut guest = Machine::new().boot();
    let lines = (0..200).map(|n| format!("{n:04} pack my box with five dozen liquor jugs\n"));
    let paste: String = lines.collect();
    guest.run("stty -echo");
    guest.type_line("echo li''stening; cat > /tmp/paste; echo cat ended");
    guest.wait_for("listening");
    // Each piece enters the FIFO by itself if the guest has read the previous one, and the rest
    // does not begin at a FIFO's start.
    let (by_hand, rest) = paste.split_at(550);
    for start in (0..by_hand.len()).step_by(11) {
        guest.type_text(&by_hand[start..start + 11]);
        sleep(Duration::from_millis(1));
    }
    guest
        .type_text(rest)
        .type_text("\x04")
        .wait_for("cat ended");
    assert_eq!(guest.run("wc -c < /tmp/paste"), paste.len().to_string());
    guest.type_line("poweroff -f").expect_exit(0);
}

#[test]
#[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
fn a_machine_with_nothing_on_standard_input_runs_to_its_end() {
    let machine = Machine::new().cmdline("guest.run=\"echo alone; poweroff -f\"");
    let mut command = Command::new(support::portcullis());
    command.args(machine.arguments()).stdin(Stdio::null());
    let mut guest = Guest::launch_command(command);
    guest.wait_for("alone").expect_exit(0);
}

#[test]
#[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
fn a_machine_with_standard_input_closed_runs_to_its_end() {
    let machine = Machine::new().cmdline("guest.run=\"echo alone; poweroff -f\"");
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "exec \"$@\" <&-", "sh"]);
    command.arg(support::portcullis()).args(machine.arguments());
    let mut guest = Guest::launch_command(command);
    guest.wait_for("alone").expect_exit(0);
}

#[test]
#[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
fn the_end_of_standard_input_ends_nothing() {
    let mut guest = Machine::new().boot();
    guest.type_line("sleep 1; echo after; poweroff -f");
    guest.close_keyboard().wait_for("after").expect_exit(0);
}

#[test]
#[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
fn a_file_on_standard_input_is_typed_whole() {
    let files = TempDir::new("typed");
    let script = files.file("script", b"echo from-$((1 + 1))-files\npoweroff -f\n");
    let mut command = Command::new(support::portcullis());
    command.args(Machine::new().arguments());
    command.stdin(std::fs::File::open(script).expect("it was just made"));
    let mut guest = Guest::launch_command(command);
    guest
        .wait_for(READY)
        .wait_for("from-2-files")
        .expect_exit(0);
}

#[test]
#[cfg_attr(target_arch = "aarch64", ignore = "long: cargo xtask test --long")]
fn a_reader_that_stops_blocks_only_the_console() {
    let files = TempDir::new("slow");
    let socket = files.path("api");
    // The reader reads nothing until a file exists.
    let go = files.path("go");
    let machine = Machine::new()
        .cmdline("guest.run=\"seq 16000; echo all of it; poweroff -f\"")
        .with("--api-socket", &socket);
    // The shell's standard input is the pipe; opened for writing, it is the other end.
    let script = format!(
        "exec 3<&0; {{ \"$@\" >/proc/self/fd/3 </dev/null 3<&-; echo status $? >&2; }} & \
         exec 3<&-; while ! [ -e {go} ]; do sleep 0.1; done; cat; wait"
    );
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", &script, "sh"])
        .arg(support::portcullis())
        .args(machine.arguments())
        .stdin(pipe::of_one_page());
    let mut guest = Guest::launch_command(command);

    let ctl = |words: &[&str]| {
        let mut command = Command::new(support::portcullis());
        command.args(["ctl", "--api-socket", &socket]).args(words);
        support::run_to_end(&mut command)
    };
    let transmitted = || {
        let metrics = ctl(&["metrics"]).stdout;
        let line = metrics
            .lines()
            .find(|l| l.starts_with("portcullis_serial_transmitted"));
        let count = line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok());
        count.unwrap_or(0)
    };
    // More and more is transmitted, until the guest waits for its console.
    let mut last = 0;
    eventually("a full buffer", || {
        std::thread::sleep(std::time::Duration::from_secs(2));
        let now = transmitted();
        now >= 64 * 1024 && now == std::mem::replace(&mut last, now)
    });
    // The contents of a buffer, a pipe, and a write between them.
    assert!(last <= 80 * 1024, "{last} bytes were buffered");
    for words in [["pause"], ["resume"], ["info"]] {
        let output = ctl(&words);
        assert_eq!(output.status, Some(0), "{words:?}: {output:?}");
    }
    std::fs::write(&go, "").expect("a file can be made");
    guest.wait_for("all of it");
    guest.expect_exit(0);
    assert!(guest.log().contains("status 0"), "{}", guest.log());
    // The guest waited, and no byte was lost.
    let output = guest.console_output().replace('\r', "");
    let expected: String = (1..=16_000).map(|n| format!("{n}\n")).collect();
    assert!(output.contains(&expected), "{} bytes arrived", output.len());
}
