//! Temporaries that nobody will finish.

use std::collections::BTreeSet;

use crate::backend::{BackendError, LockKind};
use crate::change::error::{ChangeError, Result};
use crate::change::journal::{Found, Journal};
use crate::change::keep::name_if_free;
use crate::change::places::{IntentName, operation_of};
use crate::change::record::{Decision, OperationId};
use crate::change::site::Site;
use crate::change::stub::stand_down;
use crate::change::yard::{self, Yard};
use crate::ids::StorePath;
use crate::store::manifest::shelf::Sweep;
use crate::store::record::own;
use crate::store::{Result as StoreResult, StoreError};

/// Temporaries of no known operation are left alone for this long, in nanoseconds, unless it is certain that
/// nobody of this host is at work: another host may just be writing one. One day.
const UNKNOWN_NS: i128 = 86_400_000_000_000;

/// What the names of copies in the making begin with: they are continued by the next try, and go when they were left
/// alone for as long as any other's.
pub const COPY_PREFIX: &str = "copy";

/// Removes all temporaries of one operation.
pub fn temporaries_of(site: &Site<'_>, operation: &OperationId) -> Result<()> {
    for (_, store) in site.stores.iter() {
        let journal = Journal::new(store.backend());
        for directory in Yard::all(store.backend())?.iter().map(Yard::temporaries) {
            for name in journal.names(&directory)? {
                if operation_of(&name).as_ref() == Some(operation) {
                    remove(store.backend().as_ref(), &directory, &name)?;
                }
            }
        }
    }
    Ok(())
}

/// Ends an operation: its temporaries go, then its intent, then the places that nobody needs any more.
pub fn end(site: &Site<'_>, journal: &Journal, name: &IntentName) -> Result<()> {
    temporaries_of(site, &name.operation)?;
    journal.forget_second_look(&name.operation)?;
    journal.conclude(name)?;
    // It is over all the same; whoever sweeps next does the rest.
    let _ = yard::clear(site.stores);
    Ok(())
}

/// Removes manifests and leaf tables of files that no name stands for any more, if no operation is open on any store:
/// one might bring an old file back. Gives how many went.
pub fn manifests(site: &Site<'_>) -> Result<u64> {
    // First the files, then the intents: what a change makes after this look is not looked at.
    let listed = site.stores.iter().map(|(_, store)| Sweep::list(store)).collect::<StoreResult<Vec<_>>>()?;
    for (_, store) in site.stores.iter() {
        if !Journal::new(store.backend()).intents()?.is_empty() {
            return Ok(0);
        }
    }
    let mut removed = 0;
    for ((index, store), listed) in site.stores.iter().zip(listed) {
        // Of a process that was killed, unless somebody is at it just now.
        let forgotten =
            |table: &StorePath| is_alone(site, index).unwrap_or(false) || is_old(site, index, table);
        let stat = |member: &StorePath| match store.backend().stat(member) {
            Ok(stat) => Ok(Some(stat)),
            Err(BackendError::NotFound { .. }) => Ok(None),
            Err(source) => Err(StoreError::backend(store, source)),
        };
        removed += listed.carry_out(store, &stat, &forgotten)?;
    }
    Ok(removed)
}

