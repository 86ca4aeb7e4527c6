//! A zone as a peer, over HTTP/1.1. Requests block their callers, who are several; answers are read with a deadline for
//! each pause, and never further than what was asked for can be long.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde::Deserialize;
use tokio::runtime::Runtime;

use super::connection::{Connections, Sender};
use super::wire::{BlocksRequest, Chain, FrameFault, Frames, HEAD_LENGTH, MOST_JSON, SEAL, encoded, seal};
use super::zone::Zone;
use crate::cloudstack::checkpoint::MAX_BYTES as MAX_CHECKPOINT;
use crate::failure::{Code, Kind};
use crate::ops::copy::peer::{Take, wrong};
use crate::ops::copy::plan::usage;
use crate::ops::copy::{LineMember, Peer};
use crate::ops::{OpError, Result};
use crate::store::manifest::Blocks;
use crate::units::BLOCK_BYTES;

/// How long an answer may take to begin, and to go on.
const BEGIN: Duration = Duration::from_mins(2);
const STALL: Duration = Duration::from_secs(15);
/// How many requests are in flight: at the shortest and the longest round trips.
const LEAST: usize = 4;
const MOST: usize = 16;
/// How much of a round trip asks for one more request in flight.
const STEP: Duration = Duration::from_millis(10);
/// Nearer than this, compressing takes longer than sending.
const NEAR: Duration = Duration::from_millis(1);
/// The longest answer that says why something was refused.
const MOST_PROBLEM: u64 = 64 << 10;

/// A zone.
pub struct HttpPeer {
    name: String,
    runtime: Runtime,
    connections: Connections,
    token: Option<HeaderValue>,
    round_trip: OnceLock<Duration>,
}

/// Why something was refused, as far as it is looked at.
#[derive(Deserialize)]
struct Refusal {
    #[serde(default)]
    code: String,
    #[serde(default)]
    detail: String,
}

/// What reading frames fails with.
enum Failed {
    Frame(FrameFault),
    Op(OpError),
}

impl From<FrameFault> for Failed {
    fn from(fault: FrameFault) -> Self {
        Self::Frame(fault)
    }
}

impl HttpPeer {
    /// Reads what the configuration names; connects to nobody yet.
    ///
    /// # Errors
    ///
    /// A usage error for what is wrong with the configuration.
    pub fn new(zone: &Zone) -> Result<Self> {
        let connections = Connections::new(zone)?;
        let token = zone.token()?.map(|token| HeaderValue::try_from(format!("Bearer {token}")));
        let mut token = token.transpose().map_err(|_| usage("the token of the zone cannot be sent"))?;
        if let Some(token) = &mut token {
            token.set_sensitive(true);
        }
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.map_err(|error| usage(format!("no threads: {error}")))?;
        Ok(Self { name: zone.name.clone(), runtime, connections, token, round_trip: OnceLock::new() })
    }

    /// The shortest time in which it answered a small request.
    fn round_trip(&self) -> Duration {
        *self.round_trip.get_or_init(|| {
            let one = || {
                let begun = Instant::now();
                // Whatever it answers.
                let _ = self.runtime.block_on(async {
                    let (sender, response) = self.send(Method::GET, "/healthz", None).await?;
                    self.whole(sender, response, MOST_PROBLEM).await
                });
                begun.elapsed()
            };
            // The first one may make the connection.
            let first = one();
            first.min(one())
        })
    }

    fn request(&self, method: Method, path: &str, body: Option<&str>) -> Result<Request<Full<Bytes>>> {
        let mut request = Request::builder().method(method).uri(path).header(HOST, self.connections.host());
        if let Some(token) = &self.token {
            request = request.header(AUTHORIZATION, token);
        }
        if body.is_some() {
            request = request.header(CONTENT_TYPE, "application/json");
        }
        let bytes = Bytes::copy_from_slice(body.unwrap_or_default().as_bytes());
        request.body(Full::new(bytes)).map_err(|error| usage(error.to_string()))
    }

