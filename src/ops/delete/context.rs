//! What a run works on and who watches.

use crate::chain::graph::NodeId;
use crate::change::record::OperationId;
use crate::change::witness::Witness;
use crate::change::{Operation, Site};
use crate::ops::Result;
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
    /// Asked right before each decision.
    pub gate: Option<&'a dyn Gate>,
    /// Told of bytes written or cloned.
    pub progress: &'a dyn Progress,
    /// Looked at between batches and before each decision.
    pub cancel: &'a Cancel,
}

/// Watches the changes of trees; `targets` are the members that a tree's change deletes. Called from several
/// threads.
pub trait Gate: Sync {
    /// Whether a tree may be begun now: an error refuses it.
    fn begin(&self, targets: &[NodeId]) -> Result<()>;

    /// The last word before the decision: an error takes the change back.
    fn pass(&self, operation: &Operation<'_>, targets: &[NodeId]) -> Result<()>;

    /// What was decided was published, all of it or, with `whole` false, but for what others had changed. Gives
    /// what is to be noted.
    fn published(&self, operation: &OperationId, targets: &[NodeId], whole: bool) -> Option<String>;
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
    /// Whether stubs take the names of deleted members.
    pub stubs: bool,
}
