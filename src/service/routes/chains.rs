//! Chains and members, and plans.
#![expect(unused_qualifications, reason = "the macro that describes routes writes them")]

use std::collections::HashMap;

use axum::extract::State;
use axum::response::Response;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::document;
use crate::chain::graph::NodeId;
use crate::failure::{Code, Kind};
use crate::ops::OpError;
use crate::ops::delete::MergeDocument;
use crate::ops::list::{Chain, Entry, ListOptions, ListReport, StoreEntry, list};
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
    /// Only what has a member in that state.
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
            && self.state.as_ref().is_none_or(|state| entry.state == *state)
    }
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
    /// What to give as `after` for those that follow; null if there are none.
    next: Option<String>,
}

fn listed(service: &Shared) -> Result<(View, ListReport), Problem> {
    let view = View::read(&service.config)?;
    let cancel = Cancel::default();
    let report = list(&view.stores, &view.scan, &ListOptions::default(), &Silent, &cancel)?;
    Ok((view, report))
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
        let (_, mut report) = listed(service)?;
        report.chains.retain(|chain| chain.members.iter().any(|entry| filter.fits(entry)));
        let (chains, next) = page(report.chains, base, filter.limit, filter.after.as_ref())?;
        let shown = |finding: &Finding| {
            chains.iter().flat_map(|chain| &chain.members).any(|entry| entry.member == finding.member)
        };
        report.findings.retain(shown);
        Ok(ChainPage { stores: report.stores, chains, findings: report.findings, next })
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
        let (view, mut report) = listed(service)?;
        let all = report.chains.into_iter().flat_map(|chain| chain.members);
        let all: Vec<Entry> = all.filter(|entry| filter.fits(entry)).collect();
        let (entries, next) = page(all, |entry| entry.member.clone(), filter.limit, filter.after.as_ref())?;
        report.findings.retain(|finding| entries.iter().any(|entry| entry.member == finding.member));
        let ids: HashMap<String, NodeId> = view.scan.graph.ids().map(|id| (view.name(id), id)).collect();
        let row = |entry: &Entry| Row::of(&view, *ids.get(&entry.member)?);
        let members = entries.into_iter().map(|entry| MemberDocument { row: row(&entry), entry }).collect();
        Ok(MemberPage { members, findings: report.findings, next })
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
        let (view, report) = listed(service)?;
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
