//! Plan and results of a merge as the documents of `delete`, `reclaim` and `consolidate` show them.

use std::time::Duration;

use serde::Serialize;
use utoipa::ToSchema;

use crate::chain::graph::NodeId;
use crate::change::Site;
use crate::change::history::Done;
use crate::change::record::Place;
use crate::change::witness::Witness;
use crate::failure::{Code, Failure as _};
use crate::ops::delete::context::Terms;
use crate::ops::delete::plan::{Entry, Mode, Plan, TreePlan};
use crate::ops::delete::report::{Outcome, Report, Status};
use crate::ops::document::{ErrorBody, time};
use crate::store::Stores;
use crate::store::scan::{Finding, Scan};

/// What `--json` shows.
#[derive(Debug, Serialize, ToSchema)]
pub struct MergeDocument {
    /// All was done but the decision: nothing has changed.
    rehearsed: bool,
    plan: Vec<PlanEntry>,
    refused: Vec<Refused>,
    results: Vec<ResultEntry>,
}

/// One survivor that gets a new file, or one tip that goes.
#[derive(Debug, Serialize, ToSchema)]
struct PlanEntry {
    members: Vec<String>,
    into: Option<String>,
    mode: &'static str,
    reason: String,
    bytes_to_write: u64,
    bytes_to_clone: u64,
    bytes_to_free: u64,
    /// What it takes more than before: several survivors may each need a copy.
    bytes_to_take: u64,
    bytes_needed: u64,
    /// Whether it can be undone once it is done.
    undoable: bool,
}

/// A tree that nothing happens to.
#[derive(Debug, Serialize, ToSchema)]
struct Refused {
    members: Vec<String>,
    error: ErrorBody,
}

/// What became of one entry of the plan.
#[derive(Debug, Serialize, ToSchema)]
struct ResultEntry {
    operation: String,
    status: &'static str,
    error: Option<ErrorBody>,
    members: Vec<String>,
    into: Option<String>,
    mode: Option<&'static str>,
    bytes_written: u64,
    metadata_bytes_written: u64,
    bytes_cloned: u64,
    bytes_freed_now: u64,
    bytes_held_until_purge: u64,
    undo_until: Option<String>,
    note: Option<String>,
    claims: Vec<Claim>,
    elapsed_milliseconds: u64,
}

/// What was proved of a survivor's new image, for how many bytes of its view.
#[derive(Debug, Serialize, ToSchema)]
#[schema(as = MergeClaim)]
struct Claim {
    #[serde(rename = "claim")]
    name: &'static str,
    bytes: u64,
    /// Of these, how many were read on both sides and compared.
    compared_bytes: u64,
    /// The digest that was proved.
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
}

/// A plan with what it takes to name its members.
pub struct Shown<'a> {
    /// The stores.
    pub stores: &'a Stores,
    /// What it was planned on.
    pub scan: &'a Scan,
    /// What is done.
    pub plan: &'a Plan,
    /// How long deleted members keep their names.
    pub grace: Duration,
    /// How long old files are kept after that.
    pub retention: Duration,
    /// All is done but the decision.
    pub rehearse: bool,
}

