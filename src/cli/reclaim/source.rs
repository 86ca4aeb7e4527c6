//! Where CloudStack's rows come from: a file, or its database.

use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::super::error::{CliError, Result};
use super::super::records_file;
use crate::cloudstack::records::Records;
use crate::database::Database;

/// Where the rows come from.
pub enum Source {
    /// An export, and which version of it was read first. It shows one moment; what changed since shows in a newer
    /// one under its name.
    File(PathBuf, Option<SystemTime>),
    /// The database.
    Database(Box<Database>),
}

impl Source {
    /// The one that was given.
    pub fn open(records: Option<&Path>, database: Option<&str>) -> Result<Self> {
        match (records, database) {
            (Some(file), None) => Ok(Self::File(file.to_owned(), records_file::changed(file))),
            (None, Some(url)) => Ok(Self::Database(Box::new(Database::connect(url)?))),
            _ => Err(CliError::usage("give --records or --database".to_owned())),
        }
    }

    /// All rows.
    pub fn records(&self) -> Result<Records> {
        match self {
            Self::File(file, _) => records_file::read(file),
            Self::Database(database) => Ok(database.records()?),
        }
    }

    /// The rows of these snapshots and their children as they are now; `None` if they cannot have changed.
    pub fn around(&self, snapshots: &[u64]) -> Result<Option<Records>> {
        match self {
            Self::File(file, version) if records_file::changed(file) == *version => Ok(None),
            Self::File(file, _) => records_file::read(file).map(Some),
            Self::Database(database) => Ok(Some(database.records_around(snapshots)?)),
        }
    }

    /// The database, if it is one.
    pub fn database(&self) -> Option<&Database> {
        match self {
            Self::File(..) => None,
            Self::Database(database) => Some(database),
        }
    }
}
