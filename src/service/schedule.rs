//! What the service begins by itself: reading everything within a time, the end of trash that is due, merging what
//! CloudStack has deleted.
//!
//! Time is cut into periods, and each has one job, with a key that is made of what it does and of the period's number:
//! however many instances look, and however often they are started, it is made once.

use std::fmt;
use std::time::{Duration, Instant};

use super::jobs::New;
use super::jobs::request::{Depth, JobRequest, ReclaimRequest, RecoverRequest, VerifyRequest};
use super::state::Service;
use super::view::now_ns;

/// Who makes these jobs, as records have it.
pub const MAKER: &str = "schedule";
/// How often it is looked whether something is due.
const TICK: Duration = Duration::from_secs(1);
/// When what could not be made is tried again.
const LATER: Duration = Duration::from_secs(30);
/// In so many parts everything is read; a part is at most a day.
const SLICES: u32 = 30;
const LONGEST_SLICE: Duration = Duration::from_hours(24);
const DAY_MINUTES: u64 = 24 * 60;

/// What becomes of members that CloudStack has deleted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reclaim {
    /// Nothing.
    #[default]
    Off,
    /// It is told what could be merged.
    Report,
    /// They are merged.
    Auto,
}

/// Hours of the day, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Window {
    /// The first minute of the day that belongs to it, and the first one that does not. The second may be before the
    /// first: then midnight is in it.
    start: u64,
    end: u64,
}

impl Window {
    /// Reads `01:00-05:00`.
    pub fn parse(text: &str) -> Result<Self, String> {
        let two = |text: &str| {
            (text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit()))
                .then(|| text.parse::<u64>().ok())
                .flatten()
        };
        let minute = |text: &str| {
            let (hours, minutes) = text.trim().split_once(':')?;
            let (hours, minutes) = (two(hours)?, two(minutes)?);
            (hours < 24 && minutes < 60).then_some(hours * 60 + minutes)
        };
        let parsed = text.split_once('-').and_then(|(start, end)| Some((minute(start)?, minute(end)?)));
        match parsed {
            Some((start, end)) if start != end => Ok(Self { start, end }),
            _ => Err(format!("{text:?} is no window like 01:00-05:00")),
        }
    }

    /// How many seconds are left of it, at that second since 1970; `None` outside.
    #[must_use]
    pub fn left(&self, seconds: u64) -> Option<u64> {
        let length = (self.end + DAY_MINUTES - self.start) % DAY_MINUTES * 60;
        let day = DAY_MINUTES * 60;
        let into = (seconds % day + day - self.start * 60) % day;
        (into < length).then(|| length - into)
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { start, end } = self;
        write!(f, "{:02}:{:02}-{:02}:{:02}", start / 60, start % 60, end / 60, end % 60)
    }
}

/// What is begun, and when. Zero is never.
#[derive(Clone, Debug, Default)]
pub struct Schedule {
    /// Every byte of adopted members is read within that time.
    pub verify_within: Duration,
    /// With so many bytes a second at most; 0 for no limit of its own.
    pub verify_rate: u64,
    /// How often what is due is ended.
    pub purge_every: Duration,
    /// What becomes of members that CloudStack has deleted.
    pub reclaim: Reclaim,
    /// How often its rows are looked at for that.
    pub reclaim_every: Duration,
    /// When merges may begin; at any time if there is none.
    pub window: Option<Window>,
}

/// One thing that is done again and again.
#[derive(Clone, Debug, PartialEq)]
struct Due {
    what: &'static str,
    every: Duration,
    request: JobRequest,
}

fn seconds(duration: Duration) -> u32 {
    u32::try_from(duration.as_secs()).unwrap_or(u32::MAX).max(1)
}

impl Schedule {
    /// What there is to do at that second since 1970.
    fn due(&self, now: u64, read_only: bool) -> Vec<Due> {
        let mut due = Vec::new();
        if !self.verify_within.is_zero() {
            let every = (self.verify_within / SLICES).clamp(TICK, LONGEST_SLICE);
            let request = JobRequest::Verify(VerifyRequest {
                level: Depth::Data,
                max_seconds: Some(seconds(every)),
                // What was read not long ago can wait; what is older comes in time.
                older_than_seconds: Some(u32::try_from(self.verify_within.as_secs() / 2).unwrap_or(u32::MAX)),
                rate_bytes_per_second: (self.verify_rate > 0).then_some(self.verify_rate),
                ..VerifyRequest::default()
            });
            due.push(Due { what: "verify", every, request });
        }
        if !self.purge_every.is_zero() && !read_only {
            let request = JobRequest::Recover(RecoverRequest::default());
            due.push(Due { what: "purge", every: self.purge_every.max(TICK), request });
        }
        let left = match self.window {
            Some(window) => window.left(now),
            None => Some(self.reclaim_every.as_secs()),
        };
        let wanted = match self.reclaim {
            Reclaim::Off => None,
            Reclaim::Report => Some((true, None)),
            Reclaim::Auto => left.filter(|_| !read_only).map(|left| (false, Some(left))),
        };
        if let Some((dry_run, left)) = wanted.filter(|_| !self.reclaim_every.is_zero()) {
            let max_seconds = left.map(|left| u32::try_from(left).unwrap_or(u32::MAX).max(1));
            let request = JobRequest::Reclaim(ReclaimRequest { dry_run, now: false, max_seconds });
            due.push(Due { what: "reclaim", every: self.reclaim_every.max(TICK), request });
        }
        due
    }
}

