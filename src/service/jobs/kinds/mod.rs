//! What each kind of job does: the verb with the terms of the service, its report as the command line's document.

mod copy;
mod delete;
mod flatten;
mod look;
mod reclaim;

use serde::Serialize;
use serde_json::Value;

use super::request::JobRequest;
use super::watch::Meter;
use crate::change::Site;
use crate::failure::{Failure, with_causes};
use crate::ops::delete::{Outcome as MergeOutcome, Report};
use crate::ops::document::Document;
use crate::ops::{OpError, Result};
use crate::progress::Cancel;
use crate::service::config::Config;
use crate::service::view::MemberName;
use crate::store::Stores;
use crate::store::jobs::{JobError, JobRecord};

pub use delete::{DeleteDocument, plan};
pub use flatten::FLATTENED_SUFFIX;
pub use reclaim::ReclaimDocument;

/// What a job works with.
pub struct Work<'a> {
    pub config: &'a Config,
    pub stores: &'a Stores,
    /// This job, where it changes stores; its limit on bytes is that of the service.
    pub site: &'a Site<'a>,
    pub cancel: &'a Cancel,
    pub meter: &'a Meter,
    pub record: &'a JobRecord,
    /// It was begun before, by whoever, and did not come to its end: what that decided counts as done.
    pub again: bool,
}

/// What a job ends with, if the verb could be run at all.
pub struct Outcome {
    /// The document of the command line.
    pub document: Value,
    /// The first of its parts that failed.
    pub error: Option<JobError>,
    pub written_bytes: u64,
    pub cloned_bytes: u64,
    pub freed_bytes: u64,
    pub read_bytes: u64,
}

impl Outcome {
    fn of(report: &impl Serialize, error: Option<JobError>) -> Self {
        let document = serde_json::to_value(Document::of(report)).unwrap_or_default();
        Self { document, error, written_bytes: 0, cloned_bytes: 0, freed_bytes: 0, read_bytes: 0 }
    }

    /// Of merges that were carried out.
    fn of_merges(document: &impl Serialize, report: &Report) -> Self {
        let sum = |of: fn(&MergeOutcome) -> u64| report.outcomes.iter().map(of).sum();
        Self {
            written_bytes: sum(|outcome| outcome.bytes_written + outcome.metadata_bytes_written),
            cloned_bytes: sum(|outcome| outcome.bytes_cloned),
            freed_bytes: sum(|outcome| outcome.bytes_freed_now),
            ..Self::of(document, report.first_failure().map(job_error))
        }
    }
}

/// A failure as records have it.
pub fn job_error(error: &impl Failure) -> JobError {
    JobError {
        kind: error.kind().word().to_owned(),
        code: error.code().as_str().to_owned(),
        message: with_causes(error),
        member: error.member().map(str::to_owned),
    }
}

/// Runs a job's verb. Blocks for as long as that takes; a stop is noticed between batches.
pub fn run(work: &Work<'_>, request: &JobRequest) -> Result<Outcome> {
    match request {
        JobRequest::Delete(request) => delete::run(work, request),
        JobRequest::Flatten(request) => flatten::run(work, request),
        JobRequest::Verify(request) => look::verify(work, request),
        JobRequest::Adopt(request) => look::adopt(work, request),
        JobRequest::Audit(request) => look::audit(work, request),
        JobRequest::Recover(request) => look::recover(work, request),
        JobRequest::Reclaim(request) => reclaim::run(work, request),
        JobRequest::Copy(request) => copy::run(work, request),
    }
}

/// The texts of members.
fn texts(stores: &Stores, names: &[MemberName]) -> Result<Vec<String>> {
    names.iter().map(|name| Ok(name.text(stores)?)).collect::<Result<_>>().map_err(|error: OpError| error)
}
