//! Whether the stores are there: mounted, the ones they were, and answering in time.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use serde::Serialize;
use utoipa::ToSchema;

use super::config::Config;
use super::state::Shared;
use crate::failure::with_causes;
use crate::store::connect::connect;
use crate::store::{StoreConfig, StoreError};

/// How long a store may take to answer.
const LONGEST: Duration = Duration::from_secs(3);
/// How long to wait before looking again whether somebody else's first look has ended.
const PAUSE: Duration = Duration::from_millis(5);
/// How long an answer is good for.
const FRESH: Duration = Duration::from_secs(2);

/// One store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct StoreHealth {
    /// Its id.
    pub store: String,
    /// Whether it is mounted, has its guard file `.qchain/store.json`, and answers.
    pub ready: bool,
    /// Why not.
    pub detail: Option<String>,
}

/// The service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, ToSchema)]
pub struct HealthReport {
    /// `ok`, or why not: `stores`, `draining`.
    pub status: &'static str,
    /// The stores, in the order of the configuration.
    pub stores: Vec<StoreHealth>,
}

#[derive(Default)]
struct Look {
    /// A look is on since then: one at a time, as one at a store that hangs never ends.
    since: Option<Instant>,
    last: Option<(Instant, Result<String, String>)>,
    /// The id that it had when it was seen first.
    id: Option<String>,
}

/// What is known of the stores.
#[derive(Clone, Default)]
pub struct Health(Arc<Mutex<BTreeMap<String, Look>>>);

impl Health {
    fn with<T>(&self, store: &str, act: impl FnOnce(&mut Look) -> T) -> T {
        let mut looks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        act(looks.entry(store.to_owned()).or_default())
    }

    /// Whether the first look at a store is on.
    fn is_awaited(&self, store: &str) -> bool {
        self.with(store, |look| look.since.is_some() && look.last.is_none())
    }

    /// What was found last, without a look.
    pub fn last(&self, config: &Config) -> Vec<StoreHealth> {
        config.stores.iter().map(|store| self.of(store.id.as_str())).collect()
    }

    fn of(&self, store: &str) -> StoreHealth {
        let detail = self.with(store, |look| match &mut look.last {
            Some((at, _)) if at.elapsed() > FRESH + LONGEST => Some("it does not answer".to_owned()),
            None => Some("it has not answered yet".to_owned()),
            Some((_, Err(why))) => Some(why.clone()),
            Some((_, Ok(id))) => {
                let first = look.id.get_or_insert_with(|| id.clone());
                (first != id).then(|| "it is another store than it was when the service started".to_owned())
            }
        });
        StoreHealth { store: store.to_owned(), ready: detail.is_none(), detail }
    }

    /// Looks at all stores, as far as that was not done a moment ago; for a bounded time.
    pub async fn look(&self, service: &Shared) -> HealthReport {
        self.look_after(service, FRESH).await
    }

    /// Looks again and again, so that who asks rarely waits for a store.
    pub async fn keep(&self, service: &Shared) {
        loop {
            self.look_after(service, FRESH / 2).await;
            tokio::time::sleep(FRESH / 4).await;
        }
    }

    async fn look_after(&self, service: &Shared, fresh: Duration) -> HealthReport {
        let mut waits = Vec::new();
        for store in &service.config.stores {
            let begin = self.with(store.id.as_str(), |look| {
                let fresh = look.last.as_ref().is_some_and(|(at, _)| at.elapsed() < fresh);
                let begin = !fresh && look.since.is_none();
                if begin {
                    look.since = Some(Instant::now());
                }
                begin
            });
            if begin {
                let (health, store) = (self.clone(), store.clone());
                waits.push(tokio::task::spawn_blocking(move || {
                    let (id, found) = (store.id.to_string(), probe(store));
                    health.with(&id, |look| {
                        look.since = None;
                        look.last = Some((Instant::now(), found));
                    });
                }));
            }
        }
        let all = async {
            for wait in waits {
                // A look that ended by a panic leaves what was known.
                let _ = wait.await;
            }
            // Somebody else's may be on. What is known is told meanwhile, but nothing is not.
            while service.config.stores.iter().any(|store| self.is_awaited(store.id.as_str())) {
                tokio::time::sleep(PAUSE).await;
            }
        };
        let _ = tokio::time::timeout(LONGEST, all).await;
        let stores = self.last(&service.config);
        let status = match (stores.iter().all(|store| store.ready), service.is_draining()) {
            (_, true) => "draining",
            (false, _) => "stores",
            (true, _) => "ok",
        };
        HealthReport { status, stores }
    }
}

/// The id of a store that is there. One that was never opted in has no guard file, and is only read.
fn probe(config: StoreConfig) -> Result<String, String> {
    let failed = |error: &StoreError| with_causes(error);
    let stores = connect(vec![config]).map_err(|error| failed(&error))?;
    let (_, store) = stores.iter().next().ok_or_else(|| "it is not configured".to_owned())?;
    if store.backend().read_only() {
        return Ok(store.backend().describe());
    }
    store
        .record()
        .map(|record| record.id.clone())
        .ok_or_else(|| "it has no .qchain/store.json: it is not mounted, or was not opted in".to_owned())
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::Health;

    #[test]
    fn only_a_first_look_is_waited_for() {
        let health = Health::default();
        assert!(!health.is_awaited("s"), "nobody looks");
        health.with("s", |look| look.since = Some(Instant::now()));
        assert!(health.is_awaited("s"), "nothing is known yet");
        health.with("s", |look| look.last = Some((Instant::now(), Ok("id".to_owned()))));
        assert!(!health.is_awaited("s"), "what is known is told");
    }
}
