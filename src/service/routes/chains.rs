//! Chains and members, and plans.
#![expect(unused_qualifications, reason = "the macro that describes routes writes them")]

use std::collections::HashMap;
use std::sync::Arc;

use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::document;
use crate::chain::graph::NodeId;
use crate::cloudstack::records::Records;
use crate::failure::{Code, Kind};
use crate::ops::OpError;
use crate::ops::delete::MergeDocument;
use crate::ops::list::{Chain, Entry, ListOptions, ListReport, StoreEntry, list, weigh};
use crate::progress::{Cancel, Silent};
use crate::service::extract::{Asked, Body, Named, Operator, Reader};
use crate::service::jobs::plan as plan_delete;
use crate::service::jobs::request::{DeleteRequest, JobRequest};
use crate::service::problem::Problem;
use crate::service::state::Shared;
use crate::service::view::View;
use crate::service::words::Row;
use crate::store::scan::Finding;

/// The most of a list that is given at once, and what is given if nobody says.
const MOST: usize = 1000;
const USUAL: usize = 100;

/// Which of them, and from where on.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Filter {
    /// Only what has to do with members whose path on the store begins like that.
    prefix: Option<String>,
    /// Only of that store.
    store: Option<String>,
    /// Only what has a member in that state: one of those of members, where `settled` and `hidden` are also those whose
    /// rows say in other words that they are in use, or given up.
    state: Option<String>,
    /// How many, at most.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
    /// Behind that one: `next` of the answer before.
    after: Option<String>,
}

impl Filter {
    fn fits(&self, entry: &Entry) -> bool {
        let path = entry.member.strip_prefix(&format!("{}:", entry.store)).unwrap_or(&entry.member);
        self.prefix.as_ref().is_none_or(|prefix| path.starts_with(prefix.as_str()))
            && self.store.as_ref().is_none_or(|store| entry.store == *store)
            && self.state.as_ref().is_none_or(|state| is_in(entry, state))
    }
}

/// Whether a member is in a state. Settled ones with a row are in that row's state, which has several words for being in
/// use and for being given up.
fn is_in(entry: &Entry, state: &str) -> bool {
    let by_row = entry.record.as_ref().is_some_and(|record| entry.state == record.to_lowercase());
    let also = if entry.is_given_up() { "hidden" } else { "settled" };
    entry.state == state || (by_row && state == also)
}

/// A part of what is `named`, in the order of names; the name to go on behind, if there is more.
pub(super) fn page<T>(
    mut all: Vec<T>,
    name: impl Fn(&T) -> String,
    limit: Option<usize>,
    after: Option<&String>,
) -> Result<(Vec<T>, Option<String>), Problem> {
    let limit = limit.unwrap_or(USUAL);
    if limit == 0 || limit > MOST {
        return Err(Problem::usage(format!("limit is from 1 to {MOST}")));
    }
    all.sort_by_key(&name);
    all.retain(|one| after.is_none_or(|after| name(one) > *after));
    let more = all.len() > limit;
    all.truncate(limit);
    let next = all.last().filter(|_| more).map(name);
    Ok((all, next))
}

/// Chains.
#[derive(Debug, Serialize, ToSchema)]
pub struct ChainPage {
    /// The stores that were looked at.
    stores: Vec<StoreEntry>,
    /// The chains, by the names of their lowest members.
    chains: Vec<Chain>,
    /// What is worth telling about their members.
    findings: Vec<Finding>,
    /// Why it has no CloudStack rows although the service is told where they are; null if it has them, or no such
    /// place is known.
    rows_missing: Option<String>,
    /// What to give as `after` for those that follow; null if there are none.
    next: Option<String>,
}

/// A member with what CloudStack calls it.
#[derive(Debug, Serialize, ToSchema)]
pub struct MemberDocument {
    #[serde(flatten)]
    entry: Entry,
    /// As CloudStack's rows have it.
    row: Option<Row>,
}

/// Members.
#[derive(Debug, Serialize, ToSchema)]
pub struct MemberPage {
    /// The members, by their names.
    members: Vec<MemberDocument>,
    /// What is worth telling about them.
    findings: Vec<Finding>,
    /// Why it has no CloudStack rows although the service is told where they are; null if it has them, or no such
    /// place is known.
    rows_missing: Option<String>,
    /// What to give as `after` for those that follow; null if there are none.
    next: Option<String>,
}

/// What there is, and what is known of it.
struct Listed {
    view: View,
    report: ListReport,
    records: Option<Arc<Records>>,
    /// Why there are no rows.
    missing: Option<String>,
}

