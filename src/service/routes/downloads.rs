//! Downloads: a signed URL of a member's image, and the image at that URL.
#![expect(unused_qualifications, reason = "the macro that describes routes writes them")]

use axum::body::Body as Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::document;
use crate::failure::{Code, Kind};
use crate::ops::document::time;
use crate::service::downloads::body::body;
use crate::service::downloads::file_name;
use crate::service::downloads::opened::Opened;
use crate::service::downloads::range::{Wanted, wanted};
use crate::service::downloads::sign::Grant;
use crate::service::extract::{Asked, Body, Named, Operator};
use crate::service::jobs::request::Format;
use crate::service::problem::{Problem, ProblemBody};
use crate::service::state::{Service, Shared};
use crate::service::view::{MemberName, View, now_ns};
use crate::store::connect::connect;

/// How long a URL holds if nobody says, and at most, in seconds: an hour, a week.
const USUAL: u32 = 3600;
const LONGEST: u32 = 7 * 24 * 3600;
/// What stands behind a member's path to ask for its URL.
const SUFFIX: &str = "/download";

/// How an image is wanted.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Terms {
    /// Its format.
    #[serde(default)]
    format: Format,
    /// How long the URL holds, in seconds; 3600 if nothing is given.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 604_800)]
    expires_seconds: Option<u32>,
}

/// An image that is wanted.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DownloadRequest {
    /// The member.
    member: MemberName,
    /// The format of the image.
    #[serde(default)]
    format: Format,
    /// How long the URL holds, in seconds; 3600 if nothing is given.
    #[serde(default)]
    #[schema(minimum = 1, maximum = 604_800)]
    expires_seconds: Option<u32>,
}

/// Where an image is.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct DownloadDocument {
    /// The member, by its full name.
    member: String,
    /// The format of the image.
    format: Format,
    /// Path and query of the URL, good at every instance on the store. Whoever has it has the image: keep it secret.
    path: String,
    /// The same at the host of this request.
    url: String,
    /// When it ends; what has begun by then goes on.
    expires: String,
    /// The length of the image in bytes.
    length: u64,
    /// The size of its disk in bytes.
    virtual_size: u64,
    /// Its strong validator, as the header `ETag` has it: the same bytes wherever it is the same. Null while a member of
    /// the chain is not adopted: then a download cannot be continued safely once the member was changed.
    etag: Option<String>,
}

/// What a URL grants, and the signature.
#[derive(Clone, Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct Signed {
    /// The member.
    member: String,
    /// The format.
    format: Format,
    /// Until when, in seconds since 1970.
    expires: u64,
    /// 64 hex digits.
    signature: String,
}

/// A URL that needs no token, for a while, at which a member's image is. The image is made while it is read: no file is
/// made for it. Needs `operate`: whoever may look at chains may not read what is in them.
#[utoipa::path(post, path = "/v1/downloads", tag = "downloads", request_body = DownloadRequest, responses(
    (status = 200, description = "Where the image is", body = DownloadDocument),
))]
pub async fn create(
    Operator(caller): Operator,
    State(service): State<Shared>,
    headers: HeaderMap,
    Body(request): Body<DownloadRequest>,
) -> Result<Response, Problem> {
    let DownloadRequest { member, format, expires_seconds } = request;
    granted(&service, &caller.name, &headers, member, Terms { format, expires_seconds }).await
}

/// The same by the member's path: `POST /v1/members/PATH/download`. Not in the description, as the path has slashes.
pub async fn of_member(
    Operator(caller): Operator,
    State(service): State<Shared>,
    Named(path): Named<String>,
    headers: HeaderMap,
    Body(terms): Body<Terms>,
) -> Result<Response, Problem> {
    let name = path.strip_suffix(SUFFIX).filter(|name| !name.is_empty());
    let name =
        name.ok_or_else(|| Problem::not_found(format!("there is no such route: it ends in {SUFFIX}")))?;
    granted(&service, &caller.name, &headers, MemberName::Plain(name.to_owned()), terms).await
}

async fn granted(
    service: &Shared,
    by: &str,
    headers: &HeaderMap,
    member: MemberName,
    terms: Terms,
) -> Result<Response, Problem> {
    let seconds = terms.expires_seconds.unwrap_or(USUAL);
    if seconds == 0 || seconds > LONGEST {
        return Err(Problem::usage(format!("expires_seconds is from 1 to {LONGEST}")));
    }
    let host = headers.get(header::HOST).and_then(|host| host.to_str().ok()).unwrap_or_default().to_owned();
    let document_of = service.blocking(move |service| grant(service, &member, terms.format, seconds, &host));
    let made = document_of.await?;
    tracing::info!(by, member = made.member, expires = made.expires, "gave a URL of a download");
    Ok(document(&made))
}

fn grant(
    service: &Service,
    member: &MemberName,
    format: Format,
    seconds: u32,
    host: &str,
) -> Result<DownloadDocument, Problem> {
    let view = View::read(&service.config)?;
    let id = view.member(member)?;
    let name = view.name(id);
    let key = service.downloads.key(&service.config, &view.stores)?;
    let expires = now_seconds() + u64::from(seconds);
    let grant = Grant { file: file_name(&name, format), member: name.clone(), format, expires };
    let signature = key.sign(&grant);
    let path = format!(
        "/v1/downloads/{}?member={}&format={}&expires={expires}&signature={signature}",
        grant.file,
        encoded(&grant.member),
        format.word(),
    );
    // What cannot be read is told now.
    let image = service.downloads.images.open(&name, format, || Ok((view, id)))?;
    let scheme = if service.config.tls.is_some() { "https" } else { "http" };
    Ok(DownloadDocument {
        member: name,
        format,
        url: format!("{scheme}://{host}{path}"),
        path,
        expires: time(i64::try_from(expires.saturating_mul(1_000_000_000)).unwrap_or(i64::MAX)),
        length: image.stream.length(),
        virtual_size: image.stream.source().virtual_size(),
        etag: image.tag.clone(),
    })
}

