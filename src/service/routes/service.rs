//! The service itself: health, figures, its own description, limits.

use axum::Json;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::document;
use crate::service::extract::{Admin, Body, Reader};
use crate::service::health::HealthReport;
use crate::service::openapi;
use crate::service::problem::Problem;
use crate::service::state::Shared;

fn health(report: &HealthReport, good: bool) -> Response {
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, document(report)).into_response()
}

/// Whether the stores are mounted, the ones they were, and answer.
#[utoipa::path(get, path = "/healthz", tag = "service", security(()), responses(
    (status = 200, description = "All stores are there", body = HealthReport),
    (status = 503, description = "One is not, or does not answer in time", body = HealthReport),
))]
pub async fn healthz(State(service): State<Shared>) -> Response {
    let report = service.health.look(&service).await;
    let good = report.stores.iter().all(|store| store.ready);
    health(&report, good)
}

/// Whether requests should be sent here: as health, and the service is not ending.
#[utoipa::path(get, path = "/readyz", tag = "service", security(()), responses(
    (status = 200, description = "Ready", body = HealthReport),
    (status = 503, description = "Not ready", body = HealthReport),
))]
pub async fn readyz(State(service): State<Shared>) -> Response {
    let report = service.health.look(&service).await;
    health(&report, report.status == "ok")
}

/// Figures for Prometheus.
#[utoipa::path(get, path = "/metrics", tag = "service", responses(
    (status = 200, description = "OpenMetrics text", content_type = "application/openmetrics-text", body = String),
))]
pub async fn metrics(_: Reader, State(service): State<Shared>) -> Result<Response, Problem> {
    let text = service.blocking(|service| service.metrics.text(service)).await?;
    let kind = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");
    Ok(([(header::CONTENT_TYPE, kind)], text).into_response())
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "service", responses(
    (status = 200, description = "OpenAPI 3.1", body = Object),
))]
pub async fn openapi(_: Reader) -> Response {
    Json(openapi::document()).into_response()
}

/// What all jobs together may do.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// The most bytes that are moved a second; 0 for no limit.
    rate_bytes_per_second: u64,
}

/// The limits that hold.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct LimitsInForce {
    /// The most bytes that are moved a second; 0 for no limit.
    rate_bytes_per_second: u64,
}

/// The limits that hold now.
#[utoipa::path(get, path = "/v1/limits", tag = "service", responses((status = 200, description = "The limits", body = LimitsInForce)))]
pub async fn limits(_: Reader, State(service): State<Shared>) -> Response {
    document(&LimitsInForce { rate_bytes_per_second: service.pace.bytes_per_second() })
}

/// Changes the limits, also of jobs that run, until the service ends.
#[utoipa::path(put, path = "/v1/limits", tag = "service", request_body = Limits,
    responses((status = 200, description = "The limits that hold from now on", body = LimitsInForce)))]
pub async fn set_limits(
    Admin(caller): Admin,
    State(service): State<Shared>,
    Body(limits): Body<Limits>,
) -> Response {
    let rate_bytes_per_second = limits.rate_bytes_per_second;
    service.pace.set(rate_bytes_per_second);
    tracing::info!(by = caller.name, rate = rate_bytes_per_second, "the limit was changed");
    document(&LimitsInForce { rate_bytes_per_second })
}