    /// Sends a request; gives the head of the answer, and the connection, to be kept when all of the body was read.
    async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&str>,
    ) -> Result<(Sender, Response<Incoming>)> {
        if let Some(sender) = self.connections.kept() {
            let request = self.request(method.clone(), path, body)?;
            match self.send_on(sender, request).await {
                Err(OpError::Peer { again: true, .. }) => self.connections.forget(),
                done => return done,
            }
        }
        let request = self.request(method, path, body)?;
        self.send_on(self.connections.open().await?, request).await
    }

    async fn send_on(
        &self,
        mut sender: Sender,
        request: Request<Full<Bytes>>,
    ) -> Result<(Sender, Response<Incoming>)> {
        let answer = async {
            sender.ready().await?;
            sender.send_request(request).await
        };
        match tokio::time::timeout(BEGIN, answer).await {
            Ok(Ok(response)) => Ok((sender, response)),
            Ok(Err(error)) => Err(self.cut("no answer", &error)),
            Err(_) => Err(self.connections.failed("no answer in time")),
        }
    }

    /// A connection that failed, or had something on it that is no HTTP.
    fn cut(&self, what: &str, error: &hyper::Error) -> OpError {
        let message = format!("{what}: {error}");
        if error.is_parse() { wrong(&self.name, message) } else { self.connections.failed(message) }
    }

    /// The next bytes of a body; none at its end.
    async fn next(&self, body: &mut Incoming) -> Result<Option<Bytes>> {
        loop {
            match tokio::time::timeout(STALL, body.frame()).await {
                Ok(None) => return Ok(None),
                Ok(Some(Ok(frame))) => {
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
                Ok(Some(Err(error))) => {
                    return Err(self.cut("the answer was cut", &error));
                }
                Err(_) => return Err(self.connections.failed("the answer does not go on")),
            }
        }
    }

    /// The length that an answer announces: it must, and at most so many bytes.
    fn length(&self, response: &Response<Incoming>, most: u64) -> Result<u64> {
        let length =
            response.headers().get(CONTENT_LENGTH).and_then(|value| value.to_str().ok()?.parse().ok());
        match length {
            Some(length) if length <= most => Ok(length),
            Some(length) => Err(wrong(
                &self.name,
                format!("it announces {length} bytes, more than the {most} there can be"),
            )),
            None => Err(wrong(&self.name, "it does not say how long its answer is")),
        }
    }

    /// A whole body of at most so many bytes.
    async fn whole(&self, sender: Sender, response: Response<Incoming>, most: u64) -> Result<Vec<u8>> {
        let length = self.length(&response, most)?;
        let mut body = response.into_body();
        let mut bytes = Vec::new();
        while let Some(more) = self.next(&mut body).await? {
            if (bytes.len() + more.len()) as u64 > length {
                return Err(wrong(&self.name, "its answer is longer than it said"));
            }
            bytes.extend_from_slice(&more);
        }
        self.connections.keep(sender);
        Ok(bytes)
    }

    /// Passes on an answer that is one; of another the reason.
    async fn answered(&self, answer: (Sender, Response<Incoming>)) -> Result<(Sender, Response<Incoming>)> {
        let (sender, response) = answer;
        let status = response.status();
        if status == StatusCode::OK {
            return Ok((sender, response));
        }
        if status.is_redirection() || status.is_success() || status.is_informational() {
            return Err(match wrong(&self.name, format!("it answers {status}, which is not followed")) {
                OpError::Peer { peer, kind, code, message, .. } => {
                    OpError::Peer { peer, kind, code, message, again: false }
                }
                other => other,
            });
        }
        let text = self.whole(sender, response, MOST_PROBLEM).await.unwrap_or_default();
        let refusal: Option<Refusal> = serde_json::from_slice(&text).ok();
        let (code, detail) = refusal.map_or((None, String::new()), |refusal| {
            (
                Code::parse(&refusal.code),
                refusal.detail.chars().filter(|c| !c.is_control()).take(500).collect(),
            )
        });
        let kind = match status {
            StatusCode::NOT_FOUND => Kind::NotFound,
            StatusCode::LOCKED | StatusCode::SERVICE_UNAVAILABLE => Kind::Busy,
            status if status.is_server_error() => Kind::Io,
            _ => Kind::Refused,
        };
        Err(OpError::Peer {
            peer: self.name.clone(),
            kind,
            code: code.unwrap_or(if status.is_server_error() {
                Code::PeerUnreachable
            } else {
                Code::PeerWrong
            }),
            message: format!("it answers {status}: {detail}"),
            again: matches!(status, StatusCode::SERVICE_UNAVAILABLE | StatusCode::GATEWAY_TIMEOUT),
        })
    }

    /// Does something once more that was refused: what was refused need not be what was asked for, after what a line may
    /// have done to it.
    fn twice<T>(&self, mut once: impl FnMut() -> Result<T>) -> Result<T> {
        match once() {
            Err(OpError::Peer { again: false, .. }) => {
                self.connections.forget();
                once()
            }
            done => done,
        }
    }

    /// An answer of at most so many bytes, to this very request.
    fn get(&self, path: &str, most: u64) -> Result<Vec<u8>> {
        self.twice(|| {
            self.runtime.block_on(async {
                let answer = self.send(Method::GET, path, None).await?;
                let (sender, response) = self.answered(answer).await?;
                let given = response.headers().get(SEAL).and_then(|given| given.to_str().ok());
                let given = given.map(str::to_owned);
                let bytes = self.whole(sender, response, most).await?;
                if given != Some(seal(path, &bytes).to_string()) {
                    self.connections.forget();
                    return Err(wrong(&self.name, "its answer is not what its seal says"));
                }
                Ok(bytes)
            })
        })
    }

    async fn frames(
        &self,
        text: &str,
        most: u64,
        take: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
    ) -> Result<()> {
        let answer = self.send(Method::POST, "/v1/peer/blocks", Some(text)).await?;
        let (sender, response) = self.answered(answer).await?;
        let mut left = self.length(&response, most)?;
        let mut body = response.into_body();
        let mut frames = Frames::default();
        let no_frame = |fault: FrameFault| wrong(&self.name, format!("what it sent are no blocks: {fault}"));
        while let Some(bytes) = self.next(&mut body).await? {
            left = left
                .checked_sub(bytes.len() as u64)
                .ok_or_else(|| wrong(&self.name, "its answer is longer than it said"))?;
            frames.push(&bytes, |block, bytes| take(block, bytes).map_err(Failed::Op)).map_err(|failed| {
                match failed {
                    Failed::Frame(fault) => no_frame(fault),
                    Failed::Op(error) => error,
                }
            })?;
        }
        frames.finish().map_err(no_frame)?;
        self.connections.keep(sender);
        Ok(())
    }
}

