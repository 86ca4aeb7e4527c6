//! CloudStack's rows, for jobs that ask whether members were given up: those of the configuration.

use crate::cloudstack::records::Records;
use crate::database::{RowsError, Source};
use crate::failure::{Failure, with_causes};
use crate::ops::{OpError, Result};
use crate::service::config::{Config, RowSource};
use crate::store::StoreError;

/// What goes wrong with an export is a wrong configuration.
pub fn failed(error: &RowsError) -> OpError {
    match error {
        RowsError::Read { .. } | RowsError::Records { .. } => {
            StoreError::Usage { detail: with_causes(error) }.into()
        }
        RowsError::Database(error) => {
            OpError::Refused { code: error.code(), member: String::new(), message: with_causes(error) }
        }
    }
}

/// Where rows come from; `None` if the service knows none.
pub fn open(config: &Config) -> Result<Option<Source>> {
    let source = match &config.rows {
        Some(RowSource::File(file)) => Source::open(Some(file), None),
        Some(RowSource::Database(url)) => Source::open(None, Some(url)),
        None => Ok(None),
    };
    source.map_err(|error| failed(&error))
}

/// The rows as they are now; `None` if the service knows none. Blocks as long as the database does.
pub fn read(config: &Config) -> Result<Option<Records>> {
    let source = open(config)?;
    source.map(|source| source.records().map_err(|error| failed(&error))).transpose()
}
