//! The routes: requests in, documents out.

pub mod chains;
mod cloudstack;
mod downloads;
pub mod jobs;
mod page;
mod peer;
mod service;

use axum::extract::{DefaultBodyLimit, MatchedPath, Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, header};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse as _, Response};
use axum::{Json, Router};
use serde::Serialize;
use std::time::{Duration, Instant};
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::timeout::RequestBodyTimeoutLayer;
use tracing::Instrument as _;
use utoipa::openapi::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::problem::{AnswerCode, Problem};
use super::state::Shared;
use crate::failure::{Code, Kind};

/// The largest body, in bytes.
const MAX_BODY: usize = 1 << 20;
/// How long a body may pause.
const SLOW_BODY: Duration = Duration::from_secs(30);
/// The longest id of a request that is taken from its sender.
const LONGEST_ID: usize = 64;
static REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// All routes, with what is said of them.
fn documented() -> OpenApiRouter<Shared> {
    OpenApiRouter::new()
        .routes(routes!(service::healthz))
        .routes(routes!(service::readyz))
        .routes(routes!(service::metrics))
        .routes(routes!(service::openapi))
        .routes(routes!(service::limits, service::set_limits))
        .routes(routes!(chains::chains))
        .routes(routes!(chains::members))
        .routes(routes!(chains::plan))
        .routes(routes!(jobs::list, jobs::create))
        .routes(routes!(jobs::get))
        .routes(routes!(jobs::cancel))
        .routes(routes!(jobs::events))
        .routes(routes!(cloudstack::command))
        .routes(routes!(downloads::create))
        .routes(routes!(downloads::image))
        .routes(routes!(peer::chain))
        .routes(routes!(peer::table))
        .routes(routes!(peer::blocks))
        .routes(routes!(peer::checkpoint))
        .routes(routes!(page::allocation))
        .routes(routes!(page::debt))
        .routes(routes!(page::index))
        .routes(routes!(page::file))
}

/// What is said of all routes.
pub fn described() -> OpenApi {
    documented().into_openapi()
}

/// The whole application.
pub fn router(service: &Shared) -> Router {
    let (router, _) = documented().split_for_parts();
    router
        // A member's path has slashes, which OpenAPI cannot say of a parameter.
        .route("/v1/members/{*member}", axum::routing::get(chains::member).post(downloads::of_member))
        .fallback(nothing)
        .method_not_allowed_fallback(other_method)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(RequestBodyTimeoutLayer::new(SLOW_BODY))
        .layer(CatchPanicLayer::custom(|_| {
            Problem::new(Kind::Io, Code::Io, "the request ended by a panic: see the log")
                .with_status(axum::http::StatusCode::INTERNAL_SERVER_ERROR)
                .into_response()
        }))
        .layer(from_fn_with_state(service.clone(), around))
        .with_state(service.clone())
}

async fn nothing() -> Problem {
    Problem::not_found("there is no such route")
}

async fn other_method() -> Problem {
    Problem::usage("the route has no such method").with_status(axum::http::StatusCode::METHOD_NOT_ALLOWED)
}

/// A document with `"schema"`.
fn document(body: &impl Serialize) -> Response {
    Json(crate::ops::document::Document::of(body)).into_response()
}

/// What surrounds each request: its id, its line in the log, its figures, headers that all answers have.
async fn around(State(service): State<Shared>, request: Request, next: Next) -> Response {
    let id = request_id(request.headers());
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map_or("none", MatchedPath::as_str).to_owned();
    // The path and nothing behind the question mark, where the signature of a download stands.
    let path = request.uri().path().to_owned();
    let span = tracing::info_span!("request", %id, %method, %path);
    let started = Instant::now();
    let mut response = next.run(request).instrument(span.clone()).await;
    let (took, status) = (started.elapsed(), response.status().as_u16());
    let code = response.extensions().get::<AnswerCode>().map(|code| code.0);
    if let Some(code) = code {
        service.metrics.count_error(code);
    }
    service.metrics.count_request(&route, known(&method), status, took);
    let milliseconds = u64::try_from(took.as_millis()).unwrap_or(u64::MAX);
    tracing::info!(parent: &span, status, code, milliseconds, "answered");
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(&id) {
        headers.insert(REQUEST_ID.clone(), value);
    }
    headers.entry(header::CACHE_CONTROL).or_insert(HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    response
}

/// A method's name for figures: whoever sends made-up ones makes no new figures.
fn known(method: &axum::http::Method) -> &'static str {
    match method.as_str() {
        "GET" => "GET",
        "HEAD" => "HEAD",
        "POST" => "POST",
        "PUT" => "PUT",
        "DELETE" => "DELETE",
        _ => "other",
    }
}

/// The id that the sender gave the request, if it is one, or a new one.
fn request_id(headers: &HeaderMap) -> String {
    let plain = |text: &&str| {
        let fits = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        !text.is_empty() && text.len() <= LONGEST_ID && text.bytes().all(fits)
    };
    let given = headers.get(&REQUEST_ID).and_then(|value| value.to_str().ok()).filter(plain);
    given.map_or_else(|| uuid::Uuid::new_v4().simple().to_string(), str::to_owned)
}
