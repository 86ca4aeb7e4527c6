//! Where the cache of headers is kept: one file a store, in a directory of the user's.
//!
//! Best effort throughout: a cache that cannot be read is empty, one that cannot be saved is not saved.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::backend::posix::PosixStore;
use crate::backend::{Backend, BackendError, publish};
use crate::ids::StorePath;
use crate::store::Stores;
use crate::store::cache::Cache;
use crate::store::facts::read_whole;

/// The largest cache that is read, in bytes.
const MAX_CACHE_BYTES: u64 = 1 << 30;

/// The caches of a call's stores, by the store's index.
#[derive(Debug)]
pub struct Caches {
    /// What was known before.
    pub loaded: Vec<Cache>,
    directory: Option<Arc<dyn Backend>>,
    files: Vec<Option<StorePath>>,
}

impl Caches {
    /// Reads what there is.
    #[must_use]
    pub fn load(stores: &Stores, configured: Option<&Path>) -> Self {
        let directory = directory(configured);
        let files: Vec<_> = stores.iter().map(|(_, store)| file_of(&store.config().root)).collect();
        let read = |file: &Option<StorePath>| -> Option<Cache> {
            let bytes = read_whole(directory.as_ref()?, file.as_ref()?, MAX_CACHE_BYTES).ok()?;
            Some(Cache::decode(&bytes))
        };
        let loaded = files.iter().map(|file| read(file).unwrap_or_default()).collect();
        Self { loaded, directory, files }
    }

    /// Keeps what the scan saw, where that is anything new.
    pub fn save(&self) {
        let Some(directory) = &self.directory else { return };
        for (cache, file) in self.loaded.iter().zip(&self.files) {
            let (Some(bytes), Some(file)) = (cache.encode(), file) else { continue };
            let saved = publish::replace(directory.as_ref(), &StorePath::root(), file, &bytes, false);
            if let Err(error) = saved {
                tracing::debug!("the cache was not saved: {error}");
            }
        }
    }
}

/// The directory of caches, made if it is not there; `None` if it cannot be used.
pub(super) fn directory(configured: Option<&Path>) -> Option<Arc<dyn Backend>> {
    usual(configured).and_then(|directory| match open(&directory) {
        Ok(store) => Some(store),
        Err(error) => {
            tracing::debug!("no cache in {}: {error}", directory.display());
            None
        }
    })
}

/// Where it is: as configured, else where the user's caches are.
fn usual(configured: Option<&Path>) -> Option<PathBuf> {
    let of = |name: &str| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    configured
        .map(Path::to_owned)
        .or_else(|| of("XDG_CACHE_HOME").map(|home| home.join("qchain")))
        .or_else(|| of("HOME").map(|home| home.join(".cache").join("qchain")))
}

/// Opens the directory; makes it, and what is missing above it, private to the user.
fn open(directory: &Path) -> Result<Arc<dyn Backend>, BackendError> {
    let mut missing = Vec::new();
    let mut at = directory;
    let mut store = loop {
        match (PosixStore::open(at), at.parent(), at.file_name().and_then(|name| name.to_str())) {
            (Err(BackendError::NotFound { .. }), Some(parent), Some(name)) => {
                missing.push(name);
                at = parent;
            }
            (opened, _, _) => break opened?,
        }
    };
    let mut path = at.to_owned();
    for name in missing.into_iter().rev() {
        let component = StorePath::parse(name).unwrap_or_default();
        match store.create_dir(&component, true) {
            Ok(()) | Err(BackendError::AlreadyExists { .. }) => {}
            Err(error) => return Err(error),
        }
        path.push(name);
        store = PosixStore::open(&path)?;
    }
    Ok(Arc::new(store))
}

fn file_of(root: &str) -> Option<StorePath> {
    let hash = blake3::hash(root.as_bytes()).to_hex();
    StorePath::parse(&format!("{}.json", hash.get(..32)?)).ok()
}