/// Lists are answered without rows where those cannot be read: the stores are there all the same.
fn listed(service: &Shared) -> Result<Listed, Problem> {
    let view = View::read(&service.config)?;
    let (records, missing) = match service.rows.get(&service.config) {
        Ok(records) => (records, None),
        Err(why) => (None, Some(why)),
    };
    let options = ListOptions { members: None, records: records.as_deref() };
    let report = list(&view.stores, &view.scan, &options, &Cancel::default())?;
    Ok(Listed { view, report, records, missing })
}

fn base(chain: &Chain) -> String {
    chain.members.first().map_or_else(String::new, |entry| entry.member.clone())
}

/// Chains with their members, base first.
#[utoipa::path(get, path = "/v1/chains", tag = "chains", params(Filter), responses(
    (status = 200, description = "A page of chains", body = ChainPage),
))]
pub async fn chains(
    _: Reader,
    State(service): State<Shared>,
    Asked(filter): Asked<Filter>,
) -> Result<Response, Problem> {
    let found = service.blocking(move |service| {
        let Listed { view, mut report, records, missing } = listed(service)?;
        report.chains.retain(|chain| chain.members.iter().any(|entry| filter.fits(entry)));
        let (mut chains, next) = page(report.chains, base, filter.limit, filter.after.as_ref())?;
        if let Some(records) = records {
            // Only of those that are shown: it reads tables.
            weigh(&view.stores, &view.scan, &records, &mut chains, &Silent, &Cancel::default())?;
        }
        let shown = |finding: &Finding| {
            chains.iter().flat_map(|chain| &chain.members).any(|entry| entry.member == finding.member)
        };
        report.findings.retain(shown);
        let ListReport { stores, findings, .. } = report;
        Ok(ChainPage { stores, chains, findings, rows_missing: missing, next })
    });
    Ok(document(&found.await?))
}

/// Members, one by one.
#[utoipa::path(get, path = "/v1/members", tag = "chains", params(Filter), responses(
    (status = 200, description = "A page of members", body = MemberPage),
))]
pub async fn members(
    _: Reader,
    State(service): State<Shared>,
    Asked(filter): Asked<Filter>,
) -> Result<Response, Problem> {
    let found = service.blocking(move |service| {
        let Listed { view, mut report, missing, .. } = listed(service)?;
        let all = report.chains.into_iter().flat_map(|chain| chain.members);
        let all: Vec<Entry> = all.filter(|entry| filter.fits(entry)).collect();
        let (entries, next) = page(all, |entry| entry.member.clone(), filter.limit, filter.after.as_ref())?;
        report.findings.retain(|finding| entries.iter().any(|entry| entry.member == finding.member));
        let ids: HashMap<String, NodeId> = view.scan.graph.ids().map(|id| (view.name(id), id)).collect();
        let row = |entry: &Entry| Row::of(&view, *ids.get(&entry.member)?);
        let members = entries.into_iter().map(|entry| MemberDocument { row: row(&entry), entry }).collect();
        Ok(MemberPage { members, findings: report.findings, rows_missing: missing, next })
    });
    Ok(document(&found.await?))
}

/// One member, by its name with or without its store. Not in the description: its name has slashes; `GET
/// /v1/members?prefix=` gives the same.
pub async fn member(
    _: Reader,
    State(service): State<Shared>,
    Named(name): Named<String>,
) -> Result<Response, Problem> {
    let found = service.blocking(move |service| {
        let Listed { view, report, .. } = listed(service)?;
        let id = crate::store::names::resolve_one(&view.stores, &view.scan, &name)?;
        let name = view.name(id);
        let entry = report.chains.into_iter().flat_map(|chain| chain.members);
        let entry = entry.into_iter().find(|entry| entry.member == name);
        let entry = entry.ok_or_else(|| Problem::not_found(format!("{name} is in no chain")))?;
        Ok(MemberDocument { row: Row::of(&view, id), entry })
    });
    Ok(document(&found.await?))
}

/// What a job would do; nothing is changed and no job is made. For `delete`; other kinds have no plan.
#[utoipa::path(post, path = "/v1/plans", tag = "chains", request_body = JobRequest, responses(
    (status = 200, description = "The plan, with no results", body = MergeDocument),
))]
pub async fn plan(
    _: Operator,
    State(service): State<Shared>,
    Body(request): Body<JobRequest>,
) -> Result<Response, Problem> {
    let JobRequest::Delete(request) = request else {
        let detail = format!("a job of kind {} has no plan", request.kind());
        return Err(Problem::new(Kind::Usage, Code::Unsupported, detail));
    };
    let plan = service.blocking(move |service| planned(service, &request));
    Ok(document(&plan.await?))
}

fn planned(service: &Shared, request: &DeleteRequest) -> Result<MergeDocument, Problem> {
    let view = crate::store::connect::connect(service.config.stores.clone()).map_err(OpError::from)?;
    Ok(plan_delete(&service.config, &view, request)?)
}