/// The number of the period.
fn period(now: u64, every: Duration) -> u64 {
    now / every.as_secs().max(1)
}

/// Makes jobs as they are due, until the service drains.
pub fn run(service: &Service) {
    // What was made, and what is put off.
    let mut made: Vec<(&'static str, u64)> = Vec::new();
    let mut not_before = Instant::now();
    while !service.jobs.is_stopped() {
        std::thread::sleep(TICK / 4);
        if Instant::now() < not_before {
            continue;
        }
        let now = u64::try_from(now_ns() / 1_000_000_000).unwrap_or_default();
        for due in service.config.schedule.due(now, service.config.read_only) {
            let number = period(now, due.every);
            if made.contains(&(due.what, number)) || is_on(service, due.request.kind()) {
                continue;
            }
            match make(service, &due, number) {
                Ok(()) => {
                    made.retain(|(what, _)| *what != due.what);
                    made.push((due.what, number));
                }
                Err(error) => {
                    tracing::warn!(what = due.what, code = error.code(), "not begun: {}", error.detail());
                    not_before = Instant::now() + LATER;
                }
            }
        }
    }
}

/// Whether the one before is not over yet.
fn is_on(service: &Service, kind: &str) -> bool {
    service.jobs.all().iter().any(|entry| {
        let record = &entry.record;
        record.made_by == MAKER && record.kind == kind && !record.state.is_over()
    })
}

fn make(service: &Service, due: &Due, number: u64) -> Result<(), super::problem::Problem> {
    let key = format!("{} every {} s, {number}", due.what, due.every.as_secs());
    let new = New { request: due.request.clone(), made_by: MAKER.to_owned(), key: Some(key) };
    match service.jobs.make(service, new) {
        Ok(made) if made.new => {
            tracing::info!(job = %made.entry.record.id, what = due.what, "the schedule began a job");
            Ok(())
        }
        // Another instance, perhaps in another second of the window, made it.
        Ok(_) => Ok(()),
        Err(problem) if problem.code() == "key-reused" => Ok(()),
        Err(problem) => Err(problem),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::{Reclaim, Schedule, Window, period};
    use crate::service::jobs::request::JobRequest;

    #[test]
    fn windows_may_reach_over_midnight() {
        let hour = 3600;
        let early = Window::parse("01:00-05:00").unwrap();
        assert_eq!(early.left(hour), Some(4 * hour));
        assert_eq!(early.left(24 * hour + 5 * hour - 1), Some(1));
        assert_eq!((early.left(5 * hour), early.left(0)), (None, None));
        let late = Window::parse("22:30-02:00").unwrap();
        assert_eq!(late.left(23 * hour), Some(3 * hour));
        assert_eq!(late.left(hour), Some(hour));
        assert_eq!(late.left(2 * hour), None);
        assert_eq!(late.to_string(), "22:30-02:00");
        for bad in ["", "1:00-5:00", "01:00", "24:00-05:00", "01:60-05:00", "01:00-01:00", "+1:00-05:00"] {
            assert!(Window::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_due() {
        let nothing = Schedule { reclaim_every: Duration::from_hours(1), ..Schedule::default() };
        assert_eq!(nothing.due(0, false), []);
        let day = Duration::from_hours(24);
        let all = Schedule {
            verify_within: 90 * day,
            purge_every: Duration::from_hours(1),
            reclaim: Reclaim::Auto,
            window: Some(Window::parse("01:00-05:00").unwrap()),
            ..nothing
        };
        let kinds = |now, read_only| -> Vec<&str> {
            all.due(now, read_only).iter().map(|due| due.request.kind()).collect()
        };
        assert_eq!(kinds(3600, false), ["verify", "recover", "reclaim"]);
        assert_eq!(kinds(0, false), ["verify", "recover"]);
        assert_eq!(kinds(3600, true), ["verify"]);
        let due = all.due(3600, false);
        let JobRequest::Verify(verify) = &due[0].request else { panic!("{due:?}") };
        assert_eq!((due[0].every, verify.max_seconds), (day, Some(24 * 3600)));
        assert_eq!(verify.older_than_seconds, Some(45 * 24 * 3600));
        assert_eq!((period(86_399, day), period(86_400, day)), (0, 1));
    }
}
