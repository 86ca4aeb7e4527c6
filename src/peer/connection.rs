//! Connections to a zone: made with a deadline, counted, kept while they are good.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use http_body_util::Full;
use hyper::body::Bytes;
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::zone::{Address, Zone};
use crate::failure::{Code, Kind};
use crate::ops::copy::plan::usage;
use crate::ops::{OpError, Result};

/// How long a connection may take to be made.
const CONNECT: Duration = Duration::from_secs(15);
/// The most connections that are kept idle.
const MOST_IDLE: usize = 32;
/// The longest head of an answer, in bytes, and the most lines it may have.
const MAX_HEAD: usize = 32 << 10;
const MAX_HEADERS: usize = 64;

/// A connection that takes requests.
pub type Sender = SendRequest<Full<Bytes>>;

/// The connections to one zone.
pub struct Connections {
    name: String,
    address: Address,
    tls: Option<(TlsConnector, ServerName<'static>)>,
    idle: Mutex<Vec<Sender>>,
    received: Arc<AtomicU64>,
}

impl Connections {
    /// None yet.
    pub fn new(zone: &Zone) -> Result<Self> {
        let address = zone.address()?;
        let tls = if address.tls { Some(tls(zone, &address)?) } else { None };
        Ok(Self { name: zone.name.clone(), address, tls, idle: Mutex::default(), received: Arc::default() })
    }

    /// What the header `Host` says.
    pub fn host(&self) -> String {
        let Address { host, port, .. } = &self.address;
        if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") }
    }

    /// The bytes that came over all of them.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// One that was used before and is still open.
    pub fn kept(&self) -> Option<Sender> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        std::iter::from_fn(|| idle.pop()).find(|sender| !sender.is_closed())
    }

    /// Keeps one whose last answer was read to its end.
    pub fn keep(&self, sender: Sender) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < MOST_IDLE && !sender.is_closed() {
            idle.push(sender);
        }
    }

    /// Forgets those that are kept: one of them turned out to be dead.
    pub fn forget(&self) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// What the network failed with; the same may be asked again.
    pub fn failed(&self, message: impl Into<String>) -> OpError {
        let (peer, message) = (self.name.clone(), message.into());
        OpError::Peer { peer, kind: Kind::Io, code: Code::PeerUnreachable, message, again: true }
    }

    /// Makes one.
    pub async fn open(&self) -> Result<Sender> {
        match tokio::time::timeout(CONNECT, self.connect()).await {
            Ok(done) => done,
            Err(_) => Err(self.failed("no connection in time")),
        }
    }

    async fn connect(&self) -> Result<Sender> {
        let Address { host, port, .. } = &self.address;
        let stream = TcpStream::connect((host.as_str(), *port)).await;
        let stream = stream.map_err(|error| self.failed(format!("no connection: {error}")))?;
        // Small requests should not wait for more to send.
        let _ = stream.set_nodelay(true);
        let stream = Counted { stream, received: self.received.clone() };
        let Some((connector, name)) = &self.tls else { return self.shake(stream).await };
        match connector.connect(name.clone(), stream).await {
            Ok(stream) => self.shake(stream).await,
            // Whoever it is, he is not whom the configuration means, or does not speak TLS 1.3.
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Err(OpError::Peer {
                peer: self.name.clone(),
                kind: Kind::Refused,
                code: Code::PeerWrong,
                message: format!("it does not prove to be the zone: {error}"),
                again: false,
            }),
            Err(error) => Err(self.failed(format!("no TLS: {error}"))),
        }
    }

    async fn shake(&self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> Result<Sender> {
        let mut builder = http1::Builder::new();
        builder.max_buf_size(MAX_HEAD.max(256 << 10)).max_headers(MAX_HEADERS);
        let shaken = builder.handshake(TokioIo::new(stream)).await;
        let (sender, connection) = shaken.map_err(|error| self.failed(error.to_string()))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!("a connection to a zone ended: {error}");
            }
        });
        Ok(sender)
    }
}

fn tls(zone: &Zone, address: &Address) -> Result<(TlsConnector, ServerName<'static>)> {
    let name = ServerName::try_from(address.host.clone())
        .map_err(|_| usage(format!("[zones.{}]: {} is no name of a host", zone.name, address.host)))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| usage(error.to_string()))?
        .with_root_certificates(zone.roots()?);
    let mut config = config.with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok((TlsConnector::from(Arc::new(config)), name))
}

/// Counts what comes.
struct Counted {
    stream: TcpStream,
    received: Arc<AtomicU64>,
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let polled = Pin::new(&mut self.stream).poll_read(context, buffer);
        let count = buffer.filled().len().saturating_sub(before);
        self.received.fetch_add(count as u64, Ordering::Relaxed);
        polled
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
