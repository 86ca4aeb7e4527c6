//! What a running verb reports, and the token that stops it.
//!
//! A verb calls [`Progress::advance`] as it works and looks at [`Cancel::check`] between batches, so that a
//! stop always leaves a known state. Neither ever blocks.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
