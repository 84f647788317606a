//! Stalled transactions (IHI 0070 §3.12.2).

use super::commands::Resume;
use super::events::Event;
use super::state::{Stalled, State};
use super::translate::{Asked, Failure};
use crate::{GuestRam, Request};

impl State {
    /// Counts a failure of `request` and records its event, or stalls the
    /// transaction, as its configuration says.
    pub(super) fn fail(&mut self, ram: &GuestRam, request: &Request, failure: &Failure) {
        let Some(event) = &failure.event else {
            return;
        };
        if let Some(stream) = self.streams.get_mut(&request.stream) {
            *stream.faults.entry(event.kind).or_default() += 1;
        }
        if failure.stall {
            self.stall(ram, event, request);
        } else if failure.record {
            self.record(ram, event, request);
        }
    }

    /// Stalls a transaction. A second one to the same page is not recorded
    /// (§3.12.2.1); one too many waits without a record.
    fn stall(&mut self, ram: &GuestRam, event: &Event, request: &Request) {
        let page = request.iova.0 >> 12;
        let known = self.stalled.values().any(|stalled| {
            (stalled.stream, stalled.substream) == (request.stream, request.substream)
                && stalled.iova.0 >> 12 == page
                && stalled.access == request.access
        });
        if known {
            return;
        }
        let Some(stag) = self.free_stags.pop_front() else {
            return;
        };
        // A record that is not written is not lost: no overflow (§7.4).
        let record = event.record(request, Some(stag));
        let recorded = self.push_event(ram, &record).is_ok();
        if recorded {
            self.count_event(event.kind);
        }
        self.stalled.insert(
            stag,
            Stalled {
                stream: request.stream,
                substream: request.substream,
                iova: request.iova,
                access: request.access,
                recorded,
            },
        );
    }

    /// Tries the stalled transactions without a record again, as if each had
    /// just come, while the event queue is writable (§3.12.2, §7.2.1): their
    /// records tell the configuration and the tables of now. Answers those that
    /// are not stalled any more, each with what its device does about it.
    pub(super) fn retry_unrecorded(&mut self, ram: &GuestRam) -> Vec<(Stalled, Resume)> {
        let unrecorded = self.stalled.iter().filter(|(_, stalled)| !stalled.recorded);
        let stags: Vec<u16> = unrecorded.map(|(stag, _)| *stag).collect();
        let mut ended = Vec::new();
        for stag in stags {
            if !self.events_writable() {
                break;
            }
            let Some(stalled) = self.stalled.remove(&stag) else {
                continue;
            };
            self.free_stags.push_back(stag);
            let request = Request {
                substream: stalled.substream,
                ..Request::untranslated(stalled.stream, stalled.iova, stalled.access)
            };
            let asked = Asked {
                request: &request,
                update: true,
            };
            match self.resolve(ram, asked) {
                Ok(_) => ended.push((stalled, Resume::Retry)),
                Err(failure) => {
                    self.fail(ram, &request, &failure);
                    if !failure.stall {
                        ended.push((stalled, Resume::Terminate));
                    }
                }
            }
        }
        ended
    }

    /// Takes out the stalled transactions that `which` selects.
    pub(super) fn unstall(&mut self, which: impl Fn(u16, &Stalled) -> bool) -> Vec<Stalled> {
        let stags: Vec<_> = self
            .stalled
            .iter()
            .filter(|(stag, stalled)| which(**stag, stalled))
            .map(|(stag, _)| *stag)
            .collect();
        self.free_stags.extend(&stags);
        stags
            .iter()
            .filter_map(|stag| self.stalled.remove(stag))
            .collect()
    }
}
