//! Sockets: accepting, TLS, limits on connections and slow clients, signals, the end.

use std::io::{self, Write as _};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{Semaphore, watch};
use tokio_rustls::TlsAcceptor;

use super::config::{Config, TlsFiles};
use super::error::ServiceError;
use super::jobs;
use super::patient::Patient;
use super::routes::router;
use super::schedule;
use super::state::{Service, Shared};

/// How long a client may take for the head of a request, the first and every later one, and for the TLS handshake.
const SLOW_HEAD: Duration = Duration::from_secs(15);
/// How long a client may take nothing of an answer.
const SLOW_TAKER: Duration = Duration::from_mins(10);
/// The longest head of a request, in bytes, and the most lines it may have.
const MAX_HEAD: usize = 32 << 10;
const MAX_HEADERS: usize = 64;
/// How long running requests and jobs get when the service ends. systemd's own limit is longer.
const DRAIN: Duration = Duration::from_secs(25);
/// How often images are closed that nobody asks for.
const SWEEP_EVERY: Duration = Duration::from_secs(10);
/// How long to wait after an accept that failed: mostly there are no file descriptors just then.
const PAUSE: Duration = Duration::from_millis(100);

/// Runs the service until SIGTERM or SIGINT; SIGHUP has tokens and certificate read again. Prints one line to standard
/// output, `listening on ADDRESS`, once connections are taken. Blocks.
///
/// At the end no job is begun any more; those that run stop at their next safe point and are continued by whoever
/// starts next. That takes at most 30 seconds, whatever they do.
///
/// # Errors
///
/// [`ServiceError`], before anything was begun.
pub fn run(config: Config) -> Result<(), ServiceError> {
    let start = |source| ServiceError::Start { source };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(start)?;
    let service = Arc::new(Service::new(config)?);
    let ended = runtime.block_on(serve(service));
    // A look at a store that hangs must not keep the process.
    runtime.shutdown_background();
    ended
}

