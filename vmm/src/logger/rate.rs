//! Limits the lines that each call site may log.
//!
//! A guest can cause some lines at any rate. Each call site has its own bucket,
//! so that a flood of one line leaves the others alone. The number of buckets
//! is bounded by the call sites in the program.

use std::collections::BTreeMap;
use std::time::Duration;

/// Lines that a call site may log at once.
const BURST: u32 = 50;
/// Time after which one more line is permitted, after a burst.
const PER_LINE: Duration = Duration::from_secs(1);

/// A place in the source: file and line.
pub(super) type CallSite = (&'static str, u32);

#[derive(Debug)]
struct Bucket {
    lines: u32,
    filled: Duration,
    left_out: u64,
}

/// The buckets of all call sites that logged a line.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    buckets: BTreeMap<CallSite, Bucket>,
}

impl Limiter {
    /// Returns whether `site` may write a line at `now`, a time since any fixed
    /// moment: if so, the number of its lines omitted since the last written
    /// one.
    pub(super) fn admit(&mut self, site: CallSite, now: Duration) -> Option<u64> {
        let bucket = self.buckets.entry(site).or_insert(Bucket {
            lines: BURST,
            filled: now,
            left_out: 0,
        });
        let passed = now.saturating_sub(bucket.filled);
        let earned = u32::try_from(passed.as_secs() / PER_LINE.as_secs()).unwrap_or(u32::MAX);
        if earned != 0 {
            bucket.lines = bucket.lines.saturating_add(earned).min(BURST);
            bucket.filled += PER_LINE * earned;
        }
        match bucket.lines.checked_sub(1) {
            Some(lines) => {
                bucket.lines = lines;
                Some(std::mem::take(&mut bucket.left_out))
            }
            None => {
                bucket.left_out = bucket.left_out.saturating_add(1);
                None
            }
        }
    }

    /// Returns the call sites whose last lines were omitted, with their
    /// numbers.
    pub(super) fn take_left_out(&mut self) -> Vec<(CallSite, u64)> {
        let silent = self.buckets.iter_mut().filter(|it| it.1.left_out != 0);
        silent
            .map(|(&site, bucket)| (site, std::mem::take(&mut bucket.left_out)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: CallSite = ("here.rs", 1);

    #[test]
    fn flood_is_a_burst_and_then_a_line_a_second_with_the_number_omitted() {
        let mut limiter = Limiter::default();
        let mut written = 0;
        let mut left_out = 0;
        // 1000 lines a second, for 10 seconds.
        for millisecond in 0..10_000 {
            if let Some(count) = limiter.admit(HERE, Duration::from_millis(millisecond)) {
                written += 1;
                left_out += count;
            }
        }
        assert_eq!(written, u64::from(BURST) + 9);
        let rest = limiter.take_left_out();
        let [(HERE, rest)] = rest[..] else {
            panic!("{rest:?}");
        };
        assert_eq!(written + left_out + rest, 10_000);
        assert!(limiter.take_left_out().is_empty());
    }

    #[test]
    fn other_call_sites_and_later_times_are_not_limited() {
        let mut limiter = Limiter::default();
        let start = Duration::from_secs(5);
        while limiter.admit(HERE, start).is_some() {}
        assert_eq!(limiter.admit(("here.rs", 2), start), Some(0));
        let later = start + PER_LINE * BURST;
        assert_eq!(limiter.admit(HERE, later), Some(1));
        for _ in 1..BURST {
            assert_eq!(limiter.admit(HERE, later), Some(0));
        }
        assert_eq!(limiter.admit(HERE, later), None);
        // Time that goes back counts as zero.
        assert_eq!(limiter.admit(HERE, Duration::ZERO), None);
    }
}
