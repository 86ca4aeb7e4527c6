//! Where temporaries and kept files of a member lie so that a rename reaches them: in `.qchain/`, or, where that
//! is another mount, in a directory beside the member.
//!
//! One beside a member is noted in `.qchain/beside/` before it is made, so that whoever sweeps finds it; it goes
//! when nothing is open any more.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::backend::publish::write_new;
use crate::backend::{Backend, BackendError};
use crate::change::error::{ChangeError, Result};
use crate::change::journal::Journal;
use crate::change::places::make;
use crate::change::record::{OperationId, SCHEMA, encode};
use crate::ids::StorePath;
use crate::store::Stores;
use crate::store::facts::read_whole;
use crate::store::record::{BESIDE_DIRECTORY, own};

/// The largest note that is read, in bytes.
const MAX_BYTES: u64 = 1 << 16;

/// One such place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Yard {
    root: StorePath,
}

/// Says that there is, or was, a place beside members.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Note {
    schema: u32,
    directory: StorePath,
}

impl Yard {
    /// The one for a member, made if need be.
    pub fn of(backend: &dyn Backend, member: &StorePath) -> std::result::Result<Self, BackendError> {
        let own_yard = Self { root: own(&[]) };
        let directory = member.parent();
        if backend.same_mount(&own_yard.temporaries(), &directory)? {
            return Ok(own_yard);
        }
        let yard = Self { root: child(&directory, BESIDE_DIRECTORY) };
        yard.make(backend)?;
        Ok(yard)
    }

    /// All of a store: its own, and those beside members.
    pub fn all(backend: &Arc<dyn Backend>) -> Result<Vec<Self>> {
        let mut yards = vec![Self { root: own(&[]) }];
        yards.extend(beside(backend)?);
        Ok(yards)
    }

    /// Whether it lies beside members.
    #[must_use]
    pub fn is_beside(&self) -> bool {
        self.root.file_name() == BESIDE_DIRECTORY
    }

    /// Where files in the making lie.
    #[must_use]
    pub fn temporaries(&self) -> StorePath {
        child(&self.root, "tmp")
    }

    /// Where files are kept.
    #[must_use]
    pub fn trash(&self) -> StorePath {
        child(&self.root, "trash")
    }

    /// A temporary.
    #[must_use]
    pub fn temporary(&self, operation: &OperationId, what: &str) -> StorePath {
        child(&self.temporaries(), &format!("{operation}.{what}"))
    }

    /// A file that is kept.
    #[must_use]
    pub fn kept(&self, operation: &OperationId, what: &str) -> StorePath {
        child(&self.trash(), &format!("{operation}.{what}"))
    }

    fn note(&self) -> StorePath {
        let hash = blake3::hash(self.root.as_str().as_bytes()).to_hex();
        own(&["beside", hash.get(..32).unwrap_or_default()])
    }

    /// Makes a place beside members, noted before and durable after.
    fn make(&self, backend: &dyn Backend) -> std::result::Result<(), BackendError> {
        let note = self.note();
        if backend.stat(&note).is_ok() && backend.stat(&self.trash()).is_ok() {
            return Ok(());
        }
        if make(backend, &note.parent())? {
            backend.sync_dir(&own(&[]))?;
        }
        let says = encode(&Note { schema: SCHEMA, directory: self.root.clone() });
        match write_new(backend, &own(&["tmp"]), &note, &says) {
            Ok(()) | Err(BackendError::AlreadyExists { .. }) => {}
            Err(error) => return Err(error),
        }
        for directory in [&self.root, &self.temporaries(), &self.trash()] {
            make(backend, directory)?;
        }
        backend.sync_dir(&self.root)?;
        backend.sync_dir(&self.root.parent())
    }
}

/// A name in a directory of qchain's own. One that is too long stands for the directory, which nothing can take.
fn child(directory: &StorePath, name: &str) -> StorePath {
    directory.join(name).unwrap_or_else(|_| directory.clone())
}

/// The places beside members that were noted on a store.
pub fn beside(backend: &Arc<dyn Backend>) -> Result<Vec<Yard>> {
    let notes = own(&["beside"]);
    let mut yards = Vec::new();
    for name in Journal::new(backend).names(&notes)? {
        let path = child(&notes, &name);
        match read_whole(backend, &path, MAX_BYTES) {
            Ok(bytes) => {
                let note: Option<Note> = serde_json::from_slice(&bytes).ok();
                let yard = note.map(|note| Yard { root: note.directory });
                // Only what qchain makes: a note is no licence to sweep elsewhere.
                yards.extend(yard.filter(|yard| yard.is_beside() && yard.note() == path));
            }
            Err(BackendError::NotFound { .. }) => {}
            Err(source) => return Err(failed("read", &path, source)),
        }
    }
    Ok(yards)
}

/// Makes the place beside members again in which a name is to lie: whoever ended the last operation before this
/// one may have taken it away just then.
pub fn ensure(backend: &dyn Backend, path: &StorePath) -> std::result::Result<(), BackendError> {
    let yard = Yard { root: path.parent().parent() };
    if yard.is_beside() { yard.make(backend) } else { Ok(()) }
}

/// Takes away the places beside members, if nothing is open on any store.
pub fn clear(stores: &Stores) -> Result<()> {
    let mut yards = Vec::new();
    let mut open = false;
    for (_, store) in stores.iter() {
        let noted = beside(store.backend())?;
        yards.extend(noted.into_iter().map(|yard| (store.backend(), yard)));
    }
    for (_, store) in stores.iter().filter(|_| !yards.is_empty()) {
        open |= !Journal::new(store.backend()).intents()?.is_empty();
    }
    for (backend, yard) in yards.into_iter().filter(|_| !open) {
        let journal = Journal::new(backend);
        let directories = [yard.trash(), yard.temporaries()];
        let names: Vec<String> =
            directories.iter().map(|path| journal.names(path)).collect::<Result<Vec<_>>>()?.concat();
        if names.is_empty() {
            directories
                .iter()
                .chain([&yard.root])
                .try_for_each(|path| gone(path, backend.remove_dir(path)))?;
            let note = yard.note();
            gone(&note, backend.remove_file(&note))?;
        }
    }
    Ok(())
}

/// Removes a place beside members with all that is left there, for good: the store is opted out.
pub fn remove(backend: &Arc<dyn Backend>, yard: &Yard) -> Result<()> {
    let journal = Journal::new(backend);
    for directory in [yard.trash(), yard.temporaries()] {
        for name in journal.names(&directory)? {
            let path = child(&directory, &name);
            gone(&path, backend.remove_file(&path))?;
        }
        gone(&directory, backend.remove_dir(&directory))?;
    }
    gone(&yard.root, backend.remove_dir(&yard.root))
}

fn gone(path: &StorePath, done: std::result::Result<(), BackendError>) -> Result<()> {
    match done {
        Ok(()) | Err(BackendError::NotFound { .. }) => Ok(()),
        Err(source) => Err(failed("remove", path, source)),
    }
}

fn failed(action: &'static str, path: &StorePath, source: BackendError) -> ChangeError {
    ChangeError::Store { action, member: path.to_string(), source }
}
