//! What handlers take from a request. Every refusal is a [`Problem`].

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use serde::de::DeserializeOwned;

use super::auth::{Caller, Scope};
use super::problem::Problem;
use super::state::Shared;
use crate::failure::{Code, Kind};

/// Who asks, with at least the scope `read`.
pub struct Reader;
/// Who asks, with at least the scope `operate`.
pub struct Operator(pub Caller);
/// Who asks, with the scope `admin`.
pub struct Admin(pub Caller);
/// Who asks, and may copy members: the scope `peer`, or at least `operate`.
pub struct Copier(pub Caller);

fn caller(parts: &Parts, service: &Shared, least: Scope) -> Result<Caller, Problem> {
    let unknown = |detail: &str| {
        Problem::new(Kind::Refused, Code::Unauthorized, detail).with_status(StatusCode::UNAUTHORIZED)
    };
    let given = parts.headers.get(header::AUTHORIZATION).ok_or_else(|| unknown("no bearer token"))?;
    let token = given.to_str().ok().and_then(|text| {
        let (scheme, token) = text.split_once(' ')?;
        scheme.eq_ignore_ascii_case("Bearer").then(|| token.trim())
    });
    let token = token.ok_or_else(|| unknown("the authorization is no bearer token"))?;
    let tokens = service.tokens();
    let caller = tokens.find(token).ok_or_else(|| unknown("the bearer token is not known"))?;
    if caller.scope < least {
        let detail =
            format!("{} has the scope {}; {} is needed", caller.name, caller.scope.word(), least.word());
        let problem = Problem::new(Kind::Refused, Code::Forbidden, detail);
        return Err(problem.with_status(StatusCode::FORBIDDEN));
    }
    Ok(caller.clone())
}

impl FromRequestParts<Shared> for Reader {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, service: &Shared) -> Result<Self, Problem> {
        caller(parts, service, Scope::Read).map(|_| Self)
    }
}

impl FromRequestParts<Shared> for Operator {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, service: &Shared) -> Result<Self, Problem> {
        caller(parts, service, Scope::Operate).map(Self)
    }
}

impl FromRequestParts<Shared> for Admin {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, service: &Shared) -> Result<Self, Problem> {
        caller(parts, service, Scope::Admin).map(Self)
    }
}

impl FromRequestParts<Shared> for Copier {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, service: &Shared) -> Result<Self, Problem> {
        let caller = caller(parts, service, Scope::Peer)?;
        if caller.scope == Scope::Read {
            let detail = format!("{} has the scope read; peer or operate is needed", caller.name);
            let problem = Problem::new(Kind::Refused, Code::Forbidden, detail);
            return Err(problem.with_status(StatusCode::FORBIDDEN));
        }
        Ok(Self(caller))
    }
}

/// A JSON body.
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Shared> for Body<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, service: &Shared) -> Result<Self, Problem> {
        match Json::<T>::from_request(request, service).await {
            Ok(Json(body)) => Ok(Self(body)),
            Err(error) => Err(bad_body(&error)),
        }
    }
}

fn bad_body(error: &JsonRejection) -> Problem {
    match error.status() {
        StatusCode::PAYLOAD_TOO_LARGE => {
            Problem::new(Kind::Usage, Code::TooLarge, "the body is larger than 1 MiB")
                .with_status(StatusCode::PAYLOAD_TOO_LARGE)
        }
        // What is JSON and not what was expected is as wrong a request as what is none.
        StatusCode::UNPROCESSABLE_ENTITY => Problem::usage(error.body_text()),
        status => Problem::usage(error.body_text()).with_status(status),
    }
}

/// The parameters behind the question mark.
pub struct Asked<T>(pub T);

impl<T: DeserializeOwned> FromRequestParts<Shared> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, service: &Shared) -> Result<Self, Problem> {
        let asked: Result<Query<T>, QueryRejection> = Query::from_request_parts(parts, service).await;
        asked.map(|Query(asked)| Self(asked)).map_err(|error| Problem::usage(error.body_text()))
    }
}

/// The part of the path that is a parameter.
pub struct Named<T>(pub T);

impl<T: DeserializeOwned + Send> FromRequestParts<Shared> for Named<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, service: &Shared) -> Result<Self, Problem> {
        let named: Result<Path<T>, PathRejection> = Path::from_request_parts(parts, service).await;
        named.map(|Path(named)| Self(named)).map_err(|error| Problem::usage(error.body_text()))
    }
}
