//! A running lab: its output, its progress, its end.

use std::fs;
use std::io::{Read, Write, stdout};
use std::path::{Path, PathBuf};
use std::process::{Child, ExitStatus};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::job::Job;
use crate::slowness;

/// Timeout of one wait for output.
const PAUSE: Duration = Duration::from_millis(50);

/// The emulated host that runs a job.
pub struct Watch<'a> {
    job: &'a Job,
    qemu: Child,
    /// Directory of the host's status files.
    dir: PathBuf,
    started: Instant,
    last_output: Instant,
    up: bool,
    /// Slowness of the host's start, at least 1; 1 while it is not known.
    slowness: f64,
    /// Seconds of processor time that QEMU has used.
    cpu_seconds: f64,
}

impl<'a> Watch<'a> {
    /// Watches `qemu`, which starts now.
    pub fn new(job: &'a Job, qemu: Child, dir: &Path) -> Self {
        Self {
            job,
            qemu,
            dir: dir.to_owned(),
            started: Instant::now(),
            last_output: Instant::now(),
            up: false,
            slowness: 1.0,
            cpu_seconds: 0.0,
        }
    }

    /// Passes output on until QEMU ends. Ends QEMU at the time limit (`None`). An error if the host
    /// falls silent.
    pub fn wait(mut self, on_line: &mut dyn FnMut(&str)) -> Result<Option<ExitStatus>> {
        let output = self.forward();
        let mut shown = Output {
            label: &self.job.label,
            to: stdout(),
            line: Vec::new(),
            on_line,
        };
        loop {
            match output.recv_timeout(PAUSE) {
                Ok(chunk) => {
                    self.last_output = Instant::now();
                    shown.write(&chunk)?;
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => thread::sleep(PAUSE),
            }
            self.read_status();
            self.read_cpu_time();
            let ended = self.qemu.try_wait()?;
            let late = self.started.elapsed() > self.limit(self.job.timeout);
            if ended.is_none() && (late || self.is_silent()) {
                self.qemu.kill()?;
                self.qemu.wait()?;
            }
            if ended.is_some() || late {
                for chunk in output {
                    shown.write(&chunk)?;
                }
                if !shown.line.is_empty() {
                    shown.end()?;
                }
                self.job.say(&format!(
                    "{:.0} s, of them {:.0} s of processor time",
                    self.started.elapsed().as_secs_f32(),
                    self.cpu_seconds
                ));
                return Ok(ended);
            }
            if self.is_silent() {
                bail!(
                    "the emulated host said nothing for {} s",
                    self.last_output.elapsed().as_secs()
                );
            }
        }
    }

    /// Extends a limit of the job for a host as slow as this one.
    fn limit(&self, limit: Duration) -> Duration {
        if self.job.scaled {
            slowness::scaled(limit, self.slowness)
        } else {
            limit
        }
    }

    fn is_silent(&self) -> bool {
        let limit = self.job.silence.map(|limit| self.limit(limit));
        limit.is_some_and(|limit| self.last_output.elapsed() > limit)
    }

    /// Reads the progress of the host.
    fn read_status(&mut self) {
        if self.up {
            return;
        }
        let text = fs::read_to_string(self.dir.join("status")).unwrap_or_default();
        // The line may be incomplete.
        let started = text
            .split_inclusive('\n')
            .find_map(|line| line.strip_prefix("started ")?.strip_suffix('\n'));
        if let Some(seconds) = started.and_then(|seconds| seconds.trim().parse().ok()) {
            self.up = true;
            self.slowness = slowness::of_start(seconds);
            self.job.say(&format!(
                "up after {:.1} s",
                self.started.elapsed().as_secs_f32()
            ));
        }
    }

    /// Reads QEMU's processor time (proc(5): `utime` and `stime`, in 1/100 s).
    fn read_cpu_time(&mut self) {
        let path = format!("/proc/{}/stat", self.qemu.id());
        let text = fs::read_to_string(path).unwrap_or_default();
        let fields = text.rsplit_once(") ").map_or("", |(_, fields)| fields);
        let ticks: f64 = fields
            .split(' ')
            .skip(11)
            .take(2)
            .filter_map(|ticks| ticks.parse::<f64>().ok())
            .sum();
        self.cpu_seconds = self.cpu_seconds.max(ticks / 100.0);
    }

    /// Reads the standard output of QEMU, if it is a pipe, in a thread.
    fn forward(&mut self) -> Receiver<Vec<u8>> {
        let (sender, receiver) = mpsc::channel();
        if let Some(mut output) = self.qemu.stdout.take() {
            thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = output.read(&mut buffer) {
                    if sender.send(buffer[..length].to_vec()).is_err() {
                        break;
                    }
                }
            });
        }
        receiver
    }
}

