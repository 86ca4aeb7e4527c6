//! `reclaim`: merges members that CloudStack has deleted. Rows stay untouched: stubs keep the names for CloudStack.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use serde::Serialize;
use utoipa::ToSchema;

use super::{Outcome, Work, job_error};
use crate::chain::graph::NodeId;
use crate::change::leaving::leaving;
use crate::change::record::OperationId;
use crate::change::{Guard, Operation};
use crate::cloudstack::records::Records;
use crate::database::Database;
use crate::failure::{Code, Failure, Kind, with_causes};
use crate::ops::delete::{self, Gate, MergeDocument, Plan, Request, Shown, Terms, plan_worth, selectable};
use crate::ops::reclaim::{Bounds, Found, find, still};
use crate::ops::recover::begin;
use crate::ops::{OpError, Result};
use crate::progress::Cancelled;
use crate::service::config::RowSource;
use crate::service::jobs::request::ReclaimRequest;
use crate::service::view::scan;
use crate::store::StoreError;
use crate::store::rows::RowMap;
use crate::store::scan::{Finding, Scan};

/// How long deleted members keep their names at least: stubs take them, and a reader that opened an old survivor must
/// have opened what is below it by then.
const STUB_GRACE: Duration = Duration::from_mins(1);

/// The document of `reclaim`.
#[derive(Debug, Serialize, ToSchema)]
pub struct ReclaimDocument {
    #[serde(flatten)]
    merges: MergeDocument,
    /// What is worth telling, and what was left out.
    findings: Vec<Finding>,
}

/// Where rows come from.
enum Source {
    File(PathBuf, Option<SystemTime>),
    Database(Box<Database>),
}

fn failed(error: &impl Failure) -> OpError {
    OpError::Refused { code: error.code(), member: String::new(), message: with_causes(error) }
}

fn read(file: &Path) -> Result<Records> {
    let usage = |detail: String| OpError::from(StoreError::Usage { detail });
    let text = std::fs::read(file).map_err(|error| usage(format!("{}: {error}", file.display())))?;
    Records::parse(&text).map_err(|error| usage(format!("{}: {error}", file.display())))
}

fn changed(file: &Path) -> Option<SystemTime> {
    std::fs::metadata(file).and_then(|metadata| metadata.modified()).ok()
}

impl Source {
    fn open(configured: Option<&RowSource>) -> Result<Self> {
        match configured {
            Some(RowSource::File(file)) => Ok(Self::File(file.clone(), changed(file))),
            Some(RowSource::Database(url)) => {
                let database = Database::connect(url).map_err(|error| failed(&error))?;
                Ok(Self::Database(Box::new(database)))
            }
            None => {
                let detail = "the service knows no rows: set schedule.records, or QCHAIN_DATABASE".to_owned();
                Err(StoreError::Usage { detail }.into())
            }
        }
    }

    fn records(&self) -> Result<Records> {
        match self {
            Self::File(file, _) => read(file),
            Self::Database(database) => database.records().map_err(|error| failed(&error)),
        }
    }

    /// The rows of these snapshots as they are now; `None` if they cannot have changed.
    fn around(&self, snapshots: &[u64]) -> Result<Option<Records>> {
        match self {
            Self::File(file, version) if changed(file) == *version => Ok(None),
            Self::File(file, _) => read(file).map(Some),
            Self::Database(database) => {
                database.records_around(snapshots).map(Some).map_err(|error| failed(&error))
            }
        }
    }
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
        match self.source.around(&snapshots)? {
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
    let source = Source::open(config.rows.as_ref())?;
    stores.check_writable()?;
    let guard = if request.dry_run { None } else { Some(begin(site, config.witness)?) };
    let scan = scan(config, stores, &[], request.now)?;
    let records = source.records()?;
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
    let grace = work.config.grace.unwrap_or_else(|| {
        let network = plan.capabilities.values().any(|can| can.network);
        if network { Duration::from_mins(15) } else { STUB_GRACE }
    });
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
    let nanoseconds = |time: Duration| i64::try_from(time.as_nanos()).unwrap_or(i64::MAX);
    let context = delete::Context {
        site: work.site,
        terms: Terms {
            grace_ns: nanoseconds(shown.grace),
            retention_ns: nanoseconds(shown.retention),
            rehearse: false,
            witness: work.config.witness,
            stubs: true,
        },
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
    // What was not begun in time is no failure.
    report.outcomes.retain(|outcome| {
        let late = outcome.error.as_ref().filter(|error| error.code() == Code::LeftForLater);
        if let Some(error) = late {
            let member = outcome.members.first().map(|id| shown.name(*id)).unwrap_or_default();
            findings.push(Finding { member, code: Code::LeftForLater, message: error.to_string() });
        }
        late.is_none()
    });
    let sum = |of: fn(&delete::Outcome) -> u64| report.outcomes.iter().map(of).sum::<u64>();
    Ok(Outcome {
        written_bytes: sum(|outcome| outcome.bytes_written + outcome.metadata_bytes_written),
        cloned_bytes: sum(|outcome| outcome.bytes_cloned),
        freed_bytes: sum(|outcome| outcome.bytes_freed_now),
        ..Outcome::of(
            &ReclaimDocument { merges: shown.document(&report), findings },
            report.first_failure().map(job_error),
        )
    })
}
