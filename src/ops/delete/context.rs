//! What a run works on and who watches.

use crate::change::Site;
use crate::change::witness::Witness;
use crate::ops::delete::plan::Plan;
use crate::progress::{Cancel, Progress};
use crate::store::Stores;
use crate::store::scan::Scan;

/// What a run works on and who watches.
pub struct Context<'a> {
    /// Where, by whom and how fast.
    pub site: &'a Site<'a>,
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
    /// What follows the publication, and when.
    pub terms: Terms,
    /// Told of bytes written or cloned.
    pub progress: &'a dyn Progress,
    /// Looked at between batches and before each decision.
    pub cancel: &'a Cancel,
}

/// What follows the publication, and when.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Terms {
    /// How long deleted members keep their names, in nanoseconds.
    pub grace_ns: i64,
    /// How long old files are kept after that, in nanoseconds.
    pub retention_ns: i64,
    /// Everything but the decision: build, prove, report, throw away.
    pub rehearse: bool,
    /// Who looks before old files go.
    pub witness: Witness,
}
