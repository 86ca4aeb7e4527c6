//! Where a change happens: the stores, the clock, who makes it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backend::{Backend, BackendError};
use crate::chain::graph::Key;
use crate::change::clock::Clock;
use crate::change::error::{ChangeError, Result};
use crate::change::lease::Leases;
use crate::change::log::{self, Did, Tail};
use crate::change::places::IntentName;
use crate::change::record::{OperationId, Place, TreeId};
use crate::progress::{Cancel, Pace};
use crate::store::Stores;

/// The least time between two renewals.
const LEAST_RENEWAL: Duration = Duration::from_millis(10);

/// Who changes stores.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The host's name.
    pub host: String,
    /// The process and what tells it from another of its number.
    pub process: String,
}

impl Owner {
    /// This process.
    #[must_use]
    pub fn this_process() -> Self {
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let process = format!("{}-{}", std::process::id(), uuid::Uuid::new_v4().simple());
        Self { host, process }
    }
}

/// Where changes happen, and who makes them. Holds nothing on the stores by itself.
pub struct Site<'a> {
    /// All stores of the zone.
    pub stores: &'a Stores,
    /// Time.
    pub clock: &'a dyn Clock,
    /// Looked at between steps before the decision.
    pub cancel: &'a Cancel,
    /// Who we are.
    pub owner: Owner,
    /// How long a lease's counter must stand still until it is taken over.
    pub lease: Duration,
    /// The limit on bytes a second.
    pub pace: Pace,
    /// The leases that are held.
    pub leases: Leases,
    /// The trees of roots as claims have them, once that was needed.
    pub(super) remembered: Mutex<Option<BTreeMap<Key, TreeId>>>,
    /// Operations that recovery brought as far as they go.
    settled: Mutex<BTreeSet<OperationId>>,
    /// Operations that this process began since it recovered. Held while a number is looked for and announced:
    /// two operations of this process never take one.
    begun: Mutex<Vec<IntentName>>,
    /// Where the stores' logs end, as this process left them.
    tails: Mutex<BTreeMap<usize, Tail>>,
}

impl<'a> Site<'a> {
    /// This process on these stores.
    #[must_use]
    pub fn new(stores: &'a Stores, clock: &'a dyn Clock, cancel: &'a Cancel, lease: Duration) -> Self {
        let renewal = (lease / 5).max(LEAST_RENEWAL);
        let leases = Leases::new(clock.renews().then_some(renewal));
        Self {
            stores,
            clock,
            cancel,
            owner: Owner::this_process(),
            lease,
            pace: Pace::default(),
            leases,
            remembered: Mutex::new(None),
            settled: Mutex::default(),
            begun: Mutex::default(),
            tails: Mutex::default(),
        }
    }

    /// Recovery brought an operation as far as it goes: what is planned from now on is planned on that.
    pub(super) fn settle(&self, operation: &OperationId) {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner).insert(operation.clone());
    }

    /// Whether recovery brought it as far as it goes.
    pub(super) fn is_settled(&self, operation: &OperationId) -> bool {
        self.settled.lock().unwrap_or_else(PoisonError::into_inner).contains(operation)
    }

    /// The operations that this process began since it recovered: all were planned on what it saw then. There
    /// may be several in what has one tree's id, as a tree that loses its root may become several.
    pub(super) fn begun(&self) -> MutexGuard<'_, Vec<IntentName>> {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Appends a line to the log of a store.
    pub fn log(&self, store: usize, operation: &OperationId, verb: &str, did: Vec<Did>) -> Result<()> {
        let mut tails = self.tails.lock().unwrap_or_else(PoisonError::into_inner);
        let tail = tails.entry(store).or_default();
        log::append(self.stores.get(store)?.backend(), tail, self.clock.wall_ns(), operation, verb, did)
    }

    /// A store's files.
    pub fn backend(&self, store: usize) -> Result<&'a dyn Backend> {
        Ok(self.stores.get(store)?.backend().as_ref())
    }

    /// A name as records have it.
    pub fn place(&self, key: &Key) -> Result<Place> {
        let store = self.stores.get(key.store)?.writable_record()?.id.clone();
        Ok(Place { store, path: key.path.clone() })
    }

    /// What a record's name stands for here.
    pub fn key(&self, place: &Place) -> Result<Key> {
        let found = self
            .stores
            .iter()
            .find(|(_, store)| store.record().is_some_and(|record| record.id == place.store));
        match found {
            Some((store, _)) => Ok(Key { store, path: place.path.clone() }),
            None => Err(ChangeError::StoreAbsent { id: place.store.clone(), path: place.path.to_string() }),
        }
    }

    /// A record's name, its store's files, and how messages call it.
    pub fn at(&self, place: &Place) -> Result<At<'a>> {
        let key = self.key(place)?;
        Ok(At { backend: self.backend(key.store)?, name: self.stores.display(&key), key })
    }
}

/// A name on a store that is at hand.
pub struct At<'a> {
    /// The store's files.
    pub backend: &'a dyn Backend,
    /// What it is.
    pub key: Key,
    /// What messages call it.
    pub name: String,
}

impl At<'_> {
    /// An error of the store about it.
    pub fn failed(&self, action: &'static str) -> impl Fn(BackendError) -> ChangeError + use<> {
        let member = self.name.clone();
        move |source| ChangeError::Store { action, member: member.clone(), source }
    }
}
