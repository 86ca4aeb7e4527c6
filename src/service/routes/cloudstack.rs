//! CloudStack's commands, one call each: the JSON that agents get in, an answer out that says what to write into its rows.
//!
//! A command that was understood is answered with 200, also if it was refused: `result`, `handled` and `code` say so, as
//! an answer of CloudStack's would. What is no command is a problem.
#![expect(unused_qualifications, reason = "the macro that describes routes writes them")]

use std::time::{Duration, Instant};

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::document;
use super::jobs::JobDocument;
use crate::backend::FileKind;
use crate::chain::graph::NodeId;
use crate::cloudstack::paths::{Area, InstallPath, checkpoint_of, foreign_hypervisor};
use crate::cloudstack::prefix::StoreUrl;
use crate::failure::Code;
use crate::ids::StorePath;
use crate::ops::verify::{Level, Options, Verdict, verify};
use crate::progress::{Cancel, Silent};
use crate::service::auth::Caller;
use crate::service::extract::{Asked, Body, Named, Operator};
use crate::service::jobs::request::{DeleteRequest, Destination, FlattenRequest, JobRequest};
use crate::service::jobs::{Entry, FLATTENED_SUFFIX, New};
use crate::service::problem::Problem;
use crate::service::state::{Service, Shared};
use crate::service::view::{MemberName, View, now_ns};
use crate::service::words::Row;
use crate::store::jobs::{JobId, JobState};

/// How often a job that is waited for is looked at.
const BEAT: Duration = Duration::from_millis(50);

/// How long to wait.
#[derive(Clone, Copy, Debug, Default, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Patience {
    /// Answer with 202 and the job if the command is not done by then. Without, the answer comes when it is.
    wait_seconds: Option<u32>,
}

/// A file that is gone.
#[derive(Debug, Serialize, ToSchema)]
pub struct Removed {
    /// Its path on the store.
    install_path: String,
    /// Its checkpoint file, which went along.
    checkpoint_path: Option<String>,
}

/// The answer to a command.
#[derive(Debug, Default, Serialize, ToSchema)]
pub struct Answer {
    /// The class of the command, without its package.
    command: String,
    /// Whether it was done.
    result: bool,
    /// False: this is not qchain's, nothing was changed, CloudStack's own handler should go on.
    handled: bool,
    /// Why not; `qchain explain` knows it, or `other-hypervisor`, `not-a-snapshot`, `unknown-command`.
    code: Option<String>,
    /// In a sentence.
    details: String,
    /// The job that does it.
    #[schema(value_type = Option<String>)]
    job: Option<JobId>,
    /// Of a delete: what is gone.
    removed: Vec<Removed>,
    /// Of a delete: who got a new file, with all that changes in CloudStack's rows.
    survivors: Vec<Row>,
    /// Of a query for copy: what has to be copied, base first.
    files: Vec<String>,
    /// Of a conversion: the image that stands alone.
    snapshot: Option<Row>,
}

/// Why a command is not done.
enum Refusal {
    /// It is not qchain's.
    NotOurs(&'static str, String),
    /// It is, and cannot be done.
    Refused(String, String),
    /// It makes no sense at all.
    Problem(Problem),
}

impl<E: Into<Problem>> From<E> for Refusal {
    fn from(error: E) -> Self {
        let problem: Problem = error.into();
        Self::Refused(problem.code().to_owned(), problem.detail().to_owned())
    }
}

fn senseless(detail: impl Into<String>) -> Refusal {
    Refusal::Problem(Problem::usage(detail))
}

/// Does what a command of CloudStack's storage asks: `DeleteCommand`, `ConvertSnapshotCommand`,
/// `QuerySnapshotZoneCopyCommand`. A command that is sent again while its job runs waits for that one.
#[utoipa::path(post, path = "/v1/cloudstack/{command}", tag = "cloudstack",
    params(("command" = String, Path, description = "The class of the command, without its package"), Patience),
    request_body(content = Object, description = "The command as agents get it: {CLASS: {fields}}, alone or in a list"),
    responses(
        (status = 200, description = "The answer", body = Answer),
        (status = 202, description = "It is not done yet: the job", body = JobDocument),
))]
pub async fn command(
    Operator(caller): Operator,
    State(service): State<Shared>,
    Named(name): Named<String>,
    Asked(patience): Asked<Patience>,
    Body(body): Body<Value>,
) -> Result<Response, Problem> {
    let done = async {
        let fields = fields(&name, body)?;
        match name.as_str() {
            "DeleteCommand" => delete(&service, caller, fields, patience).await,
            "ConvertSnapshotCommand" => convert(&service, caller, fields, patience).await,
            "QuerySnapshotZoneCopyCommand" => query(&service, fields).await,
            _ => Err(Refusal::NotOurs("unknown-command", format!("{name} is not qchain's"))),
        }
    };
    let refused =
        |handled, code: String, details| Answer { handled, code: Some(code), details, ..Answer::default() };
    let answer = match done.await {
        Ok(Done::Answer(answer)) => *answer,
        Ok(Done::Waits(job)) => return Ok((StatusCode::ACCEPTED, document(&*job)).into_response()),
        Err(Refusal::NotOurs(code, details)) => {
            refused(false, code.to_owned(), format!("{details}; nothing was changed"))
        }
        Err(Refusal::Refused(code, details)) => refused(true, code, details),
        Err(Refusal::Problem(problem)) => return Err(problem),
    };
    tracing::info!(command = name, result = answer.result, code = answer.code, "answered a command");
    Ok(document(&Answer { command: name, ..answer }))
}

