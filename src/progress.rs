//! What a running verb reports, and the token that stops it.
//!
//! A verb calls [`Progress::advance`] as it works and looks at [`Cancel::check`] between batches, so that a
//! stop always leaves a known state. Neither ever blocks.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Receives what a running verb does. Implementations must be cheap: calls come from many threads.
pub trait Progress: Send + Sync {
    /// A phase begins; `total` counts its units (bytes or members), 0 if unknown.
    fn phase(&self, name: &str, total: u64);
    /// `units` more of the phase are done.
    fn advance(&self, units: u64);
}

/// Reports nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn phase(&self, _name: &str, _total: u64) {}
    fn advance(&self, _units: u64) {}
}

/// A limit on bytes a second, shared by all who work under it.
/// Clones are one limit.
#[derive(Clone, Debug, Default)]
pub struct Pace(Arc<Limit>);

#[derive(Debug, Default)]
struct Limit {
    /// 0: no limit.
    bytes_per_second: AtomicU64,
    /// One that holds as well.
    above: Option<Pace>,
    /// When all that was spent so far will have been paid for.
    paid: Mutex<Option<Instant>>,
}

/// The longest single wait: a stop is noticed between waits.
const LONGEST_WAIT: Duration = Duration::from_millis(200);

impl Pace {
    /// A limit; 0 for none.
    #[must_use]
    pub fn new(bytes_per_second: u64) -> Self {
        Self::limited(bytes_per_second, None)
    }

    /// A limit of its own for a part of those who work under this one, which holds for them, too; 0 for none.
    #[must_use]
    pub fn within(&self, bytes_per_second: u64) -> Self {
        Self::limited(bytes_per_second, Some(self.clone()))
    }

    fn limited(bytes_per_second: u64, above: Option<Self>) -> Self {
        let bytes_per_second = AtomicU64::new(bytes_per_second);
        Self(Arc::new(Limit { bytes_per_second, above, paid: Mutex::new(None) }))
    }

    /// Changes the limit. Whoever waits goes on at once: what was spent before is paid for.
    pub fn set(&self, bytes_per_second: u64) {
        let mut paid = self.0.paid.lock().unwrap_or_else(PoisonError::into_inner);
        if self.0.bytes_per_second.swap(bytes_per_second, Ordering::Relaxed) != bytes_per_second {
            *paid = None;
        }
    }

    /// The limit, in bytes a second; 0 for none.
    #[must_use]
    pub fn bytes_per_second(&self) -> u64 {
        self.0.bytes_per_second.load(Ordering::Relaxed)
    }

    /// How many bytes are best moved in one go, at most `most`: without a limit all of those, else what takes a
    /// quarter of a second, a whole number of clusters of any size.
    #[must_use]
    pub fn at_once(&self, most: u64) -> u64 {
        match self.0.bytes_per_second.load(Ordering::Relaxed) {
            0 => most,
            rate => (rate / 4).clamp(2 << 20, most).next_multiple_of(2 << 20),
        }
    }

    /// Waits until `bytes` more may be moved: as long as what was spent before takes at the limit. A stop
    /// ends the wait, and so does another limit.
    pub fn spend(&self, bytes: u64, cancel: &Cancel) {
        if let Some(above) = &self.0.above {
            above.spend(bytes, cancel);
        }
        if self.bytes_per_second() == 0 || bytes == 0 {
            return;
        }
        let now = Instant::now();
        let (rate, start) = {
            let mut paid = self.0.paid.lock().unwrap_or_else(PoisonError::into_inner);
            // No other limit is set as long as this is locked.
            let rate = self.bytes_per_second();
            let start = paid.unwrap_or(now).max(now);
            let Some(nanoseconds) = (u128::from(bytes) * 1_000_000_000).checked_div(u128::from(rate)) else {
                return;
            };
            let takes = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
            *paid = start.checked_add(takes);
            (rate, start)
        };
        while let Some(left) = start.checked_duration_since(Instant::now())
            && !left.is_zero()
            && self.bytes_per_second() == rate
            && cancel.check().is_ok()
        {
            std::thread::sleep(left.min(LONGEST_WAIT));
        }
    }
}

/// A request to stop, shared between whoever asks and whoever works.
#[derive(Clone, Debug, Default)]
pub struct Cancel(Arc<AtomicBool>);

/// The work was stopped on request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped on request")]
pub struct Cancelled;

impl Cancel {
    /// Asks the work to stop at its next safe point.
    pub fn request(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// Fails if a stop was asked for.
    pub fn check(&self) -> Result<(), Cancelled> {
        if self.0.load(Ordering::Relaxed) { Err(Cancelled) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::{Cancel, Pace};

    #[test]
    fn who_waits_for_a_limit_goes_on_when_it_is_lifted() {
        let (pace, cancel) = (Pace::new(1), Cancel::default());
        let below = pace.within(u64::MAX);
        std::thread::scope(|scope| {
            // All but one of them wait for a few thousand years.
            for _ in 0..3 {
                scope.spawn(|| below.spend(1 << 37, &cancel));
            }
            std::thread::yield_now();
            pace.set(0);
        });
        pace.spend(1 << 37, &cancel);
        pace.set(1);
        pace.spend(1 << 37, &cancel);
        pace.set(2);
        pace.spend(1 << 37, &cancel);
    }
}
