//! The right to change stores at all.

use crate::backend::LockKind;
use crate::store::record::own;
use crate::store::{Result, Store, StoreError, Stores};

/// Held while stores are changed; everything that changes one asks for it. Dropping it gives the right back.
///
/// Any number of processes may hold it: what keeps them apart is each tree's lease. It keeps off whoever opts
/// stores in or out, and tells sweepers that somebody is at work. It rests on advisory locks of one host:
/// against another host it is no more than a hint.
pub struct Guard {
    _locks: Vec<Box<dyn Send + Sync>>,
}

impl Guard {
    /// Takes the right over all stores of a call, or none: each must be opted in and of a known format, and
    /// the whole zone must be present.
    pub fn take(stores: &Stores) -> Result<Self> {
        stores.check_writable()?;
        let locks = stores.iter().map(|(_, store)| lock(store)).collect::<Result<_>>()?;
        Ok(Self { _locks: locks })
    }
}

fn lock(store: &Store) -> Result<Box<dyn Send + Sync>> {
    let lock = store.backend().try_lock(&own(&["locks", "change"]), LockKind::Shared);
    let lock = lock.map_err(|source| StoreError::backend(store, source))?;
    lock.ok_or_else(|| StoreError::Busy { store: store.backend().describe() })
}
