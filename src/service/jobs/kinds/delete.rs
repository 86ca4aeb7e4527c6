//! `delete`, and its plan.

use std::time::Duration;

use serde::Serialize;
use utoipa::ToSchema;

use super::{Outcome, Work, texts};
use crate::change::history::Done;
use crate::change::leaving::leaving;
use crate::change::{Site, SystemClock};
use crate::cloudstack::records::Records;
use crate::failure::{Failure, Kind};
use crate::ops::Result;
use crate::ops::delete::{self, MergeDocument, Plan, Request, Shown};
use crate::ops::recover::{begin, history, names};
use crate::progress::{Cancel, Cancelled};
use crate::service::config::Config;
use crate::service::jobs::request::DeleteRequest;
use crate::service::rows::read;
use crate::service::view::{View, scan};
use crate::service::words::Row;
use crate::store::names::resolve_all;
use crate::store::scan::Scan;
use crate::store::{StoreError, Stores};

/// The document of `delete`, and what CloudStack's rows have to be changed to.
#[derive(Debug, Serialize, ToSchema)]
pub struct DeleteDocument {
    #[serde(flatten)]
    merges: MergeDocument,
    /// The members that got new files.
    survivors: Vec<Row>,
}

fn request_of<'a>(
    config: &Config,
    site: &Site<'_>,
    scan: &Scan,
    request: &DeleteRequest,
    (members, records): (&[String], Option<&'a Records>),
) -> Result<Request<'a>> {
    if members.is_empty() {
        return Err(StoreError::Usage { detail: "no member is named".to_owned() }.into());
    }
    Ok(Request {
        leaving: leaving(site, scan)?,
        in_place: config.in_place,
        targets: resolve_all(site.stores, scan, members)?,
        mode: request.mode.into(),
        records,
        assume_deleted: request.assume_deleted,
        end_of_chain: request.end_of_chain,
        exclusive: request.exclusive,
        force: request.force,
        ..Request::default()
    })
}

/// The rows that have to show that members were given up, unless somebody vouches for that.
fn records(config: &Config, request: &DeleteRequest) -> Result<Option<Records>> {
    if request.assume_deleted { Ok(None) } else { read(config) }
}

/// How long names and files stay.
fn stays(config: &Config, request: &DeleteRequest, plan: &Plan) -> (Duration, Duration) {
    let seconds = |given: Option<u32>| given.map(|seconds| Duration::from_secs(seconds.into()));
    let given = seconds(request.grace_seconds).or(config.grace);
    let grace = given.unwrap_or_else(|| plan.usual_grace(Duration::ZERO));
    (grace, seconds(request.retention_seconds).unwrap_or(config.retention))
}

/// What would be done. Changes nothing.
pub fn plan(config: &Config, stores: &Stores, request: &DeleteRequest) -> Result<MergeDocument> {
    stores.check_writable()?;
    let cancel = Cancel::default();
    let site = Site::new(stores, &SystemClock, &cancel, config.lease);
    let scan = scan(config, stores, &[], request.now)?;
    let members = texts(stores, &request.members)?;
    let records = records(config, request)?;
    let members = (members.as_slice(), records.as_ref());
    let wanted = Request { dry_run: true, ..request_of(config, &site, &scan, request, members)? };
    let plan = delete::plan(stores, &scan, &wanted)?;
    let (grace, retention) = stays(config, request, &plan);
    let shown = Shown { stores, scan: &scan, plan: &plan, grace, retention, rehearse: request.rehearse };
    Ok(shown.document(&delete::Report::default()))
}

/// Deletes. What an attempt before this one decided, and recovery finished, counts as done.
pub fn run(work: &Work<'_>, request: &DeleteRequest) -> Result<Outcome> {
    let Work { config, stores, site, .. } = *work;
    let guard = begin(site, config.witness)?;
    let mut members = texts(stores, &request.members)?;
    let before = if work.again { done_before(work, &members)? } else { Vec::new() };
    let gone: Vec<String> = before.iter().flat_map(|done| names(site, &done.members)).collect();
    members.retain(|member| !gone.contains(member));
    let survivors = before.iter().flat_map(|done| names(site, &done.survivors));
    let mut survivors: Vec<String> = survivors.collect();
    if members.is_empty() && !before.is_empty() {
        let merges = MergeDocument::finished(site, &before);
        let outcome = Outcome::of(&DeleteDocument { merges, survivors: rows(config, &survivors)? }, None);
        return Ok(outcome);
    }
    let scan = scan(config, stores, &[], request.now)?;
    let records = records(config, request)?;
    let wanted = request_of(config, site, &scan, request, (&members, records.as_ref()))?;
    crate::progress::Progress::phase(work.meter, "planning", 0);
    let plan = delete::plan(stores, &scan, &wanted)?;
    let (grace, retention) = stays(config, request, &plan);
    let shown = Shown { stores, scan: &scan, plan: &plan, grace, retention, rehearse: request.rehearse };
    let context = delete::Context {
        site,
        terms: shown.terms(config.witness, false),
        stores,
        scan: &scan,
        plan: &plan,
        jobs: config.jobs,
        force: request.force,
        gate: None,
        progress: work.meter,
        cancel: work.cancel,
    };
    let report = delete::run(&context, &guard)?;
    if report.first_failure().is_some_and(|error| error.kind() == Kind::Cancelled) {
        // What was decided all the same is found when the job is continued.
        return Err(Cancelled.into());
    }
    let written = report.outcomes.iter().filter(|outcome| outcome.error.is_none());
    survivors.extend(written.filter_map(|outcome| outcome.into).map(|id| shown.name(id)));
    let merges = shown.document(&report).with(site, &before);
    let document = DeleteDocument { merges, survivors: rows(config, &survivors)? };
    Ok(Outcome::of_merges(&document, &report))
}

/// The survivors as they are now.
fn rows(config: &Config, survivors: &[String]) -> Result<Vec<Row>> {
    if survivors.is_empty() {
        return Ok(Vec::new());
    }
    let view = View::read(config)?;
    Ok(Row::all(&view, survivors.iter().map(String::as_str)))
}

/// The operations that took members away since the job was begun first.
fn done_before(work: &Work<'_>, members: &[String]) -> Result<Vec<Done>> {
    let since = work.record.begun_ns.unwrap_or(i64::MAX);
    let of_job = |done: &Done| {
        let took = names(work.site, &done.members);
        done.time_ns >= since
            && done.undoes.is_none()
            && !done.undone
            && took.iter().any(|name| members.contains(name))
    };
    Ok(history(work.site)?.into_iter().filter(of_job).collect())
}
