//! The page's files, and what only a page or a person asks: where a disk lies, when its bytes were last read.
#![expect(unused_qualifications, reason = "the macro that describes routes writes them")]

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::document;
use crate::ops::document::time;
use crate::ops::map::{MapRun, RunKind, map};
use crate::ops::verify::debt as debt_of;
use crate::progress::Cancel;
use crate::service::extract::{Asked, Named, Reader};
use crate::service::page;
use crate::service::problem::Problem;
use crate::service::state::Shared;
use crate::service::view::{MemberName, View, now_ns};

/// The most runs of a map that are given at once, and how many if nobody says.
const MOST_RUNS: usize = 10_000;
const USUAL_RUNS: usize = 1000;
/// The same of members and their ages.
const MOST_MEMBERS: usize = 1000;
const USUAL_MEMBERS: usize = 100;

/// The page for people.
#[utoipa::path(get, path = "/", tag = "page", security(()), responses(
    (status = 200, description = "The page", content_type = "text/html", body = String),
    (status = 304, description = "It is what If-None-Match says"),
))]
pub async fn index(asked: HeaderMap) -> Response {
    page::index(&asked)
}

/// A script or style sheet of the page.
#[utoipa::path(get, path = "/page/{file}", tag = "page", security(()),
    params(("file" = String, Path, description = "The file's name")),
    responses(
        (status = 200, description = "The file", content_type = "text/javascript", body = String),
        (status = 304, description = "It is what If-None-Match says"),
        (status = 404, description = "The page has no such file", content_type = "application/problem+json",
            body = crate::service::problem::ProblemBody),
))]
pub async fn file(Named(name): Named<String>, asked: HeaderMap) -> Result<Response, Problem> {
    page::file(&name, &asked)
}

/// Which part of which map.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct MapQuery {
    /// The member, as on the command line.
    member: String,
    /// How many runs, at most.
    #[param(minimum = 1, maximum = 10000)]
    limit: Option<usize>,
    /// From this guest byte on, where the first run is cut: `next` of the answer before.
    after: Option<u64>,
}

/// A part of a map.
#[derive(Debug, Serialize, ToSchema)]
pub struct MapPage {
    /// The member.
    member: String,
    /// The size of its disk, in bytes.
    virtual_bytes: u64,
    /// Runs of its view: ascending, maximal, without gaps; all pages together are the whole disk. One run a compressed
    /// cluster.
    runs: Vec<MapEntry>,
    /// What to give as `after` for the runs that follow; null if there are none.
    next: Option<u64>,
}

/// One run.
#[derive(Debug, Serialize, ToSchema)]
pub struct MapEntry {
    /// The first guest byte.
    start: u64,
    /// How many bytes.
    length: u64,
    /// `data`, `zero`, `compressed`.
    #[schema(value_type = String)]
    kind: RunKind,
    /// The member that holds it; null for zeros.
    member: Option<String>,
    /// Where in that member's file, in bytes; null for zeros.
    offset: Option<u64>,
}

impl From<MapRun<'_>> for MapEntry {
    fn from(run: MapRun<'_>) -> Self {
        let member = run.member.map(str::to_owned);
        Self { start: run.start, length: run.length, kind: run.kind, member, offset: run.offset }
    }
}

fn bounded(limit: Option<usize>, usual: usize, most: usize) -> Result<usize, Problem> {
    match limit.unwrap_or(usual) {
        0 => Err(Problem::usage("limit is at least 1")),
        limit if limit > most => Err(Problem::usage(format!("limit is from 1 to {most}"))),
        limit => Ok(limit),
    }
}

/// Where the bytes of a member's view are, a bounded number of runs at once.
#[utoipa::path(get, path = "/v1/map", tag = "chains", params(MapQuery), responses(
    (status = 200, description = "A part of the map", body = MapPage),
))]
pub async fn allocation(
    _: Reader,
    State(service): State<Shared>,
    Asked(query): Asked<MapQuery>,
) -> Result<Response, Problem> {
    let limit = bounded(query.limit, USUAL_RUNS, MOST_RUNS)?;
    let found = service.blocking(move |service| {
        let view = View::read(&service.config)?;
        let id = view.member(&MemberName::Plain(query.member))?;
        let report = map(&view.stores, &view.scan, id)?;
        let (cancel, mut runs, mut next) = (Cancel::default(), Vec::new(), None);
        for run in report.runs_from(query.after.unwrap_or(0), &cancel) {
            let run = run?;
            if runs.len() == limit {
                next = Some(run.start);
                break;
            }
            runs.push(MapEntry::from(run));
        }
        Ok(MapPage { virtual_bytes: report.virtual_bytes, member: report.member, runs, next })
    });
    Ok(document(&found.await?))
}

/// Whose debt.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct DebtQuery {
    /// The members, as on the command line; all if none is given.
    member: Option<String>,
    /// How many are told one by one, at most; those that were left alone for longest come first.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
}

/// How long ago bytes were read and found right.
#[derive(Debug, Serialize, ToSchema)]
pub struct DebtReport {
    /// How many members there are of those that were asked for.
    members: usize,
    /// How many of them are adopted.
    adopted: usize,
    /// How many of those have a byte that was never read since.
    never_read: usize,
    /// The age of the oldest reading of any byte, in seconds; null if none was read yet.
    age_seconds: Option<u64>,
    /// Members one by one: those never read first, then by age.
    debt: Vec<DebtEntry>,
}

/// One member.
#[derive(Debug, Serialize, ToSchema)]
pub struct DebtEntry {
    /// The member.
    member: String,
    /// Whether it is adopted: else there is nothing to compare with.
    adopted: bool,
    /// When the byte that was left alone for longest was read; null: never.
    oldest_read: Option<String>,
    /// How long ago that is, in seconds.
    age_seconds: Option<u64>,
}

/// How long ago the bytes of members were last read and found right. Reads manifests, no images.
#[utoipa::path(get, path = "/v1/debt", tag = "chains", params(DebtQuery), responses(
    (status = 200, description = "What verification owes", body = DebtReport),
))]
pub async fn debt(
    _: Reader,
    State(service): State<Shared>,
    Asked(query): Asked<DebtQuery>,
) -> Result<Response, Problem> {
    let limit = bounded(query.limit, USUAL_MEMBERS, MOST_MEMBERS)?;
    let found = service.blocking(move |service| {
        let view = View::read(&service.config)?;
        let ids = match query.member {
            Some(member) => view.members(&[member])?,
            None => view.scan.graph.ids().collect(),
        };
        let all = debt_of(&view.stores, &view.scan, &ids, now_ns())?;
        let entry = |debt: &crate::ops::verify::Debt| DebtEntry {
            member: debt.member.clone(),
            adopted: debt.adopted,
            oldest_read: debt.oldest_ns.map(time),
            age_seconds: debt.age_seconds,
        };
        Ok(DebtReport {
            members: all.len(),
            adopted: all.iter().filter(|debt| debt.adopted).count(),
            never_read: all.iter().filter(|debt| debt.adopted && debt.oldest_ns.is_none()).count(),
            age_seconds: all.iter().filter_map(|debt| debt.age_seconds).max(),
            debt: all.iter().take(limit).map(entry).collect(),
        })
    });
    Ok(document(&found.await?))
}
