//! How a running job comes along.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::progress::Progress;

/// What counts so much counts bytes: phases count bytes or members, and do not say which.
const LEAST_BYTES: u64 = 1 << 20;

/// What a verb tells, kept for who asks.
#[derive(Debug)]
pub struct Meter {
    phase: Mutex<(String, u64, Instant)>,
    done: AtomicU64,
}

/// What a phase counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Unit {
    /// Bytes.
    Bytes,
    /// Members.
    Members,
}

/// How a job comes along, at one moment.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Pulse {
    /// What is being done.
    pub phase: String,
    /// How much of the phase is done.
    pub done: u64,
    /// How much the phase has; 0 if that is not known.
    pub total: u64,
    /// What is counted.
    pub unit: Unit,
    /// By the second, since the phase began.
    pub rate_per_second: u64,
    /// How long the phase takes still, if it goes on like that.
    pub remaining_seconds: Option<u64>,
}

impl Default for Meter {
    fn default() -> Self {
        Self { phase: Mutex::new((String::new(), 0, Instant::now())), done: AtomicU64::new(0) }
    }
}

impl Meter {
    /// How it comes along now.
    pub fn pulse(&self) -> Pulse {
        let (phase, total, since) = self.phase.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let done = self.done.load(Ordering::Relaxed);
        let milliseconds = u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX).max(1);
        let rate = done.saturating_mul(1000) / milliseconds;
        let left = total.saturating_sub(done);
        let remaining_seconds = left.checked_div(rate).filter(|_| total > 0);
        let unit = if total >= LEAST_BYTES { Unit::Bytes } else { Unit::Members };
        Pulse { phase, done, total, unit, rate_per_second: rate, remaining_seconds }
    }
}

impl Progress for Meter {
    fn phase(&self, name: &str, total: u64) {
        let mut phase = self.phase.lock().unwrap_or_else(PoisonError::into_inner);
        *phase = (name.to_owned(), total, Instant::now());
        self.done.store(0, Ordering::Relaxed);
    }

    fn advance(&self, units: u64) {
        self.done.fetch_add(units, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::{Meter, Unit};
    use crate::progress::Progress as _;

    #[test]
    fn a_pulse_is_of_the_phase_that_is_on() {
        let meter = Meter::default();
        meter.phase("reading", 4 << 20);
        meter.advance(4 << 20);
        let pulse = meter.pulse();
        assert_eq!((pulse.phase.as_str(), pulse.done, pulse.unit), ("reading", 4 << 20, Unit::Bytes));
        assert_eq!(pulse.remaining_seconds, Some(0));
        meter.phase("ending", 0);
        assert_eq!((meter.pulse().done, meter.pulse().remaining_seconds), (0, None));
    }
}
