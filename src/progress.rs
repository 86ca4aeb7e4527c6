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

    /// Changes the limit for what is spent from now on.
    pub fn set(&self, bytes_per_second: u64) {
        self.0.bytes_per_second.store(bytes_per_second, Ordering::Relaxed);
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
    /// ends the wait.
    pub fn spend(&self, bytes: u64, cancel: &Cancel) {
        if let Some(above) = &self.0.above {
            above.spend(bytes, cancel);
        }
        let rate = self.0.bytes_per_second.load(Ordering::Relaxed);
        if rate == 0 || bytes == 0 {
            return;
        }
        let now = Instant::now();
        let start = {
            let mut paid = self.0.paid.lock().unwrap_or_else(PoisonError::into_inner);
            let start = paid.unwrap_or(now).max(now);
            let nanoseconds = u128::from(bytes) * 1_000_000_000 / u128::from(rate);
            let takes = Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
            *paid = start.checked_add(takes);
            start
        };
        while let Some(left) = start.checked_duration_since(Instant::now())
            && !left.is_zero()
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