fn now_seconds() -> u64 {
    u64::try_from(now_ns() / 1_000_000_000).unwrap_or_default()
}

/// As it stands in a query.
fn encoded(text: &str) -> String {
    use std::fmt::Write as _;
    let mut encoded = String::new();
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_./:".contains(&byte) {
            encoded.push(char::from(byte));
        } else {
            // Writing to a string does not fail.
            let _ = write!(encoded, "%{byte:02X}");
        }
    }
    encoded
}

/// The image of a signed URL, whole or one range of it; also by `HEAD`. Its length is known before its first byte. A
/// block that turns out to be damaged cuts the connection.
#[utoipa::path(get, path = "/v1/downloads/{file}", tag = "downloads", security(()),
    params(("file" = String, Path, description = "The name of the file that a client makes"), Signed),
    responses(
        (status = 200, description = "The image", content_type = "application/octet-stream", body = String),
        (status = 206, description = "A range of it", content_type = "application/octet-stream", body = String),
        (status = 304, description = "The client has it"),
        (status = 400, description = "It is no URL of a download", content_type = "application/problem+json", body = ProblemBody),
        (status = 403, description = "The signature does not fit, or the time is over", content_type = "application/problem+json", body = ProblemBody),
        (status = 404, description = "The member is gone", content_type = "application/problem+json", body = ProblemBody),
        (status = 409, description = "The member cannot be read as it is", content_type = "application/problem+json", body = ProblemBody),
        (status = 416, description = "There is no such range", content_type = "application/problem+json", body = ProblemBody),
        (status = 422, description = "The image is corrupt, damaged or not supported", content_type = "application/problem+json", body = ProblemBody),
        (status = 423, description = "Somebody writes it", content_type = "application/problem+json", body = ProblemBody),
        (status = 502, description = "A store failed", content_type = "application/problem+json", body = ProblemBody),
        (status = 503, description = "The service is ending, or too busy", content_type = "application/problem+json", body = ProblemBody),
))]
pub async fn image(
    State(service): State<Shared>,
    Named(file): Named<String>,
    Asked(signed): Asked<Signed>,
    method: Method,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let Signed { member, format, expires, signature } = signed;
    let grant = Grant { member, format, file, expires };
    let name = grant.file.clone();
    let image = service.blocking(move |service| open(service, &grant, &signature)).await?;
    let length = image.stream.length();
    let (status, range) = match wanted(&headers, length, image.tag.as_deref()) {
        Wanted::Whole => (StatusCode::OK, 0..length),
        Wanted::Part(range) => (StatusCode::PARTIAL_CONTENT, range),
        Wanted::Unchanged => (StatusCode::NOT_MODIFIED, 0..0),
        Wanted::Unsatisfiable => {
            let problem = Problem::usage(format!("the image has {length} bytes"))
                .with_status(StatusCode::RANGE_NOT_SATISFIABLE);
            let mut response = problem.into_response();
            put(response.headers_mut(), header::CONTENT_RANGE, &format!("bytes */{length}"));
            return Ok(response);
        }
    };
    let tag = image.tag.clone();
    let count = range.end - range.start;
    let content_range = format!("bytes {}-{}/{length}", range.start, range.end.saturating_sub(1));
    let bytes = if method == Method::HEAD || count == 0 {
        Bytes::empty()
    } else {
        body(&service, image, range).await?
    };
    let mut response = (status, bytes).into_response();
    let headers = response.headers_mut();
    if let Some(tag) = &tag {
        put(headers, header::ETAG, tag);
    }
    if status == StatusCode::NOT_MODIFIED {
        return Ok(response);
    }
    put(headers, header::ACCEPT_RANGES, "bytes");
    put(headers, header::CONTENT_TYPE, "application/octet-stream");
    put(headers, header::CONTENT_DISPOSITION, &format!("attachment; filename=\"{name}\""));
    put(headers, header::CONTENT_LENGTH, &count.to_string());
    if status == StatusCode::PARTIAL_CONTENT {
        put(headers, header::CONTENT_RANGE, &content_range);
    }
    Ok(response)
}

fn put(headers: &mut HeaderMap, name: header::HeaderName, value: &str) {
    if let Ok(value) = HeaderValue::from_str(value) {
        headers.insert(name, value);
    }
}

/// The image, if the URL grants it.
fn open(service: &Service, grant: &Grant, signature: &str) -> Result<std::sync::Arc<Opened>, Problem> {
    let refused = |detail: &str| {
        Problem::new(Kind::Refused, Code::Forbidden, detail).with_status(StatusCode::FORBIDDEN)
    };
    let stores = connect(service.config.stores.clone())?;
    if !service.downloads.key(&service.config, &stores)?.fits(grant, signature) {
        return Err(refused("the signature does not fit the URL"));
    }
    if grant.expires <= now_seconds() {
        return Err(refused("the URL has expired: ask for a new one"));
    }
    service.downloads.images.open(&grant.member, grant.format, || {
        let view = View::read(&service.config)?;
        let id = crate::store::names::resolve_one(&view.stores, &view.scan, &grant.member)?;
        Ok((view, id))
    })
}
