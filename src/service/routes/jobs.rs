//! Jobs: made, listed, looked at, watched, stopped.
#![expect(unused_qualifications, reason = "the macro that describes routes writes them")]

use std::convert::Infallible;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use tokio_stream::wrappers::ReceiverStream;
use utoipa::{IntoParams, ToSchema};

use super::chains::page;
use super::document;
use crate::ops::adopt::AdoptReport;
use crate::ops::audit::AuditReport;
use crate::ops::copy::CopyReport;
use crate::ops::document::{SCHEMA, time};
use crate::ops::flatten::FlattenReport;
use crate::ops::recover::RecoverReport;
use crate::ops::verify::VerifyReport;
use crate::service::extract::{Asked, Body, Named, Operator, Reader};
use crate::service::jobs::request::JobRequest;
use crate::service::jobs::watch::Pulse;
use crate::service::jobs::{DeleteDocument, Entry, New, ReclaimDocument};
use crate::service::problem::Problem;
use crate::service::state::{Service, Shared};
use crate::store::connect::connect;
use crate::store::jobs::{JobError, JobId, JobShelf, JobState};

/// The longest idempotency key, in bytes.
const LONGEST_KEY: usize = 255;
/// How often a watcher is told.
const BEAT: Duration = Duration::from_millis(250);

/// A job.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct JobDocument {
    /// Its id.
    #[schema(value_type = String)]
    pub id: JobId,
    /// Which kind of job it is.
    pub kind: String,
    /// What is the case with it.
    pub state: JobState,
    /// The store that has its record.
    pub store: String,
    /// What is asked for, with all members by their full names.
    #[schema(value_type = JobRequest)]
    pub request: serde_json::Value,
    /// The lowest members of the chains that it is about; none if it is about all.
    pub chains: Vec<String>,
    /// The name of the token that asked for it.
    pub made_by: String,
    /// When it was made.
    pub made: String,
    /// When it was begun first.
    pub begun: Option<String>,
    /// When it was over.
    pub ended: Option<String>,
    /// How often it was begun and not ended in good order.
    pub attempts: u32,
    /// How it comes along; of a job that another instance works on, as that told a few seconds ago. Null if it does not
    /// run, or nothing is known yet.
    pub progress: Option<Pulse>,
    /// Why it failed.
    pub error: Option<JobError>,
    /// The document of the command line, when it is over; not in lists.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<JobResult>)]
    pub result: Option<serde_json::Value>,
}

/// What a job of each kind ends with: the documents of the command line.
#[derive(Serialize, ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "only its description is used: results are kept as they were written")]
pub enum JobResult {
    /// Of `delete`.
    Delete(DeleteDocument),
    /// Of `verify`.
    Verify(VerifyReport),
    /// Of `adopt`.
    Adopt(AdoptReport),
    /// Of `flatten`.
    Flatten(FlattenReport),
    /// Of `audit`.
    Audit(AuditReport),
    /// Of `recover`.
    Recover(RecoverReport),
    /// Of `reclaim`.
    Reclaim(ReclaimDocument),
    /// Of `copy`.
    Copy(CopyReport),
}

/// Jobs.
#[derive(Debug, Serialize, ToSchema)]
pub struct JobPage {
    /// The jobs, oldest first.
    jobs: Vec<JobDocument>,
    /// What to give as `after` for those that follow; null if there are none.
    next: Option<String>,
}

/// Which jobs, and from where on.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct JobFilter {
    /// Only in that state.
    state: Option<JobState>,
    /// Only of that kind.
    kind: Option<String>,
    /// How many, at most.
    #[param(minimum = 1, maximum = 1000)]
    limit: Option<usize>,
    /// Behind that one: `next` of the answer before.
    after: Option<String>,
}