impl Peer for HttpPeer {
    fn name(&self) -> &str {
        &self.name
    }

    fn line(&self, member: &str) -> Result<Vec<LineMember>> {
        let bytes = self.get(&format!("/v1/peer/chain?member={}", encoded(member)), MOST_JSON)?;
        let chain = Chain::decode(&bytes);
        let chain = chain.map_err(|error| wrong(&self.name, format!("it gave no chain: {error}")))?;
        let asked = member.split_once(':').map_or(member, |(_, path)| path);
        if chain.members.last().is_some_and(|last| last.member.as_str() != asked) {
            return Err(wrong(&self.name, format!("it gave another member than {member}")));
        }
        Ok(chain.members)
    }

    fn table(&self, of: &LineMember, offset: u64, length: u64) -> Result<Vec<u8>> {
        let path = format!(
            "/v1/peer/table?member={}&digest={}&table={}&offset={offset}&length={length}",
            encoded(&of.name),
            of.view_digest,
            of.table_blake3
        );
        self.get(&path, length)
    }

    fn blocks(&self, of: &LineMember, ranges: &[Blocks], take: Take<'_>) -> Result<()> {
        let request = BlocksRequest {
            member: of.name.clone(),
            digest: of.view_digest,
            ranges: ranges.iter().map(|range| (range.first, range.count)).collect(),
            plain: self.round_trip() < NEAR,
        };
        let text = serde_json::to_string(&request).map_err(|error| usage(error.to_string()))?;
        let blocks: u64 = ranges.iter().map(|range| range.count).sum();
        let most = blocks.saturating_mul(BLOCK_BYTES + HEAD_LENGTH as u64);
        let asked =
            |block| ranges.iter().any(|range| (range.first..range.first + range.count).contains(&block));
        self.twice(|| {
            let take = &mut |block, bytes: &[u8]| {
                // An answer to something else, say: what follows it on this connection would be, too.
                if asked(block) {
                    take(block, bytes)
                } else {
                    Err(wrong(&self.name, "it gave blocks that were not asked for"))
                }
            };
            self.runtime.block_on(self.frames(&text, most, take))
        })
    }

    fn checkpoint(&self, of: &LineMember) -> Result<Option<Vec<u8>>> {
        let path = format!("/v1/peer/checkpoint?member={}&digest={}", encoded(&of.name), of.view_digest);
        match self.get(&path, MAX_CHECKPOINT as u64) {
            Err(OpError::Peer { kind: Kind::NotFound, .. }) => Ok(None),
            done => done.map(Some),
        }
    }

    fn at_once(&self) -> usize {
        let steps = self.round_trip().as_micros() / STEP.as_micros();
        usize::try_from(steps).unwrap_or(MOST).saturating_add(LEAST).min(MOST)
    }

    fn received_bytes(&self) -> u64 {
        self.connections.received()
    }
}
