//! Checkpoint files that follow a change: libvirt refuses to redefine a checkpoint whose parent is gone, so
//! the survivor's must name the new parent.

use std::sync::Arc;

use crate::backend::publish::replace;
use crate::backend::{Backend, BackendError};
use crate::change::error::{ChangeError, Result};
use crate::change::guard::Guard;
use crate::cloudstack::checkpoint::{Checkpoint, MAX_BYTES, set_parent};
use crate::cloudstack::paths::checkpoint_of;
use crate::ids::StorePath;
use crate::store::facts::read_whole;
use crate::store::record::own;

/// How often an edit is tried when the file changes under it: the agent rewrites disk labels there, once a VM
/// start.
const TRIES: usize = 5;

/// Checks, without writing, that the checkpoint file of `member`, if there is one, can be edited to name
/// `parent`.
pub fn check(backend: &Arc<dyn Backend>, member: &StorePath, parent: Option<&str>) -> Result<()> {
    let Some(path) = checkpoint_of(member) else { return Ok(()) };
    match read_whole(backend, &path, MAX_BYTES as u64) {
        Ok(bytes) => edited(&path, &bytes, parent).map(drop),
        Err(BackendError::NotFound { .. }) => Ok(()),
        Err(source) => Err(store("read", &path, source)),
    }
}

/// Makes the checkpoint file of `member`, if there is one, name `parent`; its other bytes, owner and mode stay.
/// Edits made by others meanwhile are kept: the file is compared right before the rename, and done again if it
/// changed.
pub fn follow(
    _guard: &Guard,
    backend: &Arc<dyn Backend>,
    member: &StorePath,
    parent: Option<&str>,
) -> Result<()> {
    let Some(path) = checkpoint_of(member) else { return Ok(()) };
    for _ in 0..TRIES {
        let bytes = match read_whole(backend, &path, MAX_BYTES as u64) {
            Ok(bytes) => bytes,
            Err(BackendError::NotFound { .. }) => return Ok(()),
            Err(source) => return Err(store("read", &path, source)),
        };
        let new = edited(&path, &bytes, parent)?;
        if new == bytes {
            return Ok(());
        }
        // The rename inside follows at once; the issue on safe change closes the window that is left.
        if read_whole(backend, &path, MAX_BYTES as u64).is_ok_and(|again| again == bytes) {
            return replace(backend.as_ref(), &own(&["tmp"]), &path, &new, true)
                .map_err(|source| store("replace", &path, source));
        }
    }
    Err(ChangeError::ChangedMeanwhile { member: path.to_string() })
}

/// Removes the checkpoint file of a deleted member, if there is one.
pub fn remove(_guard: &Guard, backend: &Arc<dyn Backend>, member: &StorePath) -> Result<()> {
    let Some(path) = checkpoint_of(member) else { return Ok(()) };
    match backend.remove_file(&path) {
        Ok(()) => backend.sync_dir(&path.parent()).map_err(|source| store("sync", &path, source)),
        Err(BackendError::NotFound { .. }) => Ok(()),
        Err(source) => Err(store("remove", &path, source)),
    }
}

fn edited(path: &StorePath, bytes: &[u8], parent: Option<&str>) -> Result<Vec<u8>> {
    let fail = |source| ChangeError::Checkpoint { path: path.to_string(), source };
    // One that names the right parent already needs no edit, however odd it is otherwise.
    if Checkpoint::parse(bytes).map_err(fail)?.parent.as_deref() == parent {
        return Ok(bytes.to_vec());
    }
    set_parent(bytes, parent).map_err(fail)
}

fn store(action: &'static str, path: &StorePath, source: BackendError) -> ChangeError {
    ChangeError::Store { action, member: path.to_string(), source }
}