impl JobDocument {
    /// Of a job, without its result.
    pub fn of(entry: &Entry) -> Self {
        let record = &entry.record;
        Self {
            id: record.id.clone(),
            kind: record.kind.clone(),
            state: record.state,
            store: entry.home.clone(),
            request: record.request.clone(),
            chains: record.chains.clone(),
            made_by: record.made_by.clone(),
            made: time(record.made_ns),
            begun: record.begun_ns.map(time),
            ended: record.ended_ns.map(time),
            attempts: record.attempts,
            progress: entry.pulse(),
            error: record.error.clone(),
            result: None,
        }
    }

    /// With its result, if it has one. Blocks.
    pub fn whole(service: &Service, entry: &Entry) -> Result<Self, Problem> {
        let mut document = Self::of(entry);
        if entry.record.state.is_over() {
            let stores = connect(service.config.stores.clone())?;
            if let Some((_, store)) = stores.named(&entry.home) {
                let bytes = JobShelf::new(store)?.result(&entry.record.id)?;
                document.result = bytes.and_then(|bytes| serde_json::from_slice(&bytes).ok());
            }
        }
        Ok(document)
    }
}

fn id_of(text: &str) -> Result<JobId, Problem> {
    JobId::parse(text).ok_or_else(|| Problem::not_found(format!("there is no job {text:?}")))
}

fn no_job(id: &JobId) -> Problem {
    Problem::not_found(format!("there is no job {id}"))
}

fn key(headers: &HeaderMap) -> Result<Option<String>, Problem> {
    let Some(value) = headers.get("idempotency-key") else { return Ok(None) };
    let text = value.to_str().ok().filter(|text| !text.is_empty() && text.len() <= LONGEST_KEY);
    let text =
        text.ok_or_else(|| Problem::usage("the idempotency key is empty, too long, or no plain text"))?;
    Ok(Some(text.to_owned()))
}

/// Makes a job. With the header `Idempotency-Key` a request that is sent again gives the job that it made.
#[utoipa::path(post, path = "/v1/jobs", tag = "jobs", request_body = JobRequest,
    params(("Idempotency-Key" = Option<String>, Header, description = "Of the sender's making, at most 255 characters")),
    responses(
        (status = 202, description = "The job that was made", body = JobDocument),
        (status = 200, description = "The job that an earlier request with this key made", body = JobDocument),
))]
pub async fn create(
    Operator(caller): Operator,
    State(service): State<Shared>,
    headers: HeaderMap,
    Body(request): Body<JobRequest>,
) -> Result<Response, Problem> {
    if service.is_draining() {
        return Err(Problem::unavailable("the service is ending"));
    }
    let new = New { request, made_by: caller.name, key: key(&headers)? };
    let (document, new) = service
        .blocking(move |service| {
            let made = service.jobs.make(service, new)?;
            Ok((JobDocument::whole(service, &made.entry)?, made.new))
        })
        .await?;
    tracing::info!(job = %document.id, kind = document.kind, new, "asked for a job");
    let status = if new { StatusCode::ACCEPTED } else { StatusCode::OK };
    let mut response = (status, with_schema(&document)).into_response();
    if let Ok(place) = HeaderValue::from_str(&format!("/v1/jobs/{}", document.id)) {
        response.headers_mut().insert(header::LOCATION, place);
    }
    Ok(response)
}

fn with_schema(document: &JobDocument) -> Json<serde_json::Value> {
    let mut value = serde_json::to_value(document).unwrap_or_default();
    if let Some(object) = value.as_object_mut() {
        object.insert("schema".to_owned(), SCHEMA.into());
    }
    Json(value)
}

/// All jobs that are kept, of all instances.
#[utoipa::path(get, path = "/v1/jobs", tag = "jobs", params(JobFilter), responses(
    (status = 200, description = "A page of jobs", body = JobPage),
))]
pub async fn list(
    _: Reader,
    State(service): State<Shared>,
    Asked(filter): Asked<JobFilter>,
) -> Result<Response, Problem> {
    let mut all = service.jobs.all();
    all.retain(|entry| {
        filter.state.is_none_or(|state| entry.record.state == state)
            && filter.kind.as_ref().is_none_or(|kind| entry.record.kind == *kind)
    });
    // The time first, so that names sort by it.
    let name = |entry: &Entry| format!("{:020}-{}", entry.record.made_ns, entry.record.id);
    let (entries, next) = page(all, name, filter.limit, filter.after.as_ref())?;
    Ok(document(&JobPage { jobs: entries.iter().map(JobDocument::of).collect(), next }))
}