enum Done {
    Answer(Box<Answer>),
    Waits(Box<JobDocument>),
}

/// The fields of the one command in a body.
fn fields(name: &str, body: Value) -> Result<Map<String, Value>, Refusal> {
    let one = match body {
        Value::Array(mut all) if all.len() == 1 => all.pop().unwrap_or_default(),
        other => other,
    };
    let (class, fields) = unwrapped(&one);
    match (class, fields) {
        (Some(class), Some(fields)) if class == name => Ok(fields.clone()),
        (Some(class), _) => Err(senseless(format!("the body is a {class}, not a {name}"))),
        _ => Err(senseless("the body is not one command: {CLASS: {fields}}")),
    }
}

/// The class, without its package, and the fields of an object that is wrapped in its class; else its own fields.
fn unwrapped(value: &Value) -> (Option<&str>, Option<&Map<String, Value>>) {
    let Some(object) = value.as_object() else { return (None, None) };
    let mut only = object.iter();
    match (only.next(), only.next()) {
        (Some((class, Value::Object(fields))), None) if class.contains('.') => {
            (class.rsplit('.').next(), Some(fields))
        }
        _ => (None, Some(object)),
    }
}

fn text<'a>(fields: &'a Map<String, Value>, key: &str) -> &'a str {
    fields.get(key).and_then(Value::as_str).unwrap_or_default()
}

/// A snapshot of KVM on one of the stores.
struct Snapshot {
    path: StorePath,
    /// Its store's index.
    store: usize,
}

impl Snapshot {
    fn of(view: &View, value: Option<&Value>) -> Result<Self, Refusal> {
        let (class, fields) = value.map_or((None, None), unwrapped);
        let fields = fields.ok_or_else(|| senseless("the command has no object"))?;
        let other = |details: String| Refusal::NotOurs("other-hypervisor", details);
        let none = |details: String| Refusal::NotOurs("not-a-snapshot", details);
        if let Some(class) = class.filter(|class| *class != "SnapshotObjectTO") {
            return Err(none(format!("{class} is not a snapshot")));
        }
        let text_path = text(fields, "path").trim_start_matches('/');
        let hypervisor = text(fields, "hypervisorType");
        if !matches!(hypervisor, "" | "KVM") {
            return Err(other(format!("{text_path} is a snapshot of {hypervisor}")));
        }
        let path = StorePath::parse(text_path);
        let path = path.map_err(|_| none(format!("{text_path:?} is no install path")))?;
        if let Some(extension) = foreign_hypervisor(path.file_name()) {
            return Err(other(format!("{text_path} is a file of another hypervisor ({extension})")));
        }
        let store = store_of(view, fields.get("dataStore"))?;
        let stat = view.stores.get(store)?.backend().stat(&path);
        if stat.is_ok_and(|stat| stat.kind == FileKind::Directory) {
            return Err(other(format!("{text_path} is a directory, as VMware's snapshots are")));
        }
        if InstallPath::parse(&path).is_none_or(|parsed| parsed.area != Area::Snapshots) {
            return Err(none(format!("{text_path} is no snapshots/<account>/<volume>/<name>")));
        }
        let given = text(fields, "checkpointPath");
        // The path on the host that made it; CloudStack's own system VM cuts it here, too.
        let tail = given.find("checkpoints/").and_then(|at| given.get(at..)).unwrap_or(given);
        if !given.is_empty() && checkpoint_of(&path).is_none_or(|own| own.as_str() != tail) {
            let details = format!("{given} is not the checkpoint file of {path}");
            return Err(Refusal::Refused("checkpoint-path".to_owned(), details));
        }
        Ok(Self { path, store })
    }

