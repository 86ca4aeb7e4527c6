//! `adopt`: reads settled members once, and keeps what they are: manifest, leaf table, view digest.
//!
//! A member is adopted on its adopted parent, so whatever lies below is adopted with it. Members whose manifest is
//! in force are left as they are, which makes it resumable: each is done as soon as its manifest is written. The
//! trees with the newest members come first.
//!
//! A member that has a manifest and is another file now (somebody wrote to it, or put a copy back) is read again: if
//! its view is what it was it gets a new manifest, else it is told (`changed-since-adoption`) and left, unless the
//! caller accepts it.

mod one;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use rayon::prelude::*;
use serde::Serialize;

use crate::chain::graph::NodeId;
use crate::change::tree;
use crate::failure::{Code, Failure, Kind, Severity, with_causes};
use crate::ids::Digest;
use crate::ops::{OpError, Result};
use crate::progress::{Cancel, Pace, Progress};
use crate::store::manifest::Manifest;
use crate::store::manifest::leaves::LeafFile;
use crate::store::manifest::shelf::{self, Shelf};
use crate::store::measure::Job;
use crate::store::scan::{Finding, Incoming, Scan};
use crate::store::{StoreError, Stores};

/// How to adopt.
#[derive(Clone, Debug, Default)]
pub struct Request {
    /// The members; with each goes all below it.
    pub targets: Vec<NodeId>,
    /// The caller named them: why one of them is left is told as a failure.
    pub named: bool,
    /// What a changed member is now is taken for right.
    pub accept_changed: bool,
    /// How many trees are worked on at once.
    pub jobs: usize,
    /// Members that were deleted and have their names still: not adopted.
    pub leaving: BTreeSet<NodeId>,
    /// The time, nanoseconds since 1970.
    pub now_ns: i64,
    /// No member is begun after this.
    pub deadline: Option<Instant>,
}

/// One member whose manifest is in force.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct Adopted {
    /// The member.
    pub member: String,
    /// Its view digest.
    pub digest: Digest,
    /// Whether this run adopted it; else it was before.
    pub new: bool,
    /// The size of its view.
    pub virtual_bytes: u64,
    /// The bytes of its leaf table.
    pub table_bytes: u64,
}

/// What was adopted, and what not.
#[derive(Debug, Default, Serialize, utoipa::ToSchema)]
pub struct AdoptReport {
    /// The members asked for whose manifest is in force now, tree by tree, parents first.
    pub adopted: Vec<Adopted>,
    /// Why others are not, by member.
    pub findings: Vec<Finding>,
    /// How many were not looked at for want of time.
    pub left: u64,
    /// What the command ends with.
    #[serde(skip)]
    pub failure: Option<Kind>,
}

/// Adopts. One member that cannot be stops what stands on it, and nothing else. Blocks for as long as it takes to read
/// all that is new; writes only to `.qchain`.
///
/// # After a crash
///
/// Each member is adopted or not; a leaf table may be left, which a later call removes.
pub fn adopt(
    stores: &Stores,
    scan: &Scan,
    request: &Request,
    progress: &dyn Progress,
    cancel: &Cancel,
    pace: &Pace,
) -> Result<AdoptReport> {
    stores.check_writable()?;
    let shelves = Shelf::load_all(stores)?;
    let wanted: BTreeSet<NodeId> = request.targets.iter().copied().collect();
    let mut needed = wanted.clone();
    for id in &wanted {
        needed.extend(scan.graph.ancestors(*id).unwrap_or_default());
    }
    let mut trees: BTreeMap<usize, Vec<NodeId>> = BTreeMap::new();
    let mut total = 0;
    for id in &needed {
        trees.entry(scan.graph.tree_of(*id)).or_default().push(*id);
        total += scan.member(*id).map_or(0, |member| member.stat.length);
    }
    let mut trees: Vec<Vec<NodeId>> = trees.into_values().collect();
    let newest = |tree: &Vec<NodeId>| {
        tree.iter().filter_map(|id| scan.member(*id)).map(|member| member.stat.modified_ns).max()
    };
    trees.sort_by_key(|tree| std::cmp::Reverse(newest(tree)));
    progress.phase("adopting", total);
    let job = Job { progress, cancel, pace, tolerant: false };
    let context = Context { stores, scan, shelves: &shelves, request, needed: &needed, job };
    let pool =
        rayon::ThreadPoolBuilder::new().num_threads(request.jobs.max(rayon::current_num_threads())).build();
    let pool = pool.map_err(|error| StoreError::Usage { detail: format!("--jobs: {error}") })?;
    // In order, so many at a time: the newest first.
    let mut report = AdoptReport::default();
    for batch in trees.chunks(request.jobs.max(1)) {
        let done: Vec<AdoptReport> = pool.install(|| {
            batch.par_iter().with_max_len(1).map(|tree| context.tree(tree)).collect::<Result<_>>()
        })?;
        for one in done {
            report.adopted.extend(one.adopted);
            report.findings.extend(one.findings);
            report.left += one.left;
            report.failure = report.failure.or(one.failure);
        }
    }
    let named = |adopted: &Adopted, id: &NodeId| stores.display(&scan.graph.node(*id).key) == adopted.member;
    if request.named && wanted.len() < needed.len() {
        report.adopted.retain(|adopted| adopted.new || wanted.iter().any(|id| named(adopted, id)));
    }
    Ok(report)
}