/// One job, with its result.
#[utoipa::path(get, path = "/v1/jobs/{id}", tag = "jobs", params(("id" = String, Path, description = "The job's id")), responses(
    (status = 200, description = "The job", body = JobDocument),
))]
pub async fn get(
    _: Reader,
    State(service): State<Shared>,
    Named(id): Named<String>,
) -> Result<Response, Problem> {
    let id = id_of(&id)?;
    let found = service.blocking(move |service| {
        let entry = service.jobs.get(service, &id)?.ok_or_else(|| no_job(&id))?;
        JobDocument::whole(service, &entry)
    });
    Ok(with_schema(&found.await?).into_response())
}

/// Stops a job at its next safe point. Nothing happens to one that is over.
#[utoipa::path(post, path = "/v1/jobs/{id}/cancel", tag = "jobs", params(("id" = String, Path, description = "The job's id")), responses(
    (status = 202, description = "The job; it may run for a moment still", body = JobDocument),
))]
pub async fn cancel(
    Operator(caller): Operator,
    State(service): State<Shared>,
    Named(id): Named<String>,
) -> Result<Response, Problem> {
    let id = id_of(&id)?;
    tracing::info!(job = %id, by = caller.name, "asked to stop a job");
    let found = service.blocking(move |service| {
        let cancelled = service.jobs.cancel(service, &id)?.ok_or_else(|| no_job(&id))?;
        JobDocument::whole(service, &cancelled.0)
    });
    Ok((StatusCode::ACCEPTED, with_schema(&found.await?)).into_response())
}

/// How a job comes along, as server-sent events: `job` (the job without result) whenever its state or progress changes,
/// `end` (the job with its result) when it is over, after which the stream ends. It also ends when the service does.
#[utoipa::path(get, path = "/v1/jobs/{id}/events", tag = "jobs", params(("id" = String, Path, description = "The job's id")), responses(
    (status = 200, description = "Events whose data is a job", content_type = "text/event-stream", body = String),
))]
pub async fn events(
    _: Reader,
    State(service): State<Shared>,
    Named(id): Named<String>,
) -> Result<Response, Problem> {
    let id = id_of(&id)?;
    let asked = id.clone();
    let entry = service.blocking(move |service| service.jobs.get(service, &asked)).await?;
    let first = entry.ok_or_else(|| no_job(&id))?;
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Event, Infallible>>(4);
    tokio::spawn(async move {
        let mut told = None;
        let mut entry = first;
        while !service.is_draining() {
            if entry.record.state.is_over() {
                let ended = service.blocking(move |service| JobDocument::whole(service, &entry)).await;
                if let Ok(document) = ended {
                    let _ = sender.send(Ok(event("end", &document))).await;
                }
                return;
            }
            let document = JobDocument::of(&entry);
            let now = (document.state, document.progress.clone());
            if told.as_ref() != Some(&now) {
                told = Some(now);
                if sender.send(Ok(event("job", &document))).await.is_err() {
                    return;
                }
            }
            tokio::time::sleep(BEAT).await;
            if sender.is_closed() {
                return;
            }
            // One that another instance made may not have been met by the poll yet; one that was removed has no more to tell.
            let mut known = service.jobs.known(&id);
            if known.is_none() {
                let asked = id.clone();
                known =
                    service.blocking(move |service| service.jobs.get(service, &asked)).await.ok().flatten();
            }
            let Some(next) = known else { return };
            entry = next;
        }
    });
    Ok(Sse::new(ReceiverStream::new(receiver)).keep_alive(KeepAlive::default()).into_response())
}

fn event(name: &str, document: &JobDocument) -> Event {
    let Json(value) = with_schema(document);
    Event::default().event(name).data(value.to_string())
}