    fn name(&self, view: &View) -> String {
        view.stores.display(&crate::chain::graph::Key { store: self.store, path: self.path.clone() })
    }

    fn id(&self, view: &View) -> Result<NodeId, Refusal> {
        Ok(view.member(&MemberName::Plain(self.name(view)))?)
    }
}

/// The store of a `dataStore`.
fn store_of(view: &View, value: Option<&Value>) -> Result<usize, Refusal> {
    let fields = value.and_then(|value| unwrapped(value).1);
    // As Gson writes NfsTO, whose fields begin with a line.
    let url = fields.map_or("", |fields| match text(fields, "_url") {
        "" => text(fields, "url"),
        url => url,
    });
    let parsed = StoreUrl::parse(url).ok();
    let same = |own: &StoreUrl| parsed.as_ref().is_some_and(|url| own.same_export(url));
    let mut stores = view.stores.iter();
    let found = stores.find(|(_, store)| store.config().url.as_ref().is_some_and(same));
    let absent =
        || Refusal::Refused(Code::StoreAbsent.as_str().to_owned(), format!("no store has the URL {url:?}"));
    found.map(|(index, _)| index).ok_or_else(absent)
}

/// Has a job made, or finds the one that does just that, and waits for it.
async fn job(
    service: &Shared,
    caller: Caller,
    request: JobRequest,
    patience: Patience,
) -> Result<Result<JobDocument, Box<JobDocument>>, Refusal> {
    if service.is_draining() {
        return Err(Refusal::Problem(Problem::unavailable("the service is ending")));
    }
    let made = service.blocking(move |service| {
        if let Some(entry) = live(service, &request) {
            return Ok(entry);
        }
        let new = New { request, made_by: caller.name, key: None };
        service.jobs.make(service, new).map(|made| made.entry)
    });
    let mut entry = made.await?;
    let id = entry.record.id.clone();
    let begun = Instant::now();
    let most = patience.wait_seconds.map(|seconds| Duration::from_secs(seconds.into()));
    while !entry.record.state.is_over() {
        if service.is_draining() {
            let detail = format!("the service is ending; job {id} is continued");
            return Err(Refusal::Problem(Problem::unavailable(detail)));
        }
        if most.is_some_and(|most| begun.elapsed() >= most) {
            return Ok(Err(Box::new(JobDocument::of(&entry))));
        }
        tokio::time::sleep(BEAT).await;
        entry = service.jobs.known(&id).ok_or_else(|| Problem::not_found(format!("job {id} is gone")))?;
    }
    let document = service.blocking(move |service| JobDocument::whole(service, &entry)).await?;
    match (&document.error, document.state) {
        (Some(error), _) => Err(Refusal::Refused(error.code.clone(), error.message.clone())),
        (None, JobState::Cancelled) => {
            Err(Refusal::Refused(Code::Cancelled.as_str().to_owned(), format!("job {id} was stopped")))
        }
        (None, _) => Ok(Ok(document)),
    }
}

/// A job that is not over and is asked just that.
fn live(service: &Service, request: &JobRequest) -> Option<Entry> {
    let value = serde_json::to_value(request).ok()?;
    let same = |entry: &Entry| !entry.record.state.is_over() && entry.record.request == value;
    service.jobs.all().into_iter().find(same)
}

