//! Time and chance, as far as changing a share depends on them: so that a simulation can hold them in its
//! hands.

use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Tells the time, waits, and makes up numbers.
pub trait Clock: Send + Sync {
    /// Nanoseconds since 1970. May jump; only grace and retention are measured with it.
    fn wall_ns(&self) -> i64;

    /// Time since some moment in the life of this process; never goes back. Leases are watched with it.
    fn elapsed(&self) -> Duration;

    /// Waits.
    fn sleep(&self, duration: Duration);

    /// A random number that nobody else has: ids and nonces are made of these.
    fn unique(&self) -> u128 {
        uuid::Uuid::new_v4().as_u128()
    }

    /// Whether leases are renewed by a thread of their own. Where time stands still between calls it is
    /// enough that they are renewed between steps.
    fn renews(&self) -> bool {
        true
    }
}

/// The machine's clocks.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemClock;

impl Clock for SystemClock {
    fn wall_ns(&self) -> i64 {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
    }

    fn elapsed(&self) -> Duration {
        static START: OnceLock<Instant> = OnceLock::new();
        START.get_or_init(Instant::now).elapsed()
    }

    fn sleep(&self, duration: Duration) {
        std::thread::sleep(duration);
    }
}
