//! `init` and `deinit`: opting stores in and out.
//!
//! Both hold the exclusive lock of every store of the call while they work. A cut-off `init` leaves a store
//! without `store.json`, which is not opted in; a cut-off `deinit` too, as that file goes first. Either can be
//! called again.

use serde::Serialize;

use crate::backend::{Backend, BackendError, Capabilities, FileKind, LockKind, publish};
use crate::change::history::history;
use crate::change::journal::Journal;
use crate::change::{Site, SystemClock, yard};
use crate::failure::Code;
use crate::ids::StorePath;
use crate::ops::{OpError, Result};
use crate::progress::Cancel;
use crate::store::record::{
    DIRECTORIES, FORMAT, OWN_DIRECTORY, SCHEMA, StoreKind, StoreRecord, ZoneStore, own,
};
use crate::store::{Store, StoreError, Stores};

/// How deep the own directory is removed: deeper than anything that is put there.
const MAX_DEPTH: usize = 64;

/// One store opted in.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InitReport {
    /// The store's id on the command line.
    pub store: String,
    /// `cloudstack` or `plain`.
    pub kind: StoreKind,
    /// What the store can do.
    pub capabilities: Capabilities,
    /// The id in `store.json`.
    pub id: String,
    /// Whether anything was written; not if the store was as it should be.
    pub changed: bool,
}

/// One store opted out.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeinitReport {
    /// The store's id on the command line.
    pub store: String,
    /// How many files and directories were removed.
    pub removed: u64,
}

/// A held lock.
type Guard = Box<dyn Send + Sync>;

/// How many operations a refusal names.
const MAX_NAMED: usize = 5;

/// Finds out whether a lock that another process takes on a file of a store is seen here. It gets the store and
/// a directory of qchain's own there, and leaves nothing behind. One process by itself cannot tell.
pub type LockProof<'a> = &'a dyn Fn(&dyn Backend, &StorePath) -> bool;

/// Opts all stores in, as one zone. Kinds are those given, or what the directories look like.
pub fn init(stores: &Stores, kind: Option<StoreKind>, locks: LockProof<'_>) -> Result<Vec<InitReport>> {
    for (_, store) in stores.iter() {
        check_kind(store, kind)?;
    }
    let mut guards = Vec::new();
    for (_, store) in stores.iter() {
        make_directories(store)?;
        guards.push(lock(store)?);
    }
    let ids: Vec<String> = stores
        .iter()
        .map(|(_, store)| match store.record() {
            Some(record) => record.id.clone(),
            None => uuid::Uuid::new_v4().to_string(),
        })
        .collect();
    let zone: Vec<ZoneStore> = stores
        .iter()
        .zip(&ids)
        .map(|((_, store), id)| ZoneStore { id: id.clone(), name: store.id().to_string() })
        .collect();
    let mut reports = Vec::new();
    for ((_, store), id) in stores.iter().zip(ids) {
        reports.push(init_one(store, id, kind.unwrap_or_else(|| store.kind()), &zone, locks)?);
    }
    drop(guards);
    Ok(reports)
}

/// A store that is opted in keeps its kind, and one of a newer layout is left alone.
fn check_kind(store: &Store, kind: Option<StoreKind>) -> Result<()> {
    store.check_changeable()?;
    let Some(record) = store.record() else { return Ok(()) };
    store.writable_record()?;
    if kind.is_some_and(|kind| kind != record.kind) {
        let detail = format!(
            "{} is of kind {} already; deinit it first to give it another",
            store.id(),
            record.kind.word()
        );
        return Err(StoreError::Usage { detail }.into());
    }
    Ok(())
}

fn init_one(
    store: &Store,
    id: String,
    kind: StoreKind,
    zone: &[ZoneStore],
    locks: LockProof<'_>,
) -> Result<InitReport> {
    let backend = store.backend().as_ref();
    let scratch = own(&["tmp"]);
    let mut capabilities = backend.probe(&scratch).map_err(|source| StoreError::backend(store, source))?;
    capabilities.byte_range_locks = capabilities.byte_range_locks && locks(backend, &scratch);
    let record = StoreRecord {
        schema: SCHEMA,
        id: id.clone(),
        format: FORMAT,
        least_writer: store.record().map_or(FORMAT, |record| record.least_writer),
        kind,
        zone: zone.to_vec(),
        capabilities: Some(capabilities),
    };
    let path = own(&["store.json"]);
    let changed = store.record() != Some(&record);
    if changed {
        let written = if store.record().is_some() {
            publish::replace(backend, &scratch, &path, &record.encode(), true)
        } else {
            publish::write_new(backend, &scratch, &path, &record.encode())
        };
        written.map_err(|source| StoreError::backend(store, source))?;
    }
    Ok(InitReport { store: store.id().to_string(), kind, capabilities, id, changed })
}

