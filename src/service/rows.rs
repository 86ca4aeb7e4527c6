//! CloudStack's rows, those of the configuration: for jobs that ask whether members were given up, and to be shown.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use crate::cloudstack::records::Records;
use crate::database::{RowsError, Source};
use crate::failure::{Failure, with_causes};
use crate::ops::{OpError, Result};
use crate::service::config::{Config, RowSource};
use crate::store::StoreError;

/// How long what was read is shown. Jobs read anew.
const FRESH: Duration = Duration::from_secs(10);

/// Rows to be shown: what was read last, or why it could not be.
type Read = std::result::Result<Option<Arc<Records>>, String>;

/// The rows as they were a short while ago, however often lists are asked for.
#[derive(Default)]
pub struct Shown(Mutex<Option<(Instant, Read)>>);

impl Shown {
    /// The rows; none if the service knows none. The error says why they cannot be read. Blocks as long as the database
    /// does; who asks while another reads waits for that.
    pub fn get(&self, config: &Config) -> Read {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, read)) = last.as_ref()
            && at.elapsed() < FRESH
        {
            return read.clone();
        }
        let found = read(config).map(|rows| rows.map(Arc::new)).map_err(|error| with_causes(&error));
        *last = Some((Instant::now(), found.clone()));
        found
    }
}

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
