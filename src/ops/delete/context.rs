//! What a run works on and who watches.

use crate::ops::delete::plan::Plan;
use crate::progress::{Cancel, Progress};
use crate::store::Stores;
use crate::store::scan::Scan;

/// What a run works on and who watches.
pub struct Context<'a> {
    /// All stores of the zone.
    pub stores: &'a Stores,
    /// The scan that was planned from.
    pub scan: &'a Scan,
    /// The plan.
    pub plan: &'a Plan,
    /// How many trees are worked on at once, at least 1.
    pub jobs: usize,
    /// Leave checkpoint files that cannot be edited.
    pub force: bool,
    /// Told of bytes written or cloned.
    pub progress: &'a dyn Progress,
    /// Looked at between batches and before each publication.
    pub cancel: &'a Cancel,
}
