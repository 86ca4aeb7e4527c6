//! Where CloudStack's rows come from: an export of them, or the database itself.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::{Database, DatabaseError};
use crate::cloudstack::records::{Records, RecordsError};
use crate::failure::{Code, Failure, Kind};

/// Why rows could not be read.
#[derive(Debug, thiserror::Error)]
pub enum RowsError {
    /// The export is none.
    #[error("failed to understand {file}")]
    Records {
        /// The file.
        file: String,
        /// The cause.
        #[source]
        source: RecordsError,
    },
    /// The export cannot be read.
    #[error("failed to read {file}")]
    Read {
        /// The file.
        file: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The database could not be used.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl Failure for RowsError {
    fn kind(&self) -> Kind {
        match self {
            Self::Records { source, .. } => source.kind(),
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => Kind::NotFound,
            Self::Read { .. } => Kind::Io,
            Self::Database(error) => error.kind(),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::Records { source, .. } => source.code(),
            Self::Read { source, .. } if source.kind() == io::ErrorKind::NotFound => Code::NotFound,
            Self::Read { .. } => Code::Io,
            Self::Database(error) => error.code(),
        }
    }

    fn member(&self) -> Option<&str> {
        match self {
            Self::Read { file, .. } => Some(file),
            Self::Records { .. } | Self::Database(_) => None,
        }
    }
}

/// Where the rows come from. All calls block.
pub enum Source {
    /// An export, and which version of it was read first. It shows one moment; what changed since shows in a newer
    /// one under its name.
    File(PathBuf, Option<SystemTime>),
    /// The database.
    Database(Box<Database>),
}

impl Source {
    /// The one that was given, if one was: an export, which is not read yet, or the URL of a database, which is
    /// connected to.
    pub fn open(export: Option<&Path>, url: Option<&str>) -> Result<Option<Self>, RowsError> {
        Ok(match (export, url) {
            (Some(file), _) => Some(Self::File(file.to_owned(), changed(file))),
            (None, Some(url)) => Some(Self::Database(Box::new(Database::connect(url)?))),
            (None, None) => None,
        })
    }

    /// All rows.
    pub fn records(&self) -> Result<Records, RowsError> {
        match self {
            Self::File(file, _) => read_export(file),
            Self::Database(database) => Ok(database.records()?),
        }
    }

    /// The rows of these snapshots and their children as they are now; `None` if they cannot have changed.
    pub fn around(&self, snapshots: &[u64]) -> Result<Option<Records>, RowsError> {
        match self {
            Self::File(file, version) if changed(file) == *version => Ok(None),
            Self::File(file, _) => read_export(file).map(Some),
            Self::Database(database) => Ok(Some(database.records_around(snapshots)?)),
        }
    }

    /// The database, if it is one.
    #[must_use]
    pub fn database(&self) -> Option<&Database> {
        match self {
            Self::File(..) => None,
            Self::Database(database) => Some(database),
        }
    }
}

/// Reads an export of CloudStack's rows. Memory is in the size of the file.
pub fn read_export(path: &Path) -> Result<Records, RowsError> {
    let file = path.display().to_string();
    let text = std::fs::read(path).map_err(|source| RowsError::Read { file: file.clone(), source })?;
    Records::parse(&text).map_err(|source| RowsError::Records { file, source })
}

/// When it was changed last, as far as that can be told.
fn changed(path: &Path) -> Option<SystemTime> {
    std::fs::metadata(path).and_then(|metadata| metadata.modified()).ok()
}
