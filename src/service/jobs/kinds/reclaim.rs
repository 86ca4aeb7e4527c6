//! `reclaim`: merges members that CloudStack has deleted. Rows stay untouched: stubs keep the names for CloudStack.

use std::time::{Duration, Instant};

use serde::Serialize;
use utoipa::ToSchema;

use super::{Outcome, Work};
use crate::chain::graph::NodeId;
use crate::change::leaving::leaving;
use crate::change::record::OperationId;
use crate::change::{Guard, Operation};
use crate::cloudstack::records::Records;
use crate::database::Source;
use crate::failure::{Code, Failure, Kind};
use crate::ops::delete::{
    self, Gate, MergeDocument, Plan, Request, STUB_GRACE, Shown, plan_worth, selectable,
};
use crate::ops::reclaim::{Bounds, Found, find, still};
use crate::ops::recover::begin;
use crate::ops::{OpError, Result};
use crate::progress::Cancelled;
use crate::service::config::Config;
use crate::service::jobs::request::ReclaimRequest;
use crate::service::rows::{self, failed};
use crate::service::view::scan;
use crate::store::StoreError;
use crate::store::rows::RowMap;
use crate::store::scan::{Finding, Scan};

/// The document of `reclaim`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReclaimDocument {
    #[serde(flatten)]
    merges: MergeDocument,
    /// What is worth telling, and what was left out.
    findings: Vec<Finding>,
}

/// Where rows come from; without any nothing can be reclaimed.
fn open(config: &Config) -> Result<Source> {
    let none = "the service knows no rows: set schedule.records, or QCHAIN_DATABASE";
    rows::open(config)?.ok_or_else(|| StoreError::Usage { detail: none.to_owned() }.into())
}

/// Looks at rows again right before each decision, and at the time before each tree.
struct Look<'a> {
    source: &'a Source,
    records: &'a Records,
    map: &'a RowMap<'a>,
    scan: &'a Scan,
    deadline: Option<Instant>,
}

impl Gate for Look<'_> {
    fn begin(&self, _targets: &[NodeId]) -> Result<()> {
        if self.deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let message = "the time for merges was over before it was begun".to_owned();
            return Err(OpError::Refused { code: Code::LeftForLater, member: String::new(), message });
        }
        Ok(())
    }

    fn pass(&self, _operation: &Operation<'_>, targets: &[NodeId]) -> Result<()> {
        let row = |id: &NodeId| self.map.row(&self.scan.graph.node(*id).key).map(|row| row.snapshot_id);
        let snapshots: Vec<u64> = targets.iter().filter_map(row).collect();
        match self.source.around(&snapshots).map_err(|error| failed(&error))? {
            Some(now) => still(&snapshots, self.records.rows().iter(), now.rows().iter()),
            None => Ok(()),
        }
    }

    fn published(&self, _: &OperationId, _: &[NodeId], _: bool) -> Option<String> {
        None
    }
}

/// Finds, plans, merges. What an attempt before this one decided is recovered first, and is no target any more.
pub fn run(work: &Work<'_>, request: &ReclaimRequest) -> Result<Outcome> {
    let Work { config, stores, site, .. } = *work;
    let begun = Instant::now();
    let source = open(config)?;
    stores.check_writable()?;
    let guard = if request.dry_run { None } else { Some(begin(site, config.witness)?) };
    let scan = scan(config, stores, &[], request.now)?;
    let records = source.records().map_err(|error| failed(&error))?;
    let leaving = leaving(site, &scan)?;
    let map = RowMap::new(stores, &scan, &records);
    let Found { targets, superseded, mut findings } = find(stores, &scan, &map, &leaving, &Bounds::default());
    let mut wanted = Request {
        targets,
        records: Some(&records),
        dry_run: request.dry_run,
        in_place: config.in_place,
        leaving,
        superseded,
        stubs: true,
        ..Request::default()
    };
    wanted.targets = selectable(stores, &scan, &wanted, &mut findings);
    crate::progress::Progress::phase(work.meter, "planning", 0);
    let plan = plan_worth(stores, &scan, &mut wanted, &mut findings)?;
    let Some(guard) = guard.filter(|_| !plan.trees.is_empty()) else {
        let merges = shown(work, &scan, &plan).document(&delete::Report::default());
        return Ok(Outcome::of(&ReclaimDocument { merges, findings }, None));
    };
    let limit = request.max_seconds.map(|seconds| Duration::from_secs(seconds.into()));
    let deadline = limit.and_then(|limit| begun.checked_add(limit));
    let look = Look { source: &source, records: &records, map: &map, scan: &scan, deadline };
    merge(work, &look, &plan, &guard, findings)
}

fn shown<'a>(work: &Work<'a>, scan: &'a Scan, plan: &'a Plan) -> Shown<'a> {
    let grace = work.config.grace.unwrap_or_else(|| plan.usual_grace(STUB_GRACE));
    Shown { stores: work.stores, scan, plan, grace, retention: work.config.retention, rehearse: false }
}

fn merge(
    work: &Work<'_>,
    look: &Look<'_>,
    plan: &Plan,
    guard: &Guard,
    mut findings: Vec<Finding>,
) -> Result<Outcome> {
    let shown = shown(work, look.scan, plan);
    let context = delete::Context {
        site: work.site,
        terms: shown.terms(work.config.witness, true),
        stores: work.stores,
        scan: look.scan,
        plan,
        jobs: work.config.jobs,
        force: false,
        gate: Some(look),
        progress: work.meter,
        cancel: work.cancel,
    };
    let mut report = delete::run(&context, guard)?;
    if report.first_failure().is_some_and(|error| error.kind() == Kind::Cancelled) {
        return Err(Cancelled.into());
    }
    shown.put_off(&mut report, &mut findings);
    let document = ReclaimDocument { merges: shown.document(&report), findings };
    Ok(Outcome::of_merges(&document, &report))
}