/// What all trees are adopted with.
struct Context<'a> {
    stores: &'a Stores,
    scan: &'a Scan,
    shelves: &'a [Shelf],
    request: &'a Request,
    needed: &'a BTreeSet<NodeId>,
    job: Job<'a>,
}

/// A member on the way from the root to where the walk is.
struct Step {
    id: NodeId,
    /// Its manifest in force and its table; `None` if it is not adopted.
    known: Option<(Manifest, LeafFile)>,
}

impl Context<'_> {
    /// Adopts what is needed of one tree, parents first.
    fn tree(&self, members: &[NodeId]) -> Result<AdoptReport> {
        let mut report = AdoptReport::default();
        let roots = members
            .iter()
            .copied()
            .filter(|id| self.scan.graph.parent(*id).is_none_or(|parent| !self.needed.contains(&parent)));
        let mut open: Vec<NodeId> = roots.collect();
        open.reverse();
        let mut path: Vec<Step> = Vec::new();
        // Depth first, so that the tables below are open while what stands on them is adopted.
        while let Some(id) = open.pop() {
            self.job.cancel.check()?;
            if self.request.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
                report.left += 1 + open.len() as u64;
                break;
            }
            let parent = self.scan.graph.parent(id);
            while path.last().is_some_and(|step| Some(step.id) != parent) {
                path.pop();
            }
            let known = self.member(id, &mut path, &mut report)?;
            path.push(Step { id, known });
            let children = self.scan.graph.children(id).iter().rev().copied();
            open.extend(children.filter(|child| self.needed.contains(child)));
        }
        Ok(report)
    }

    /// Adopts one member, unless it is, and says what came of it.
    fn member(
        &self,
        id: NodeId,
        path: &mut [Step],
        report: &mut AdoptReport,
    ) -> Result<Option<(Manifest, LeafFile)>> {
        let key = &self.scan.graph.node(id).key;
        let name = self.stores.display(key);
        if self.scan.member(id).is_none() {
            return Ok(None);
        }
        if let Some((code, message)) = self.unfit(id, path) {
            // What a run over everything passes by is told by `list`.
            if self.request.named && self.request.targets.contains(&id) || code.severity() == Severity::Error
            {
                note(report, &name, code, message);
            }
            return Ok(None);
        }
        let known = shelf::known(self.stores, self.scan, self.shelves, id)?;
        match self.take(id, &known, path) {
            Ok(one::Taken { manifest, leaves, new }) => {
                report.adopted.push(Adopted {
                    member: name,
                    digest: manifest.view_digest,
                    new,
                    virtual_bytes: manifest.virtual_bytes,
                    table_bytes: leaves.shape().length().unwrap_or_default(),
                });
                Ok(Some((manifest, leaves)))
            }
            Err(error) if matches!(error.kind(), Kind::Cancelled | Kind::Io | Kind::NoSpace) => Err(error),
            Err(error) => {
                let message = match &error {
                    OpError::Refused { message, .. } => message.clone(),
                    other => with_causes(other),
                };
                report.failure = report.failure.or(Some(error.kind()));
                report.findings.push(Finding { member: name, code: error.code(), message });
                Ok(None)
            }
        }
    }

    /// Why a member is not adopted at all.
    fn unfit(&self, id: NodeId, path: &[Step]) -> Option<(Code, String)> {
        let member = self.scan.member(id)?;
        if let Some((code, message)) = member.reading.fault() {
            return Some((code, message));
        }
        if let Some(incoming) = &member.incoming {
            let code = if matches!(incoming, Incoming::Writer) { Code::Locked } else { Code::Incoming };
            return Some((code, incoming.reason()));
        }
        if member.temporary {
            return Some((Code::Incoming, "it is one of CloudStack's own temporaries".to_owned()));
        }
        if member.stub {
            return Some((
                Code::Leaving,
                "it is an empty image that keeps a deleted member's name".to_owned(),
            ));
        }
        if self.request.leaving.contains(&id) {
            return Some((Code::Leaving, "it was deleted, and keeps its name for a while".to_owned()));
        }
        if let Err(error) = self.scan.graph.complete(id) {
            return Some((error.code(), with_causes(&error)));
        }
        match (self.scan.graph.parent(id), path.last()) {
            (Some(parent), Some(step)) if step.id == parent && step.known.is_none() => {
                let message = "its parent is not adopted".to_owned();
                Some((Code::NotAdopted, message))
            }
            _ => None,
        }
    }

    /// The id of the tree that a member is in, if it has one yet.
    fn tree_id(&self, id: NodeId) -> Result<Option<String>> {
        let root = &self.scan.graph.node(tree::root(&self.scan.graph, id)).key;
        let found = tree::find(self.stores.get(root.store)?.backend(), &root.path)?;
        Ok(found.map(|tree| tree.to_string()))
    }
}

/// Notes a member that is left, as a failure of the run if it was named or is damaged.
fn note(report: &mut AdoptReport, name: &str, code: Code, message: String) {
    let refused = OpError::Refused { code, member: name.to_owned(), message: message.clone() };
    report.failure = report.failure.or(Some(refused.kind()));
    report.findings.push(Finding { member: name.to_owned(), code, message });
}
