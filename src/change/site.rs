//! Where a change happens: the stores, the clock, who makes it.

use std::sync::Mutex;
use std::time::Duration;

use crate::backend::{Backend, BackendError};
use crate::chain::graph::Key;
use crate::change::clock::Clock;
use crate::change::error::{ChangeError, Result};
use crate::change::lease::Leases;
use crate::change::record::Place;
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
    /// Held while a number is looked for and announced: two operations of this process never take one.
    pub announcing: Mutex<()>,
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
            announcing: Mutex::new(()),
        }
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
