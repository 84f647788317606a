use super::*;
use clap::CommandFactory;
use vmm::config::{Argument, Drive, Iommu, NetworkInterface, Serial, Vsock};

fn help(command: &str) -> String {
    let mut cli = Cli::command();
    let command = cli.find_subcommand_mut(command).unwrap();
    command.render_long_help().to_string()
}

/// Returns the one line with which a command line is refused.
fn refusal(line: &str) -> String {
    let words = std::iter::once("portcullis").chain(line.split(' '));
    usage::refusal(&Cli::try_parse_from(words).unwrap_err())
}

#[test]
fn the_command_line_is_well_formed() {
    Cli::command().debug_assert();
}

#[test]
fn the_help_of_run_shows_every_key() {
    let help = help("run");
    let lines: Vec<&str> = help.lines().map(str::trim).collect();
    for keys in [
        Drive::help(),
        NetworkInterface::help(),
        Vsock::help(),
        Serial::help(),
        Iommu::help(),
    ] {
        for key in keys.lines().map(str::trim).filter(|key| !key.is_empty()) {
            assert!(lines.contains(&key), "no {key:?} in {help}");
        }
    }
    assert!(help.contains("3  the guest reset"));
}

#[test]
fn the_help_of_ctl_shows_requests_and_statuses() {
    let help = help("ctl");
    for part in [
        "METHOD PATH [JSON]",
        "3  no machine answers",
        "PORTCULLIS_API_SOCKET",
    ] {
        assert!(help.contains(part), "no {part:?} in {help}");
    }
}

#[test]
fn command_lines_are_refused_in_one_line_with_the_fix() {
    for (line, words) in [
        ("chek", vec!["'chek'", "'check'"]),
        ("run --kernl k", vec!["'--kernl'", "'--kernel'"]),
        ("run --cpus 300", vec!["--cpus", "300", "use 1 to 32"]),
        ("run --cpus -1", vec!["--cpus", "use 1 to 32"]),
        ("frob", vec!["'frob'", "see --help"]),
        ("run --rng yes", vec!["'yes'", "see --help"]),
        (
            "ctl --api-socket s iommu --interval 0",
            vec!["--interval", "use 1 to 3600"],
        ),
        (
            "run --net tap=waytoolongtapname",
            vec!["--net", "1 to 15 bytes"],
        ),
        ("run --cpus 0", vec!["--cpus", "use 1 to 32"]),
        ("run --memory 1.5G", vec!["--memory", "1.5G", "such as 2G"]),
        ("run --memory 500000", vec!["--memory", "use 64 to", "MiB"]),
        ("run --disk disk.img", vec!["--disk", "use path=disk.img"]),
        ("run --net tap0", vec!["--net", "use tap=tap0"]),
        ("run --vsock 3", vec!["--vsock", "use cid=3"]),
        (
            "run --iommu smmu",
            vec!["--iommu", "none, virtio-iommu or smmuv3"],
        ),
        (
            "run --log-level loud",
            vec!["--log-level", "use Off, Error"],
        ),
        ("run --kernel", vec!["--kernel", "value is required"]),
        ("run k", vec!["unexpected argument 'k'"]),
        ("serve", vec!["--api-socket <PATH>"]),
        ("check", vec!["--config <FILE>"]),
        ("ctl --api-socket s", vec!["requires a subcommand"]),
    ] {
        let text = refusal(line);
        assert_eq!(text.lines().count(), 1, "{line}: {text}");
        assert!(
            !text.contains("Usage") && !text.contains("error:"),
            "{text}"
        );
        for word in words {
            assert!(text.contains(word), "{line}: no {word:?} in {text}");
        }
    }
    let odd = refusal("run --cpus \u{1b}[2J");
    assert!(!odd.contains('\u{1b}'), "{odd}");
}
