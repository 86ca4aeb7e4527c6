//! What a verb that moves bytes goes by, whoever called it.

use crate::progress::{Cancel, Pace, Progress};
use crate::store::measure::Job;

/// What the work goes by.
#[derive(Clone, Copy)]
pub struct Work<'a> {
    /// Told of bytes.
    pub progress: &'a dyn Progress,
    /// Asked to stop.
    pub cancel: &'a Cancel,
    /// The limit on bytes a second.
    pub pace: &'a Pace,
}

impl<'a> Work<'a> {
    /// What reading goes by.
    #[must_use]
    pub fn job(&self) -> Job<'a> {
        Job { progress: self.progress, cancel: self.cancel, pace: self.pace, tolerant: false }
    }
}
