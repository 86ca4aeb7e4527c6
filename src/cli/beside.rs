//! A file that belongs to no store, named by its path: its directory is opened, so that what lies beside it can be found.

use std::path::Path;
use std::sync::Arc;

use super::error::{CliError, Result};
use crate::backend::posix::PosixStore;
use crate::backend::{Backend, BackendError};
use crate::ids::StorePath;
use crate::store::StoreError;

/// A file and its directory.
pub struct Beside {
    /// The directory's absolute path.
    pub root: String,
    /// The directory, opened.
    pub backend: Arc<dyn Backend>,
    /// The file's name in it.
    pub file: StorePath,
}

/// Opens the directory of a file; whether the file is there is the caller's to see.
pub fn open(text: &str) -> Result<Beside> {
    let not_found = || StoreError::NotFound { name: text.to_owned() };
    let absolute = std::path::absolute(Path::new(text)).map_err(|_| not_found())?;
    let (Some(directory), Some(name)) = (absolute.parent(), absolute.file_name()) else {
        return Err(not_found().into());
    };
    let (Some(root), Some(name)) = (directory.to_str(), name.to_str()) else {
        return Err(CliError::usage(format!("{text}: the path is not UTF-8")));
    };
    let file = StorePath::parse(name).map_err(|error| CliError::usage(error.to_string()))?;
    let opened = PosixStore::open(directory).map_err(|source| match source {
        BackendError::NotFound { .. } => not_found(),
        source => StoreError::Backend { store: root.to_owned(), source },
    })?;
    Ok(Beside { root: root.to_owned(), backend: Arc::new(opened), file })
}
