//! A clock that is ahead: what waits for the end of a grace or a retention does not wait long.

use std::time::Duration;

use qchain::change::{Clock, SystemClock};

/// The machine's clock, moved on by so many nanoseconds.
pub struct Later(pub i64);

impl Clock for Later {
    fn wall_ns(&self) -> i64 {
        SystemClock.wall_ns() + self.0
    }

    fn elapsed(&self) -> Duration {
        SystemClock.elapsed()
    }

    fn sleep(&self, duration: Duration) {
        SystemClock.sleep(duration);
    }
}
