//! What all requests and jobs share.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use tokio::sync::Semaphore;

use super::auth::Tokens;
use super::config::Config;
use super::downloads::Downloads;
use super::error::ServiceError;
use super::health::Health;
use super::jobs::Jobs;
use super::metrics::Metrics;
use super::peers::Offers;
use super::problem::Problem;
use super::rows::Shown;
use crate::progress::Pace;

/// How many requests read stores at once.
const READERS: usize = 16;
/// How long a request waits for its turn to read.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// The service.
pub struct Service {
    pub config: Config,
    tokens: RwLock<Arc<Tokens>>,
    /// The limit on bytes a second of all jobs.
    pub pace: Pace,
    pub jobs: Jobs,
    pub downloads: Downloads,
    pub offers: Offers,
    pub metrics: Metrics,
    pub health: Health,
    pub rows: Shown,
    draining: AtomicBool,
    readers: Arc<Semaphore>,
}

/// As handlers have it.
pub type Shared = Arc<Service>;

impl Service {
    pub fn new(config: Config) -> Result<Self, ServiceError> {
        let tokens = Tokens::read(&config.tokens)?;
        let pace = Pace::new(config.rate);
        Ok(Self {
            tokens: RwLock::new(Arc::new(tokens)),
            pace,
            jobs: Jobs::default(),
            downloads: Downloads::new(),
            offers: Offers::default(),
            metrics: Metrics::new(),
            health: Health::default(),
            rows: Shown::default(),
            draining: AtomicBool::new(false),
            readers: Arc::new(Semaphore::new(READERS)),
            config,
        })
    }

    pub fn tokens(&self) -> Arc<Tokens> {
        self.tokens.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Reads the tokens again; those known before stay if the file is no good.
    pub fn reload(&self) {
        match Tokens::read(&self.config.tokens) {
            Ok(tokens) => {
                tracing::info!(?tokens, "read the tokens again");
                *self.tokens.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(tokens);
            }
            Err(error) => tracing::error!("the old tokens stay: {error}"),
        }
    }

    /// Whether the service is ending.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// The service is ending: no job is taken or begun any more.
    pub fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
        self.jobs.stop_all();
    }

    /// Runs what blocks, off the threads that serve requests: so many at once, the others wait, but not for ever.
    pub async fn blocking<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&Arc<Self>) -> Result<T, Problem> + Send + 'static,
    ) -> Result<T, Problem> {
        let turn = tokio::time::timeout(LONGEST_WAIT, self.readers.clone().acquire_owned()).await;
        let Ok(Ok(turn)) = turn else {
            return Err(Problem::unavailable("too many requests read the stores just now"));
        };
        let service = self.clone();
        let done = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            work(&service)
        });
        done.await.unwrap_or_else(|_| Err(Problem::unavailable("the work was given up")))
    }
}