async fn delete(
    service: &Shared,
    caller: Caller,
    fields: Map<String, Value>,
    patience: Patience,
) -> Result<Done, Refusal> {
    let (request, row) = off(service, move |service| {
        let view = View::read(&service.config)?;
        let snapshot = Snapshot::of(&view, fields.get("data"))?;
        let id = snapshot.id(&view)?;
        // CloudStack has given it up; what has no child is the newest that it wants gone.
        let request = DeleteRequest {
            members: vec![MemberName::Plain(snapshot.name(&view))],
            assume_deleted: true,
            end_of_chain: view.scan.graph.children(id).is_empty(),
            ..DeleteRequest::default()
        };
        let row = Row::of(&view, id).ok_or_else(|| Problem::not_found(snapshot.path.to_string()))?;
        Ok((JobRequest::Delete(request), row))
    })
    .await?;
    let document = match job(service, caller, request, patience).await? {
        Ok(document) => document,
        Err(waits) => return Ok(Done::Waits(waits)),
    };
    let survivors = document.result.as_ref().and_then(|result| result.get("survivors")).cloned();
    let survivors: Vec<Row> =
        survivors.and_then(|rows| serde_json::from_value(rows).ok()).unwrap_or_default();
    let details = match survivors.len() {
        0 => "removed".to_owned(),
        count => format!("merged into {count}"),
    };
    let removed = vec![Removed { install_path: row.install_path, checkpoint_path: row.checkpoint_path }];
    let job = Some(document.id);
    Ok(answered(Answer { details, job, removed, survivors, ..Answer::default() }))
}

async fn convert(
    service: &Shared,
    caller: Caller,
    fields: Map<String, Value>,
    patience: Patience,
) -> Result<Done, Refusal> {
    let (request, name) = off(service, move |service| {
        let view = View::read(&service.config)?;
        let object = fields.get("snapshotObjectTO").or_else(|| fields.get("snapshot"));
        let snapshot = Snapshot::of(&view, object)?;
        snapshot.id(&view)?;
        let name = snapshot.name(&view);
        let request = FlattenRequest::of(MemberName::Plain(name.clone()), Destination::Temporary);
        Ok((JobRequest::Flatten(request), name))
    })
    .await?;
    let document = match job(service, caller, request, patience).await? {
        Ok(document) => document,
        Err(waits) => return Ok(Done::Waits(waits)),
    };
    let image = format!("{name}{FLATTENED_SUFFIX}");
    let row = off(service, move |service| {
        let view = View::read(&service.config)?;
        Ok(Row::all(&view, [image.as_str()]).into_iter().next())
    });
    let (details, job) = (format!("{name} stands alone"), Some(document.id));
    Ok(answered(Answer { details, job, snapshot: row.await?, ..Answer::default() }))
}

fn answered(answer: Answer) -> Done {
    Done::Answer(Box::new(Answer { result: true, handled: true, ..answer }))
}

/// Runs what blocks.
async fn off<T: Send + 'static>(
    service: &Shared,
    work: impl FnOnce(&Shared) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Refusal> {
    service.blocking(move |service| Ok(work(service))).await?
}

async fn query(service: &Shared, fields: Map<String, Value>) -> Result<Done, Refusal> {
    off(service, move |service| {
        let view = View::read(&service.config)?;
        let snapshot = Snapshot::of(&view, fields.get("snapshot"))?;
        let mut chain = vec![snapshot.id(&view)?];
        while let Some(parent) = chain.last().and_then(|id| view.scan.graph.parent(*id)) {
            if chain.contains(&parent) {
                break;
            }
            chain.push(parent);
        }
        chain.reverse();
        let key = |id: &NodeId| &view.scan.graph.node(*id).key;
        if let Some(other) = chain.iter().map(key).find(|key| key.store != snapshot.store) {
            // A list of names cannot say on which store.
            let details = format!("{} lies on another store: this command names files of one", other.path);
            return Err(Refusal::Refused(Code::StoreAbsent.as_str().to_owned(), details));
        }
        sound(service, &view, &chain)?;
        let files: Vec<String> = chain.iter().map(|id| key(id).path.to_string()).collect();
        let details = format!("{} files, base first", files.len());
        Ok(answered(Answer { details, files, ..Answer::default() }))
    })
    .await
}

/// What is damaged here would be damaged there.
fn sound(service: &Service, view: &View, chain: &[NodeId]) -> Result<(), Refusal> {
    let options = Options {
        level: Level::Structure,
        fraction: None,
        seed: 0,
        deadline: None,
        note: false,
        all: false,
        now_ns: now_ns(),
    };
    let cancel = Cancel::default();
    let report = verify(&view.stores, &view.scan, chain, &options, &Silent, &cancel, &service.pace)?;
    let Some(bad) = report.checked.iter().find(|checked| checked.verdict != Verdict::Sound) else {
        return Ok(());
    };
    let finding = report.findings.iter().find(|finding| finding.member == bad.member);
    let code = finding.map_or("metadata-damaged", |finding| finding.code.as_str());
    Err(Refusal::Refused(code.to_owned(), format!("{} is not sound", bad.member)))
}