async fn serve(service: Shared) -> Result<(), ServiceError> {
    let start = |source| ServiceError::Start { source };
    let tls = service.config.tls.as_ref().map(Tls::read).transpose()?;
    let address = service.config.listen.clone();
    let listener = TcpListener::bind(&address).await;
    let listener = listener.map_err(|source| ServiceError::Listen { address, source })?;
    let mut ends =
        [signal(SignalKind::terminate()).map_err(start)?, signal(SignalKind::interrupt()).map_err(start)?];
    let hangup = signal(SignalKind::hangup()).map_err(start)?;
    let workers = jobs::start(&service).map_err(start)?;
    let scheduled = service.clone();
    let schedule = std::thread::Builder::new().name("schedule".to_owned());
    schedule.spawn(move || schedule::run(&scheduled)).map_err(start)?;
    let (stop, stopped) = watch::channel(false);
    let app = router(&service);
    let tls = tls.map(Arc::new);
    tokio::spawn(reload(service.clone(), tls.clone(), hangup));
    tokio::spawn(sweep(service.clone()));
    let watched = service.clone();
    tokio::spawn(async move { watched.health.keep(&watched).await });
    let scheme = if tls.is_some() { "https" } else { "http" };
    announce(scheme, listener.local_addr().map_err(start)?);
    let connections = Arc::new(Semaphore::new(service.config.connections));
    let accept = Accept { service: service.clone(), app, tls, connections: connections.clone(), stopped };
    let [terminate, interrupt] = &mut ends;
    tokio::select! {
        () = accept.all(listener) => {}
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("the service ends");
    service.drain();
    // Nobody may be left to be told.
    let _ = stop.send(true);
    drain(&service, workers, &connections).await;
    Ok(())
}

/// Says that connections are taken, for who started the process.
fn announce(scheme: &str, address: SocketAddr) {
    let mut out = io::stdout().lock();
    // Whoever started it may not listen.
    let _ = writeln!(out, "listening on {scheme}://{address}").and_then(|()| out.flush());
    tracing::info!(%address, scheme, "the service listens");
}

/// Waits for jobs and requests, but not for ever.
async fn drain(service: &Shared, workers: Vec<JoinHandle<()>>, connections: &Semaphore) {
    let begun = Instant::now();
    let most = u32::try_from(service.config.connections).unwrap_or(u32::MAX);
    let all = connections.acquire_many(most);
    let _ = tokio::time::timeout(DRAIN, all).await;
    while begun.elapsed() < DRAIN && workers.iter().any(|worker| !worker.is_finished()) {
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let left = workers.iter().filter(|worker| !worker.is_finished()).count();
    if left > 0 {
        tracing::warn!(
            left,
            "jobs did not come to a safe point in time; they are recovered when they are continued"
        );
    }
}

async fn reload(service: Shared, tls: Option<Arc<Tls>>, mut hangup: Signal) {
    while hangup.recv().await.is_some() {
        service.reload();
        if let (Some(tls), Some(files)) = (&tls, &service.config.tls) {
            match Tls::read(files) {
                Ok(new) => tls.replace(&new),
                Err(error) => tracing::error!("the old certificate stays: {error}"),
            }
        }
    }
}

/// Closes images and offers that nobody asks for any more.
async fn sweep(service: Shared) {
    loop {
        tokio::time::sleep(SWEEP_EVERY).await;
        let service = service.clone();
        // One that fails is made up for by the next.
        let _ = tokio::task::spawn_blocking(move || {
            service.downloads.images.sweep();
            service.offers.sweep();
        })
        .await;
    }
}

/// The certificate that is shown now.
struct Tls(RwLock<TlsAcceptor>);

impl Tls {
    fn read(files: &TlsFiles) -> Result<Self, ServiceError> {
        let failed =
            |file: &Path, detail: String| ServiceError::File { file: file.display().to_string(), detail };
        let chain = CertificateDer::pem_file_iter(&files.certificate)
            .and_then(Iterator::collect::<Result<Vec<_>, _>>)
            .map_err(|error| failed(&files.certificate, error.to_string()))?;
        let key = PrivateKeyDer::from_pem_file(&files.key)
            .map_err(|error| failed(&files.key, error.to_string()))?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .and_then(|config| config.with_no_client_auth().with_single_cert(chain, key));
        let mut config = config.map_err(|error| failed(&files.certificate, error.to_string()))?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self(RwLock::new(TlsAcceptor::from(Arc::new(config)))))
    }

    fn acceptor(&self) -> TlsAcceptor {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn replace(&self, new: &Self) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = new.acceptor();
    }
}

/// Takes connections.
struct Accept {
    service: Shared,
    app: Router,
    tls: Option<Arc<Tls>>,
    connections: Arc<Semaphore>,
    stopped: watch::Receiver<bool>,
}

impl Accept {
    async fn all(self, listener: TcpListener) {
        loop {
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!("no connection was taken: {error}");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = self.connections.clone().try_acquire_owned() else {
                self.service.metrics.connection_refused();
                continue;
            };
            // Small answers should not wait for more to send.
            let _ = stream.set_nodelay(true);
            let (service, app) = (self.service.clone(), self.app.clone());
            let (acceptor, stopped) = (self.tls.as_ref().map(|tls| tls.acceptor()), self.stopped.clone());
            tokio::spawn(async move {
                let _place = place;
                service.metrics.connection_opened();
                let stream = Patient::new(stream, SLOW_TAKER);
                connection(stream, acceptor, app, stopped).await;
                service.metrics.connection_closed();
            });
        }
    }
}

async fn connection(
    stream: Patient<TcpStream>,
    acceptor: Option<TlsAcceptor>,
    app: Router,
    stopped: watch::Receiver<bool>,
) {
    let Some(acceptor) = acceptor else { return requests(stream, app, stopped).await };
    match tokio::time::timeout(SLOW_HEAD, acceptor.accept(stream)).await {
        Ok(Ok(stream)) => requests(stream, app, stopped).await,
        Ok(Err(error)) => tracing::debug!("no TLS: {error}"),
        Err(_) => tracing::debug!("no TLS in time"),
    }
}

/// Serves one connection until it is closed, goes on too slowly, or the service ends.
async fn requests(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    app: Router,
    mut stopped: watch::Receiver<bool>,
) {
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(SLOW_HEAD);
    server.max_buf_size(MAX_HEAD).max_headers(MAX_HEADERS);
    let connection = server.serve_connection(TokioIo::new(stream), TowerToHyperService::new(app));
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        _ = async { stopped.wait_for(|stopped| *stopped).await.is_ok() } => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection ended: {error}");
    }
}
