//! The exclusive right to change stores.

use crate::backend::BackendError;
use crate::store::record::own;
use crate::store::{Result, Store, StoreError, Stores};

/// Held while stores are changed; everything that changes one asks for it. Dropping it gives the right back.
///
/// It rests on advisory locks of one host: against another host it is no more than a hint.
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
    match store.backend().try_lock(&own(&["locks", "change"])) {
        Ok(Some(lock)) => Ok(lock),
        Ok(None) => Err(StoreError::Busy { store: store.backend().describe() }),
        // Another user's lock file, or a read-only mount: say so rather than "busy".
        Err(source @ BackendError::NotFound { .. }) => {
            Err(StoreError::Backend { store: store.backend().describe(), source })
        }
        Err(source) => Err(StoreError::backend(store, source)),
    }
}
