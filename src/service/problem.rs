//! Failures as HTTP answers: `application/problem+json` (RFC 9457) with the reason codes of the command line.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::failure::{Code, Failure, Kind, with_causes};

/// The status that a kind of failure is answered with.
#[must_use]
pub fn status(kind: Kind) -> StatusCode {
    match kind {
        Kind::Usage => StatusCode::BAD_REQUEST,
        Kind::NotFound => StatusCode::NOT_FOUND,
        Kind::Refused | Kind::Cancelled => StatusCode::CONFLICT,
        Kind::Damage | Kind::Corrupt => StatusCode::UNPROCESSABLE_ENTITY,
        Kind::Busy => StatusCode::LOCKED,
        Kind::NoSpace => StatusCode::INSUFFICIENT_STORAGE,
        Kind::Io => StatusCode::BAD_GATEWAY,
    }
}

/// Why a request was not answered as asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Problem(Box<ProblemBody>);

/// Why a request was not answered as asked, as it is sent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
#[schema(as = Problem)]
pub struct ProblemBody {
    /// `urn:qchain:` and the code.
    #[serde(rename = "type")]
    urn: String,
    /// What the code means.
    title: &'static str,
    /// The HTTP status.
    status: u16,
    /// What happened, with its causes.
    detail: String,
    /// The stable reason code; `qchain explain` knows it.
    code: &'static str,
    /// Which kind of failure it is.
    kind: &'static str,
    /// The member it is about.
    member: Option<String>,
}

impl Problem {
    /// Of a kind; that decides the status.
    #[must_use]
    pub fn new(kind: Kind, code: Code, detail: impl Into<String>) -> Self {
        Self(Box::new(ProblemBody {
            urn: format!("urn:qchain:{code}"),
            title: code.meaning(),
            status: status(kind).as_u16(),
            detail: detail.into(),
            code: code.as_str(),
            kind: kind.word(),
            member: None,
        }))
    }

    /// Of any failure.
    pub fn of(error: &impl Failure) -> Self {
        let mut problem = Self::new(error.kind(), error.code(), with_causes(error));
        problem.0.member = error.member().map(str::to_owned);
        problem
    }

    /// With a status that HTTP knows better.
    #[must_use]
    pub fn with_status(mut self, status: StatusCode) -> Self {
        self.0.status = status.as_u16();
        self
    }

    /// A request that makes no sense.
    #[must_use]
    pub fn usage(detail: impl Into<String>) -> Self {
        Self::new(Kind::Usage, Code::Usage, detail)
    }

    /// What is named is not there.
    #[must_use]
    pub fn not_found(detail: impl Into<String>) -> Self {
        Self::new(Kind::NotFound, Code::NotFound, detail)
    }

    /// The service is ending, or too busy.
    #[must_use]
    pub fn unavailable(detail: impl Into<String>) -> Self {
        Self::new(Kind::Busy, Code::Unavailable, detail).with_status(StatusCode::SERVICE_UNAVAILABLE)
    }

    /// The reason code.
    #[must_use]
    pub fn code(&self) -> &'static str {
        self.0.code
    }

    /// What happened.
    #[must_use]
    pub fn detail(&self) -> &str {
        &self.0.detail
    }
}

impl<E: Failure> From<E> for Problem {
    fn from(error: E) -> Self {
        Self::of(&error)
    }
}

/// The code of an answer, for who counts them.
#[derive(Clone, Copy, Debug)]
pub struct AnswerCode(pub &'static str);

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let code = AnswerCode(self.0.code);
        let body = serde_json::to_vec(&self.0).unwrap_or_default();
        let mut response = (status, body).into_response();
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        if status == StatusCode::UNAUTHORIZED {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        if status == StatusCode::SERVICE_UNAVAILABLE {
            headers.insert(header::RETRY_AFTER, HeaderValue::from_static("5"));
        }
        response.extensions_mut().insert(code);
        response
    }
}

#[cfg(test)]
mod tests {
    use super::Problem;
    use crate::failure::{Code, Kind};

    #[test]
    fn a_problem_has_the_words_of_the_command_line() {
        let problem = serde_json::to_value(Problem::new(Kind::NoSpace, Code::NoSpace, "x")).unwrap();
        assert_eq!(problem["status"], 507);
        assert_eq!(problem["type"], "urn:qchain:no-space");
        assert_eq!((&problem["kind"], &problem["code"]), (&"no-space".into(), &"no-space".into()));
    }
}
