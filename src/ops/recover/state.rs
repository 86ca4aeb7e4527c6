//! What waits on the stores: for those who watch from outside.

use crate::change::journal::Journal;
use crate::change::yard::Yard;
use crate::ops::Result;
use crate::store::{StoreError, Stores};

/// What waits on one store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoreState {
    /// The store's id on the command line.
    pub store: String,
    /// Operations that are not over: half done, or with old files kept for an undo.
    pub open_operations: u64,
    /// When the oldest of them began, nanoseconds since 1970, as far as that is known.
    pub oldest_begun_ns: Option<i64>,
    /// Trees that nothing is done to until somebody has looked.
    pub frozen_trees: u64,
    /// What the files kept take, by their allocation.
    pub trash_bytes: u64,
}

/// Looks at all stores. Changes nothing.
pub fn state(stores: &Stores) -> Result<Vec<StoreState>> {
    let mut states = Vec::new();
    for (_, store) in stores.iter() {
        let journal = Journal::new(store.backend());
        let intents = journal.intents()?;
        let mut oldest_begun_ns: Option<i64> = None;
        for name in &intents {
            if let Some(intent) = journal.intent(name)? {
                oldest_begun_ns = Some(oldest_begun_ns.map_or(intent.begun_ns, |ns| ns.min(intent.begun_ns)));
            }
        }
        let mut frozen_trees = 0;
        for tree in journal.trees()? {
            frozen_trees += u64::from(journal.frozen(&tree)?.is_some());
        }
        states.push(StoreState {
            store: store.id().to_string(),
            open_operations: intents.len() as u64,
            oldest_begun_ns,
            frozen_trees,
            trash_bytes: trash_bytes_of(store, &journal)?,
        });
    }
    Ok(states)
}

/// What the files kept on all stores take, by their allocation.
pub fn trash_bytes(stores: &Stores) -> Result<u64> {
    stores.iter().map(|(_, store)| trash_bytes_of(store, &Journal::new(store.backend()))).sum()
}

fn trash_bytes_of(store: &crate::store::Store, journal: &Journal) -> Result<u64> {
    let mut bytes = 0;
    for trash in Yard::all(store.backend())?.iter().map(Yard::trash) {
        for name in journal.names(&trash)? {
            let Ok(path) = trash.join(&name) else { continue };
            match store.backend().stat(&path) {
                Ok(stat) => bytes += stat.allocated_bytes,
                // Purged this very moment.
                Err(crate::backend::BackendError::NotFound { .. }) => {}
                Err(source) => return Err(StoreError::backend(store, source).into()),
            }
        }
    }
    Ok(bytes)
}