/// Output of a job, passed to standard output: as it arrives, or in lines with a label.
struct Output<'a, W> {
    label: &'a str,
    to: W,
    line: Vec<u8>,
    on_line: &'a mut dyn FnMut(&str),
}

impl<W: Write> Output<'_, W> {
    fn write(&mut self, chunk: &[u8]) -> Result<()> {
        if self.label.is_empty() {
            self.to.write_all(chunk)?;
            self.to.flush()?;
        }
        for byte in chunk {
            if *byte == b'\n' {
                self.end()?;
            } else {
                self.line.push(*byte);
            }
        }
        Ok(())
    }

    /// Ends the current line.
    fn end(&mut self) -> Result<()> {
        let line = std::mem::take(&mut self.line);
        let text = String::from_utf8_lossy(&line);
        if !self.label.is_empty() {
            writeln!(self.to, "{}{}", self.label, text.trim_end())?;
        }
        (self.on_line)(text.trim_end());
        Ok(())
    }
}

/// Exit status of the job, once it has ended.
pub fn exit_status(dir: &Path) -> Option<u8> {
    let text = fs::read_to_string(dir.join("status")).ok()?;
    text.lines()
        .find_map(|line| line.strip_prefix("exit "))?
        .trim()
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_labelled_line_is_passed_on_whole_and_without_its_label() {
        let mut lines = Vec::new();
        let mut on_line = |line: &str| lines.push(line.to_owned());
        let mut output = Output {
            label: "[x86_64] ",
            to: Vec::new(),
            line: Vec::new(),
            on_line: &mut on_line,
        };
        for chunk in ["test res", "ult: ok\r\n== sta", "tus 0\n== "] {
            output.write(chunk.as_bytes()).unwrap();
        }
        let shown = String::from_utf8(output.to).unwrap();
        assert_eq!(shown, "[x86_64] test result: ok\n[x86_64] == status 0\n");
        assert_eq!(lines, ["test result: ok", "== status 0"]);
    }

    #[test]
    fn a_host_that_starts_slower_has_more_time_up_to_a_bound() {
        let limit = Duration::from_secs(100);
        let of_start = |seconds| slowness::scaled(limit, slowness::of_start(seconds)).as_secs();
        assert_eq!([0.0, 3.0, 6.0].map(of_start), [100, 100, 100]);
        assert_eq!([9.0, 12.0, 36.0].map(of_start), [150, 200, 600]);
        assert_eq!([60.0, f64::INFINITY].map(of_start), [600, 600]);
        assert_eq!(of_start(f64::NAN), 100);
    }

    #[test]
    fn computations_that_are_interrupted_tell_how_slow_the_host_is() {
        let of = |times: &[u64]| {
            let times: Vec<_> = times.iter().map(|ms| Duration::from_millis(*ms)).collect();
            slowness::of_computations(&times)
        };
        assert!((of(&[2, 2, 2]) - 1.0).abs() < 1e-9);
        assert!((of(&[2, 2, 14, 2]) - 2.5).abs() < 1e-9);
        assert!((of(&[1, 99]) - 6.0).abs() < 1e-9, "bounded");
        assert!((of(&[]) - 1.0).abs() < 1e-9);
    }
}
