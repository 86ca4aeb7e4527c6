//! Changes of CloudStack's rows that follow a decided operation, on record until they are made.
//!
//! The files come first: a merge whose rows still name the old parent is what CloudStack sees after any merge that
//! leaves its rows alone. So the record is written before the decision, holds nothing up, and is taken away
//! when the rows were changed, or turned out not to be the ones that were planned with.

use serde::{Deserialize, Serialize};

use crate::backend::{BackendError, publish};
use crate::change::error::{ChangeError, Result};
use crate::change::journal::{Found, Journal};
use crate::change::operation::Operation;
use crate::change::places::{self, temporary};
use crate::change::record::{Decision, MAX_BYTES, OperationId, SCHEMA, TreeId, encode};
use crate::change::site::Site;
use crate::cloudstack::row_change::RowChange;
use crate::ids::StorePath;
use crate::store::facts::read_whole;
use crate::store::record::own;

/// The record.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PendingRows {
    /// [`SCHEMA`].
    pub schema: u32,
    /// The operation's tree.
    pub tree: TreeId,
    /// The operation that the rows follow.
    pub operation: OperationId,
    /// The rows, all in one transaction.
    pub changes: Vec<RowChange>,
}

/// What became of an operation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Nobody has decided it; somebody may still.
    Open,
    /// It was decided, and stands.
    Decided,
    /// It was taken back, or undone: its rows stay as they are.
    TakenBack,
}

fn directory() -> StorePath {
    own(&["rows"])
}

fn path(operation: &OperationId) -> StorePath {
    directory().join(operation.as_str()).unwrap_or_default()
}

fn failed(action: &'static str, path: &StorePath) -> impl Fn(BackendError) -> ChangeError + use<> {
    let member = path.to_string();
    move |source| ChangeError::Store { action, member: member.clone(), source }
}

/// Notes what is to follow an operation, before it is decided. Durable when it returns.
pub fn note(operation: &Operation<'_>, changes: Vec<RowChange>) -> Result<()> {
    let backend = operation.site().backend(operation.home())?;
    let (directory, path) = (directory(), path(operation.id()));
    // Stores that were opted in by an earlier version lack it.
    if backend.stat(&directory).is_err()
        && places::make(backend, &directory).map_err(failed("make", &directory))?
    {
        backend.sync_dir(&directory.parent()).map_err(failed("sync", &directory))?;
    }
    let (tree, id) = (operation.tree().clone(), operation.id().clone());
    let record = PendingRows { schema: SCHEMA, tree, operation: id, changes };
    publish::claim(backend, &temporary(operation.id(), "rows"), &path, &encode(&record))
        .map_err(failed("write", &path))
}

/// All that is on record, with the store that has it.
pub fn pending(site: &Site<'_>) -> Result<Vec<(usize, PendingRows)>> {
    let mut found = Vec::new();
    for (index, store) in site.stores.iter() {
        for name in Journal::new(store.backend()).names(&directory())? {
            let Some(operation) = OperationId::parse(&name) else { continue };
            let path = path(&operation);
            let bytes = match read_whole(store.backend(), &path, MAX_BYTES) {
                Ok(bytes) => bytes,
                Err(BackendError::NotFound { .. }) => continue,
                Err(source) => return Err(failed("read", &path)(source)),
            };
            match serde_json::from_slice(&bytes) {
                Ok(record) => found.push((index, record)),
                Err(error) => {
                    return Err(ChangeError::BadRecord { path: path.to_string(), detail: error.to_string() });
                }
            }
        }
    }
    Ok(found)
}

/// What became of the operation that a record follows.
pub fn fate(site: &Site<'_>, home: usize, record: &PendingRows) -> Result<Fate> {
    let journal = Journal::new(site.stores.get(home)?.backend());
    for number in journal.generations(&record.tree)? {
        let Found::Record(claim) = journal.claim(&record.tree, number)? else { continue };
        if claim.operation != record.operation {
            continue;
        }
        let stands =
            matches!(claim.decision, Decision::Commit(_)) && !journal.is_undone(&record.tree, number)?;
        return Ok(if stands { Fate::Decided } else { Fate::TakenBack });
    }
    let open = journal.intents()?.iter().any(|name| name.operation == record.operation);
    Ok(if open { Fate::Open } else { Fate::TakenBack })
}

/// Takes a record away. Durable when it returns.
pub fn settle(site: &Site<'_>, home: usize, operation: &OperationId) -> Result<()> {
    let (backend, path) = (site.backend(home)?, path(operation));
    match backend.remove_file(&path) {
        Ok(()) | Err(BackendError::NotFound { .. }) => {
            backend.sync_dir(&directory()).map_err(failed("sync", &path))
        }
        Err(source) => Err(failed("remove", &path)(source)),
    }
}
