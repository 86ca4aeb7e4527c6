//! What other zones copy: the line of a member, its leaf table, its blocks.
//!
//! All of it is about one member by its whole name, which the token must be good for: nothing can be asked by a digest, so
//! nobody learns what others have.

use std::convert::Infallible;

use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderValue, Uri, header};
use axum::response::{IntoResponse as _, Response};

use crate::ops::copy::peer::checkpoint as read_checkpoint;
use crate::ops::document::SCHEMA;
use crate::peer::wire::{
    BlocksRequest, Chain, ChainQuery, CheckpointQuery, HEAD_LENGTH, SEAL, TableQuery, framed, seal,
};
use crate::service::extract::{Asked, Body as Json, Copier};
use crate::service::problem::{Problem, ProblemBody};
use crate::service::state::Shared;
use crate::store::connect::connect;

const OCTETS: &str = "application/octet-stream";

/// The members that a member stands on, base first, itself last: what each is, and how long its leaf table is. Needs the
/// scope `peer`, or `operate`: whoever may look at chains may not read what is in them. Only adopted members are given. The header
/// `qchain-seal` is the BLAKE3 of the request's path and query, a line feed and the answer's bytes; the same with tables and
/// checkpoint files.
#[utoipa::path(get, path = "/v1/peer/chain", tag = "peers", params(ChainQuery), responses(
    (status = 200, description = "The line", body = Chain),
    (status = 403, description = "The token is not good for that member", content_type = "application/problem+json", body = ProblemBody),
))]
pub async fn chain(
    Copier(caller): Copier,
    uri: Uri,
    State(service): State<Shared>,
    Asked(query): Asked<ChainQuery>,
) -> Result<Response, Problem> {
    let open = move |service: &Shared| service.offers.open(&service.config, &caller, &query.member);
    let offer = service.blocking(open).await?;
    let chain = Chain { schema: SCHEMA, members: offer.line().to_vec() };
    let bytes = serde_json::to_vec(&chain).map_err(|error| Problem::usage(error.to_string()))?;
    Ok(sealed(&uri, bytes, "application/json"))
}

/// Bytes of a member's leaf table, at most 4 MiB at once.
#[utoipa::path(get, path = "/v1/peer/table", tag = "peers", params(TableQuery), responses(
    (status = 200, description = "The bytes", content_type = "application/octet-stream", body = String),
    (status = 409, description = "The member has another view or another table by now", content_type = "application/problem+json", body = ProblemBody),
))]
pub async fn table(
    Copier(caller): Copier,
    uri: Uri,
    State(service): State<Shared>,
    Asked(query): Asked<TableQuery>,
) -> Result<Response, Problem> {
    let read = move |service: &Shared| {
        let offer = service.offers.of(&service.config, &caller, &query.member, query.digest)?;
        if offer.own().is_none_or(|own| own.table_blake3 != query.table) {
            use crate::failure::{Code, Kind};
            let detail = format!("{}: it was merged, and has another leaf table by now", query.member);
            return Err(Problem::new(Kind::Refused, Code::ChangedMeanwhile, detail));
        }
        Ok(offer.table(query.offset, query.length)?)
    };
    Ok(sealed(&uri, service.blocking(read).await?, OCTETS))
}

/// Blocks of a member's view, at most 64 at once, each held against its leaf before it is given. A block is a frame: its
/// number in 8 bytes, a word of 4, both little-endian, and so many bytes as the word's lower 31 bits say: 65,536, or, with
/// bit 31 set, those compressed by zstd.
#[utoipa::path(post, path = "/v1/peer/blocks", tag = "peers", request_body = BlocksRequest, responses(
    (status = 200, description = "The frames, in the order in which the blocks lie in the files", content_type = "application/octet-stream", body = String),
    (status = 409, description = "The member has another view by now", content_type = "application/problem+json", body = ProblemBody),
    (status = 422, description = "A block is damaged: none is given", content_type = "application/problem+json", body = ProblemBody),
))]
pub async fn blocks(
    Copier(caller): Copier,
    State(service): State<Shared>,
    Json(request): Json<BlocksRequest>,
) -> Result<Response, Problem> {
    let read = move |service: &Shared| {
        let offer = service.offers.of(&service.config, &caller, &request.member, request.digest)?;
        let mut frames: Vec<Bytes> = Vec::new();
        offer.blocks(
            &request.blocks(),
            HEAD_LENGTH,
            |given| framed(given, request.plain),
            |some| {
                frames.push(some);
                Ok(())
            },
        )?;
        Ok(frames)
    };
    let frames = service.blocking(read).await?;
    let length = frames.iter().map(|frame| frame.len() as u64).sum();
    service.metrics.downloaded(length);
    let pieces = tokio_stream::iter(frames.into_iter().map(Ok::<_, Infallible>));
    let mut response = bare(Body::from_stream(pieces), OCTETS);
    // All of it is there: so its length is said, and held against what comes.
    response.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
    Ok(response)
}

/// A member's checkpoint file.
#[utoipa::path(get, path = "/v1/peer/checkpoint", tag = "peers", params(CheckpointQuery), responses(
    (status = 200, description = "The file", content_type = "application/xml", body = String),
    (status = 404, description = "There is none", content_type = "application/problem+json", body = ProblemBody),
))]
pub async fn checkpoint(
    Copier(caller): Copier,
    uri: Uri,
    State(service): State<Shared>,
    Asked(query): Asked<CheckpointQuery>,
) -> Result<Response, Problem> {
    let read = move |service: &Shared| {
        let offer = service.offers.of(&service.config, &caller, &query.member, query.digest)?;
        let stores = connect(service.config.stores.clone())?;
        let key = offer.source().keys().first();
        let found = key.map(|key| read_checkpoint(&stores, key.store, &key.path)).transpose()?;
        found.flatten().ok_or_else(|| Problem::not_found("it has no checkpoint file"))
    };
    Ok(sealed(&uri, service.blocking(read).await?, "application/xml"))
}

/// A body of that kind, with its seal.
fn sealed(uri: &Uri, bytes: Vec<u8>, kind: &'static str) -> Response {
    let target = uri.path_and_query().map_or("", |target| target.as_str());
    let seal = HeaderValue::try_from(seal(target, &bytes).to_string());
    let mut response = bare(bytes, kind);
    if let Ok(seal) = seal {
        response.headers_mut().insert(SEAL, seal);
    }
    response
}

/// A body of that kind.
fn bare(bytes: impl Into<Body>, kind: &'static str) -> Response {
    let mut response = bytes.into().into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}