impl Shown<'_> {
    /// What is shown, as it is carried out.
    #[must_use]
    pub fn terms(&self, witness: Witness, stubs: bool) -> Terms {
        let nanoseconds = |time: Duration| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
        Terms {
            grace_ns: nanoseconds(self.grace),
            retention_ns: nanoseconds(self.retention),
            rehearse: self.rehearse,
            witness,
            stubs,
        }
    }

    /// What a [`Gate`](super::Gate) left for later is no failure: it is told, and no outcome any more.
    pub fn put_off(&self, report: &mut Report, findings: &mut Vec<Finding>) {
        report.outcomes.retain(|outcome| {
            let late = outcome.error.as_ref().filter(|error| error.code() == Code::LeftForLater);
            if let Some(error) = late {
                let member = outcome.members.first().map(|id| self.name(*id)).unwrap_or_default();
                findings.push(Finding { member, code: Code::LeftForLater, message: error.to_string() });
            }
            late.is_none()
        });
    }

    /// A member, as it can be written.
    #[must_use]
    pub fn name(&self, id: NodeId) -> String {
        self.stores.display(&self.scan.graph.node(id).key)
    }

    fn names(&self, ids: &[NodeId]) -> Vec<String> {
        ids.iter().map(|id| self.name(*id)).collect()
    }

    /// What `--json` shows.
    #[must_use]
    pub fn document(&self, report: &Report) -> MergeDocument {
        let refused = self.plan.trees.iter().filter_map(|tree| {
            let error = ErrorBody::of(tree.refusal.as_ref()?);
            Some(Refused { members: self.names(&tree.targets), error })
        });
        let trees = self.plan.trees.iter();
        MergeDocument {
            rehearsed: self.rehearse,
            plan: trees
                .flat_map(|tree| tree.entries.iter().map(|entry| self.plan_entry(tree, entry)))
                .collect(),
            refused: refused.collect(),
            results: report.outcomes.iter().map(|outcome| self.result_entry(outcome)).collect(),
        }
    }

    /// Whether what happens to a tree can be undone: as a whole, or not at all.
    pub(crate) fn undoable(&self, tree: &TreePlan) -> bool {
        let written_into = tree.entries.iter().any(|entry| entry.mode == Mode::InPlace);
        !written_into && !(self.retention + self.grace).is_zero()
    }

    fn plan_entry(&self, tree: &TreePlan, entry: &Entry) -> PlanEntry {
        PlanEntry {
            members: self.names(&entry.members),
            into: entry.into.map(|id| self.name(id)),
            mode: entry.mode.word(),
            reason: entry.reason.clone(),
            bytes_to_write: entry.cost.written_bytes(),
            bytes_to_clone: entry.cost.clone_bytes,
            bytes_to_free: entry.bytes_to_free,
            bytes_to_take: entry.bytes_to_take,
            bytes_needed: entry.bytes_needed,
            undoable: self.undoable(tree),
        }
    }

    fn result_entry(&self, outcome: &Outcome) -> ResultEntry {
        let proved = outcome.planned_bytes + outcome.compared_bytes;
        let plan =
            Claim { name: "plan", bytes: proved, compared_bytes: outcome.compared_bytes, digest: None };
        let digest = outcome.view_digest.map(|digest| Claim {
            name: "digest",
            bytes: outcome.digest_bytes,
            compared_bytes: 0,
            digest: Some(digest.to_string()),
        });
        let data = (outcome.data_bytes > 0).then_some(Claim {
            name: "data",
            bytes: outcome.data_bytes,
            compared_bytes: outcome.data_bytes,
            digest: None,
        });
        let made = outcome.into.is_some() && outcome.error.is_none();
        ResultEntry {
            operation: outcome.operation.clone(),
            status: outcome.status.word(),
            error: outcome.error.as_ref().map(ErrorBody::of),
            members: self.names(&outcome.members),
            into: outcome.into.map(|id| self.name(id)),
            mode: outcome.mode.map(Mode::word),
            bytes_written: outcome.bytes_written,
            metadata_bytes_written: outcome.metadata_bytes_written,
            bytes_cloned: outcome.bytes_cloned,
            bytes_freed_now: outcome.bytes_freed_now,
            bytes_held_until_purge: outcome.bytes_held_until_purge,
            undo_until: outcome.undo_until_ns.map(time),
            note: outcome.note.clone(),
            claims: std::iter::once(plan).chain(digest).chain(data).filter(|_| made).collect(),
            elapsed_milliseconds: outcome.elapsed_ns / 1_000_000,
        }
    }
}

impl MergeDocument {
    /// Of operations that were decided by somebody who did not come to tell, and finished by recovery.
    #[must_use]
    pub fn finished(site: &Site<'_>, done: &[Done]) -> Self {
        Self { rehearsed: false, plan: Vec::new(), refused: Vec::new(), results: Vec::new() }.with(site, done)
    }

    /// The same with such operations, before all others.
    #[must_use]
    pub fn with(mut self, site: &Site<'_>, done: &[Done]) -> Self {
        let entries = done.iter().map(|done| ResultEntry {
            operation: done.operation.to_string(),
            status: Status::Done.word(),
            error: None,
            members: names(site, &done.members),
            into: names(site, &done.survivors).into_iter().next(),
            mode: None,
            bytes_written: 0,
            metadata_bytes_written: 0,
            bytes_cloned: 0,
            bytes_freed_now: 0,
            bytes_held_until_purge: done.held_bytes,
            undo_until: done.undo_until.map(time),
            note: Some("it was interrupted after the decision, and finished by recovery".to_owned()),
            claims: Vec::new(),
            elapsed_milliseconds: 0,
        });
        self.results.splice(0..0, entries.collect::<Vec<_>>());
        self
    }
}

/// Places as members can be written.
fn names(site: &Site<'_>, places: &[Place]) -> Vec<String> {
    let name = |place: &Place| site.key(place).map(|key| site.stores.display(&key)).ok();
    places.iter().filter_map(name).collect()
}
