//! What the documents of all verbs have in common, whoever shows them: the version, failures, times.

use std::time::{Duration, UNIX_EPOCH};

use serde::Serialize;

use crate::failure::{Code, Failure, Kind, with_causes};

/// The version of all JSON documents.
pub const SCHEMA: u32 = 1;

/// One JSON document: `"schema"`, and the keys of a report.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Document<'a, T: Serialize> {
    schema: u32,
    #[serde(flatten)]
    body: &'a T,
}

impl<'a, T: Serialize> Document<'a, T> {
    /// Of a report.
    pub fn of(body: &'a T) -> Self {
        Self { schema: SCHEMA, body }
    }
}

/// A failure, as JSON shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, utoipa::ToSchema)]
pub struct ErrorBody {
    /// Which kind of failure it is: what decides the exit code and the HTTP status.
    pub kind: &'static str,
    /// The stable reason code; `qchain explain` knows it.
    pub code: &'static str,
    /// What happened, with its causes.
    pub message: String,
    /// The member it is about.
    pub member: Option<String>,
}

impl ErrorBody {
    /// Of something that failed by the way, about no one member.
    #[must_use]
    pub fn new(kind: Kind, code: Code, message: String) -> Self {
        Self { kind: kind.word(), code: code.as_str(), message, member: None }
    }

    /// Of any failure.
    pub fn of(error: &impl Failure) -> Self {
        Self {
            kind: error.kind().word(),
            code: error.code().as_str(),
            message: with_causes(error),
            member: error.member().map(str::to_owned),
        }
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        format!("{} [{}]", self.message, self.code)
    }
}

/// A time as RFC 3339 has it, to the second, in UTC; `ns` counts from 1970.
#[must_use]
pub fn time(ns: i64) -> String {
    let since = Duration::from_nanos(u64::try_from(ns).unwrap_or_default());
    humantime::format_rfc3339_seconds(UNIX_EPOCH + since).to_string()
}