fn make_directories(store: &Store) -> Result<()> {
    let backend = store.backend().as_ref();
    let fail = |source| StoreError::backend(store, source);
    let root = own(&[]);
    make_directory(backend, &root).map_err(fail)?;
    for name in DIRECTORIES {
        make_directory(backend, &own(&[name])).map_err(fail)?;
    }
    backend.sync_dir(&root).and_then(|()| backend.sync_dir(&StorePath::root())).map_err(fail)?;
    Ok(())
}

/// Makes a private directory, or finds that it is there and is one.
fn make_directory(backend: &dyn Backend, path: &StorePath) -> std::result::Result<(), BackendError> {
    match backend.create_dir(path, true) {
        Err(BackendError::AlreadyExists { .. }) => match backend.stat(path)?.kind {
            FileKind::Directory => Ok(()),
            _ => Err(BackendError::NotPlain { path: path.to_string() }),
        },
        done => done,
    }
}

fn lock(store: &Store) -> Result<Guard> {
    let guard = store.backend().try_lock(&own(&["locks", "change"]), LockKind::Exclusive);
    let guard = guard.map_err(|source| StoreError::backend(store, source))?;
    Ok(guard.ok_or_else(|| StoreError::Busy { store: store.id().to_string() })?)
}

/// Removes everything of qchain's from all stores; nothing is removed if one of them is in use, or has
/// operations that are not over.
pub fn deinit(stores: &Stores) -> Result<Vec<DeinitReport>> {
    let mut guards = Vec::new();
    for (_, store) in stores.iter() {
        store.check_changeable()?;
        let there = store.backend().stat(&own(&[])).is_ok_and(|stat| stat.kind == FileKind::Directory);
        if !there {
            return Err(StoreError::NotInitialised { store: store.backend().describe() }.into());
        }
        if store.record().is_some() {
            store.writable_record()?;
        }
        // Without that directory a deinit was cut off near its end, and nobody can hold the lock.
        if store.backend().stat(&own(&["locks"])).is_ok() {
            guards.push(lock(store)?);
        }
    }
    // Under the locks: nothing begins meanwhile.
    check_ended(stores)?;
    for (_, store) in stores.iter() {
        yard::beside(store.backend())?.iter().try_for_each(|yard| yard::remove(store.backend(), yard))?;
    }
    let reports = stores.iter().map(|(_, store)| deinit_one(store)).collect();
    drop(guards);
    reports
}

/// Refuses while an operation is half done, which nobody could finish, or keeps old files, which would be lost.
fn check_ended(stores: &Stores) -> Result<()> {
    let mut open = Vec::new();
    for (_, store) in stores.iter() {
        let intents = Journal::new(store.backend()).intents()?;
        open.extend(intents.into_iter().map(|name| (store, name.operation)));
    }
    let Some((first, _)) = open.first() else { return Ok(()) };
    let cancel = Cancel::default();
    // Only for the message.
    let done =
        history(&Site::new(stores, &SystemClock, &cancel, std::time::Duration::ZERO)).unwrap_or_default();
    let held: u64 = done.iter().filter(|done| !done.ended).map(|done| done.held_bytes).sum();
    let mut named: Vec<&str> = open.iter().take(MAX_NAMED).map(|(_, operation)| operation.as_str()).collect();
    if open.len() > MAX_NAMED {
        named.push("...");
    }
    let message = format!(
        "{} operations are not over and keep {held} bytes: {}; end them first by qchain recover and qchain \
         purge --all, which waits for the grace of deleted members",
        open.len(),
        named.join(", ")
    );
    let member = first.backend().describe();
    Err(OpError::Refused { code: Code::OpenOperations, member, message })
}

fn deinit_one(store: &Store) -> Result<DeinitReport> {
    let backend = store.backend();
    let removed = remove_own(backend.as_ref()).map_err(|source| StoreError::backend(store, source))?;
    Ok(DeinitReport { store: store.id().to_string(), removed })
}

fn remove_own(backend: &dyn Backend) -> std::result::Result<u64, BackendError> {
    let root = own(&[]);
    match backend.remove_file(&own(&["store.json"])) {
        Ok(()) => backend.sync_dir(&root)?,
        Err(BackendError::NotFound { .. }) => {}
        Err(error) => return Err(error),
    }
    let mut removed = 2;
    let entries = backend.walk(&root, MAX_DEPTH, &|_| false);
    // Parents come before what is in them, so backwards is children first.
    for entry in entries.into_iter().rev() {
        let entry = entry?;
        let path = entry.path.map_err(|path| BackendError::NotPlain { path })?;
        let gone = match entry.kind {
            FileKind::Directory => backend.remove_dir(&path),
            _ => backend.remove_file(&path),
        };
        match gone {
            Ok(()) => removed += 1,
            Err(BackendError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    backend.remove_dir(&root)?;
    backend.sync_dir(&StorePath::root())?;
    Ok(removed)
}

/// The directory that `deinit` removes, for messages.
#[must_use]
pub fn own_directory(store: &Store) -> String {
    format!("{}/{OWN_DIRECTORY}", store.backend().describe())
}
