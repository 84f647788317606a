//! What tests came to: counts, failures, and what was left out.

use std::time::{Duration, Instant};

use anyhow::{Error, Result};

/// How many of the tests that took longest are reported.
const LONGEST: usize = 12;

/// Prints the title of a part of the report.
pub fn title(text: &str) {
    println!("\n== {text}");
}

/// What has been counted so far.
#[derive(Default, Debug, PartialEq)]
pub struct Tally {
    /// Tests and checks that passed.
    pub passed: u32,
    /// Tests and checks that failed.
    pub failed: u32,
    /// Boots, and starts of the emulated host, that were tried again.
    pub retries: u32,
    /// Names of what failed.
    pub failures: Vec<String>,
    /// What was not done, and why.
    pub left_out: Vec<String>,
    /// Names of the tests that were heard of one by one, and what they took.
    pub durations: Vec<(Duration, String)>,
}

impl Tally {
    /// Adds the counts of another part.
    pub fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.retries += other.retries;
        self.failures.extend(other.failures);
        self.left_out.extend(other.left_out);
        self.durations.extend(other.durations);
    }

    /// The tests that took longest, the longest first.
    pub fn longest(&self) -> Vec<&(Duration, String)> {
        let mut durations: Vec<_> = self.durations.iter().collect();
        durations.sort_by(|one, other| other.cmp(one));
        durations.truncate(LONGEST);
        durations
    }

    /// Counts a failure.
    pub fn fail(&mut self, what: String) {
        self.failed += 1;
        self.failures.push(what);
    }

    /// Counts an error as the failure of `what`, and prints it.
    pub fn fail_by(&mut self, what: &str, error: &Error) {
        eprintln!("xtask: {what}: {error:#}");
        self.fail(what.to_owned());
    }

    /// Records what cannot be done here.
    pub fn leave_out(&mut self, what: String) {
        println!("left out: {what}");
        self.left_out.push(what);
    }

    /// Counts one check by its result.
    pub fn count(&mut self, what: &str, worked: Result<bool>) {
        match worked {
            Ok(true) => self.passed += 1,
            Ok(false) => self.fail(what.to_owned()),
            Err(error) => self.fail_by(what, &error),
        }
    }
}

/// Counts what test programs say about themselves.
#[derive(Default)]
pub struct Listener {
    tally: Tally,
    program: String,
    failures_before: u32,
    /// The test that runs, and since when.
    running: Option<(Instant, String)>,
    /// Programs that have ended.
    pub ended: usize,
}

impl Listener {
    /// Receives a line of a program's output.
    pub fn line(&mut self, line: &str) {
        self.note_duration(line);
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.tally.passed += count_of(counts, "passed");
            self.tally.failed += count_of(counts, "failed");
        } else if let Some(rest) = line.strip_prefix("---- ")
            && let Some(name) = rest.strip_suffix(" stdout ----")
        {
            // The line of the result itself may be in pieces: tests say what they do.
            self.tally.failures.push(format!("{name} {}", self.program));
        } else if let Some(rest) = line.strip_prefix("== ") {
            if let Some(status) = rest.strip_prefix("status ") {
                self.ended += 1;
                if status != "0" && self.tally.failed == self.failures_before {
                    self.tally
                        .fail(format!("{}: ended with {status}", self.program));
                }
            } else if rest.starts_with("retry ") {
                self.tally.retries += 1;
            } else {
                self.program = format!("({rest})");
                self.failures_before = self.tally.failed;
            }
        }
    }

    /// A test's name is printed when the test begins; the end of its line, when it ends, may be
    /// a line of its own.
    fn note_duration(&mut self, line: &str) {
        let begins = line.starts_with("test ") && line.contains(" ...");
        if !begins && !line.starts_with("test result: ") {
            return;
        }
        if let Some((since, name)) = self.running.take() {
            self.tally.durations.push((since.elapsed(), name));
        }
        if let Some(name) = line.split_whitespace().nth(1).filter(|_| begins) {
            self.running = Some((Instant::now(), format!("{name} {}", self.program)));
        }
    }

    /// The counts of all lines.
    pub fn finish(self) -> Tally {
        self.tally
    }
}

/// The number before `word` in `ok. 3 passed; 0 failed; …`.
fn count_of(text: &str, word: &str) -> u32 {
    let before = text.split_once(word).map_or("", |(before, _)| before);
    before
        .split_whitespace()
        .last()
        .and_then(|number| number.parse().ok())
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(lines: &str) -> Tally {
        let mut listener = Listener::default();
        lines.lines().for_each(|line| listener.line(line));
        listener.finish()
    }

    #[test]
    fn results_of_several_programs_add_up() {
        let tally = heard(
            "== boot on x86_64\ntest power_off ... ok\ntest reset ... \n--- a part\nFAILED\n\
             ---- reset stdout ----\n\
             test result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured\n== status 101\n\
             == net on x86_64\ntest result: ok. 4 passed; 0 failed; 0 ignored\n== status 0\n\
             == retry ping: boot 1: time is up",
        );
        assert_eq!((tally.passed, tally.failed, tally.retries), (5, 1, 1));
        assert_eq!(tally.failures, ["reset (boot on x86_64)"]);
    }

    #[test]
    fn each_test_has_a_duration() {
        let tally = heard(
            "== boot on x86_64\ntest power_off ... ok\ntest reset ... \n--- a part\nok\n\
             test result: ok. 2 passed; 0 failed\n== status 0",
        );
        let names: Vec<_> = tally.durations.iter().map(|(_, name)| name).collect();
        assert_eq!(
            names,
            ["power_off (boot on x86_64)", "reset (boot on x86_64)"]
        );
    }

    #[test]
    fn a_program_that_dies_without_a_result_counts_as_a_failure() {
        let tally = heard("== boot on x86_64\ntest power_off ...\n== status 137");
        assert_eq!((tally.passed, tally.failed), (0, 1));
    }

    #[test]
    fn a_check_that_cannot_be_made_is_a_failure_and_hides_no_other() {
        let mut tally = Tally::default();
        tally.count("lints", Err(Error::msg("no compiler")));
        tally.count("formatting", Ok(false));
        tally.count("links", Ok(true));
        assert_eq!((tally.passed, tally.failed), (1, 2));
        assert_eq!(tally.failures, ["lints", "formatting"]);
    }
}