/// Removes temporaries and kept files of operations that have ended, and what a killed process left of its
/// records and probes. Gives how many went.
pub fn strays(site: &Site<'_>) -> Result<u64> {
    let mut removed = 0;
    // First the files, then the intents: whatever was made after this look is not looked at.
    let mut found = Vec::new();
    for (index, store) in site.stores.iter() {
        let journal = Journal::new(store.backend());
        for yard in Yard::all(store.backend())? {
            for (parent, kept) in [(yard.temporaries(), false), (yard.trash(), true)] {
                let names = journal.names(&parent)?;
                found.extend(names.into_iter().map(|name| (index, parent.clone(), kept, name)));
            }
        }
    }
    let mut open: BTreeSet<OperationId> = BTreeSet::new();
    for (_, store) in site.stores.iter() {
        open.extend(Journal::new(store.backend()).intents()?.into_iter().map(|name| name.operation));
    }
    for (index, parent, is_kept, name) in found {
        let store = site.stores.get(index)?;
        let backend = store.backend();
        let goes = match operation_of(&name) {
            Some(operation) if open.contains(&operation) => false,
            // Nothing is put there but by an operation with an intent, and that goes last: an instance that was
            // stopped came too late.
            Some(operation) if is_kept => {
                give_back(site, index, &operation, &parent, &name)?;
                true
            }
            _ if is_kept => false,
            _ if name.split('.').next() == Some(COPY_PREFIX) => {
                parent.join(&name).is_ok_and(|path| is_old(site, index, &path))
            }
            _ => is_alone(site, index)? || parent.join(&name).is_ok_and(|path| is_old(site, index, &path)),
        };
        if goes {
            remove(backend.as_ref(), &parent, &name)?;
            removed += 1;
        }
    }
    yard::clear(site.stores)?;
    Ok(removed)
}

/// Gives a late departure its name back, if that is free and its operation was undone: the file may be the only
/// one there is.
fn give_back(
    site: &Site<'_>,
    store: usize,
    operation: &OperationId,
    directory: &StorePath,
    name: &str,
) -> Result<()> {
    let Ok(kept) = directory.join(name) else { return Ok(()) };
    for (_, home) in site.stores.iter() {
        let journal = Journal::new(home.backend());
        for tree in journal.trees()? {
            for number in journal.generations(&tree)? {
                let Found::Record(claim) = journal.claim(&tree, number)? else { continue };
                let Decision::Commit(commit) = &claim.decision else { continue };
                if claim.operation != *operation || !journal.is_undone(&tree, number)? {
                    continue;
                }
                for departure in &commit.departures {
                    let at = site.at(&departure.at)?;
                    let checkpoint = departure.checkpoint.as_ref().filter(|file| file.kept == kept);
                    let path = match checkpoint {
                        Some(file) => &file.path,
                        None if departure.kept == kept => &departure.at.path,
                        None => continue,
                    };
                    if at.key.store == store {
                        if checkpoint.is_none()
                            && let Some(stub) = &departure.stub
                        {
                            stand_down(&at, departure, stub, None)?;
                        }
                        name_if_free(&at, &kept, path, "put back")?;
                        at.backend.sync_dir(&path.parent()).map_err(at.failed("sync the directory of"))?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Whether no other process of this host works on a store.
fn is_alone(site: &Site<'_>, store: usize) -> Result<bool> {
    let path = own(&["locks", "change"]);
    let lock = site.stores.get(store)?.backend().try_lock(&path, LockKind::Exclusive);
    let failed = |source| ChangeError::Store { action: "lock", member: path.to_string(), source };
    Ok(lock.map_err(failed)?.is_some())
}

fn is_old(site: &Site<'_>, store: usize, path: &StorePath) -> bool {
    let stat = site.stores.get(store).ok().and_then(|store| store.backend().stat(path).ok());
    stat.is_some_and(|stat| stat.modified_ns + UNKNOWN_NS < i128::from(site.clock.wall_ns()))
}

fn remove(backend: &dyn crate::backend::Backend, directory: &StorePath, name: &str) -> Result<()> {
    let Ok(path) = directory.join(name) else { return Ok(()) };
    match backend.remove_file(&path) {
        Ok(()) | Err(BackendError::NotFound { .. }) => Ok(()),
        Err(BackendError::NotPlain { .. }) => remove_directory(backend, &path),
        Err(source) => Err(source),
    }
    .map_err(|source| ChangeError::Store { action: "remove", member: path.to_string(), source })
}

/// A directory of files that was to get its name as a whole.
fn remove_directory(
    backend: &dyn crate::backend::Backend,
    path: &StorePath,
) -> std::result::Result<(), BackendError> {
    for file in backend.read_dir(path)?.iter().filter_map(|entry| entry.path_in(path)) {
        match backend.remove_file(&file) {
            Ok(()) | Err(BackendError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    match backend.remove_dir(path) {
        Ok(()) | Err(BackendError::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
