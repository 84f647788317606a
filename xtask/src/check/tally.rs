//! Results of tests: counts, failures and omissions.

use std::time::{Duration, Instant};

use anyhow::{Error, Result};

/// Number of the longest tests in the report.
const LONGEST: usize = 12;
/// Shortest duration that is reported.
const LONG: Duration = Duration::from_secs(5);

/// Prints the title of a part of the report.
pub fn title(text: &str) {
    println!("\n== {text}");
}

/// Counts of the tests and checks so far.
#[derive(Default, Debug, PartialEq)]
pub struct Tally {
    /// Tests and checks that passed.
    pub passed: u32,
    /// Tests and checks that failed.
    pub failed: u32,
    /// Repeated boots, and repeated starts of the emulated host.
    pub retries: u32,
    /// Names of the failed tests and checks.
    pub failures: Vec<String>,
    /// Omitted checks, with the reasons.
    pub left_out: Vec<String>,
    /// Names and durations of the tests that were reported one by one.
    pub durations: Vec<(Duration, String)>,
}

impl Tally {
    /// Adds the counts of another tally.
    pub fn add(&mut self, other: Tally) {
        self.passed += other.passed;
        self.failed += other.failed;
        self.retries += other.retries;
        self.failures.extend(other.failures);
        self.left_out.extend(other.left_out);
        self.durations.extend(other.durations);
    }

    /// The longest tests, in descending order.
    pub fn longest(&self) -> Vec<&(Duration, String)> {
        let mut durations: Vec<_> = self.durations.iter().collect();
        durations.retain(|(duration, _)| *duration >= LONG);
        durations.sort_by(|one, other| other.cmp(one));
        durations.truncate(LONGEST);
        durations
    }

    /// Counts a failure.
    pub fn fail(&mut self, what: String) {
        self.failed += 1;
        self.failures.push(what);
    }

    /// Counts and prints an error as the failure of `what`.
    pub fn fail_by(&mut self, what: &str, error: &Error) {
        eprintln!("xtask: {what}: {error:#}");
        self.fail(what.to_owned());
    }

    /// Records a check that this machine cannot run.
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

/// Counts the results in the output of test programs.
#[derive(Default)]
pub struct Listener {
    tally: Tally,
    program: String,
    failures_before: u32,
    /// The running test, and its start.
    running: Option<(Instant, String)>,
    /// Number of programs that have ended.
    pub ended: usize,
}

impl Listener {
    /// Receives a line of a program's output.
    pub fn line(&mut self, line: &str) {
        self.record_duration(line);
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.tally.passed += count_of(counts, "passed");
            self.tally.failed += count_of(counts, "failed");
        } else if let Some(rest) = line.strip_prefix("---- ")
            && let Some(name) = rest.strip_suffix(" stdout ----")
        {
            // Tests print between the pieces of the result's line.
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

    /// Records a test's duration. The name is printed when the test begins; the end of the line,
    /// when it ends, may be on its own line.
    fn record_duration(&mut self, line: &str) {
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

    /// Returns the counts of all lines.
    pub fn finish(self) -> Tally {
        self.tally
    }
}

/// The number left of `word` in `ok. 3 passed; 0 failed; …`.
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

    fn tally_of(lines: &str) -> Tally {
        let mut listener = Listener::default();
        lines.lines().for_each(|line| listener.line(line));
        listener.finish()
    }

    #[test]
    fn results_of_several_programs_add_up() {
        let tally = tally_of(
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
        let tally = tally_of(
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
        let tally = tally_of("== boot on x86_64\ntest power_off ...\n== status 137");
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
