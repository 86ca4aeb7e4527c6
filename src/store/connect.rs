//! Opening stores where the configuration says they are: a directory of a mount, or an export without one.

use std::path::Path;
use std::sync::Arc;

use crate::backend::nfs3::{Nfs3Store, NfsUrl};
use crate::backend::posix::PosixStore;
use crate::backend::{Backend, BackendError};
use crate::store::{Result, Store, StoreConfig, StoreError, Stores};

/// Opens stores for reading, in their order. Each is opened anew, so that one whose directory was unmounted or is
/// another mount now is seen as what it is now. Blocks; of an export for at most its time-out.
///
/// # Errors
///
/// What the first store that cannot be opened fails with; a place that is neither an absolute directory nor the
/// URL of an export is a usage error.
pub fn connect(configs: Vec<StoreConfig>) -> Result<Stores> {
    let opened = configs.into_iter().map(|config| {
        let store = config.root.clone();
        let backend = open(&store)?.map_err(|source| StoreError::Backend { store, source })?;
        Store::open(config, backend)
    });
    Stores::new(opened.collect::<Result<_>>()?)
}

fn open(root: &str) -> Result<std::result::Result<Arc<dyn Backend>, BackendError>> {
    if !root.contains("://") {
        return Ok(PosixStore::open(Path::new(root)).map(|store| Arc::new(store) as Arc<dyn Backend>));
    }
    let url = NfsUrl::parse(root).map_err(|error| StoreError::Usage { detail: error.to_string() })?;
    Ok(Nfs3Store::open(&url).map(|store| Arc::new(store) as Arc<dyn Backend>))
}
